"""The model card: what it says, and that the code it shows gives what `predict` gives."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from raytune_emotion.cli import command_main
from raytune_emotion.config import ModelConfig
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn import export_folder, model_card, predictions
from raytune_emotion.learn.calibration import at_temperature
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.learn.model_card import escape_markdown
from raytune_emotion.learn.predictions import bootstrap_intervals, predict_best
from raytune_emotion.learn.run_folder import BEST
from tests.support.exports import predict_with_card, turned_picture


@pytest.fixture(scope="module")
def trained(trained_run):
    return read_best(trained_run[0] / BEST)


@pytest.fixture(scope="module")
def export(whole_export):
    return whole_export


@pytest.fixture(scope="module")
def card(export):
    return (export / "README.md").read_text()


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_code_gives_what_predict_gives_in_every_format(export, card, tmp_path, capsys, monkeypatch, orientation):
    turned_picture(tmp_path / "face.jpg", orientation)
    (tmp_path / "best").symlink_to(export)
    monkeypatch.chdir(tmp_path)
    assert command_main("predict", ["best", "face.jpg"]) == 0
    _, row = csv.reader(io.StringIO(capsys.readouterr().out))
    wanted = np.array(row[1:], float)
    found = predict_with_card(card)
    assert len(found) == 3
    for probabilities_NK in found:
        assert np.abs(probabilities_NK - wanted).max() < 2e-6


def test_turned_picture_gives_other_probabilities(export, tmp_path):
    """So that the test above would see a card that forgets EXIF."""
    from raytune_emotion.data.decode import decode_image

    found = []
    for orientation in (1, 6):
        turned_picture(tmp_path / "face.jpg", orientation)
        found.append(load_package(export).predict(np.stack([decode_image(tmp_path / "face.jpg", 32)])))
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_temperature_that_helps_is_in_weights_and_card(export, card, sharp, store):
    temperature = json.loads((export / "config.json").read_text())["raytune_emotion"]["temperature"]
    assert temperature > 2
    raw = predict_best(sharp, store.val, store.classes)
    images = store.val.gather(raw.rows_N)
    cooled = load_package(export).predict(images)
    assert np.abs(cooled - at_temperature(raw, temperature).predicted_NK).max() < 1e-5
    assert f"A temperature of {temperature:.4f} was fitted on the soft labels of " in card
    assert "It is applied: in all formats, the last layer of the weights is divided by it." in card
    calibrated = at_temperature(raw, temperature).metrics()
    assert (
        f"| Kullback-Leibler divergence of the prediction from the target, nats | {calibrated['kl'].mean():.4f} |"
        in card
    )


def test_card_says_what_the_model_is_and_how_good(card, trained, store):
    assert "Means over all 33 validation images after " in card
    assert re.search(r"^\| Jensen-Shannon divergence, bits \| 0\.\d{4} \| 0\.\d{4} to 0\.\d{4} \|$", card, re.MULTILINE)
    for name in EMOTIONS:
        assert len(re.findall(rf"^\| {name} \|( 0\.\d{{4}} \|){{4}} \d+ \|", card, re.MULTILINE)) == 1
    assert ", ".join(EMOTIONS) in card
    assert "- Trial 0007 of the study x.\n" in card
    assert f"`{store.fingerprint}`" in card
    assert "| optim.lr | 0.003 |" in card
    assert model_card._LIMITS in card
    assert "*perceived*" in card
    assert "random weights, so no licence of other weights applies" in card
    assert "weights_dir" not in card
    for name in trained.report:
        if name.startswith("val_"):
            assert name.removeprefix("val_") in model_card._MEANINGS


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("__proto__", r"\_\_proto\_\_"),
        ("<b>a</b>", r"\<b\>a\</b\>"),
        ("a|b", r"a\|b"),
        ("[a](http://b)", r"\[a\](http://b)"),
        ("`e` & *f* ~~g~~ $h$ \\i", r"\`e\` \& \*f\* \~\~g\~\~ \$h\$ \\i"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_text_from_outside_is_no_markdown(text, markdown):
    assert escape_markdown(text) == markdown


def test_card_holds_no_markup_from_names(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_folder, "_write_format", lambda *_: 0.0)
    odd = ("<b>x</b>", "a|b", *EMOTIONS[2:])
    best = dataclasses.replace(trained, settings={**trained.settings, "data.classes": odd})
    write_package(tmp_path / 'a "b"', best, ["The run *x*."], formats=("timm", "onnx", "pt2"))
    card = (tmp_path / 'a "b"' / "README.md").read_text()
    assert r"\<b\>x\</b\>, a\|b, sad" in card
    assert r"- The run \*x\*." in card
    assert r'timm.create_model("local-dir:a \"b\"", pretrained=True)' in card
    assert r'InferenceSession("a \"b\"/model.onnx")' in card
    assert r'torch.export.load("a \"b\"/model.pt2")' in card
    assert """predict 'a "b"' face.jpg""" in card


def test_card_of_a_model_of_drawn_faces_says_so(trained, store, tmp_path):
    for name, is_drawn in (("sample-v1-2000-500-64px-32px-0", True), ("faces-32px-0", False)):
        packed = dataclasses.replace(store, path=tmp_path / name)
        write_package(tmp_path / "best", trained, store=packed)
        said = (
            "drawn: predictions of this model for photos are meaningless" in (tmp_path / "best/README.md").read_text()
        )
        assert said == is_drawn


def test_card_without_the_data_says_so(trained, tmp_path):
    write_package(tmp_path / "best", trained)
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"| Jensen-Shannon divergence, bits | {trained.report['val_js']:.4f} |" in card
    assert "not calibrated, because the data of the run are not on the machine" in card
    assert "onnxruntime" not in card


def test_a_machine_that_is_too_slow_to_predict_the_faces_does_not_calibrate(sharp, store, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_MOST_SECONDS", 0.0)
    monkeypatch.setattr(predictions, "_BATCH", 25)
    write_package(tmp_path / "best", sharp, store=store)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "not calibrated: there was time to predict only 25 validation images. Export it on a faster" in card
    assert json.loads((tmp_path / "best" / "config.json").read_text())["raytune_emotion"]["temperature"] == 1


def test_licence_of_the_starting_weights_is_named():
    config = ModelConfig(backbone="resnet18.a1_in1k", pretrained=True)
    said = "Training began with the pretrained weights of resnet18.a1_in1k. Their licence: apache-2.0."
    assert model_card.describe_start(config, {"license": "apache-2.0"}) == said


def test_the_licence_of_a_strangers_weights_is_no_markup():
    config = ModelConfig(backbone="resnet18.a1_in1k", pretrained=True)
    told = model_card.describe_start(config, {"license": "mit\n\n# Safe <img src=x>"})
    assert told.endswith("Their licence: mit # Safe \\<img src=x\\>.")


def test_bootstrap_interval_holds_the_mean_and_narrows_with_more_images():
    few, many = (np.random.default_rng(1).normal(2.0, 1.0, n) for n in (50, 5000))
    (low, high), (lower, higher) = (bootstrap_intervals({"x": values})["x"] for values in (few, many))
    assert low < few.mean() < high
    # The interval of a normal mean is 3.92 standard errors wide.
    assert higher - lower == pytest.approx(3.92 * many.std() / np.sqrt(5000), rel=0.1)
    assert high - low > 5 * (higher - lower)
