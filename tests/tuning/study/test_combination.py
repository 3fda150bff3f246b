"""Ensembles and soups of a study's trials, as exports."""

import csv
import dataclasses
import functools
import io
import json
import shutil

import numpy as np
import pytest
import torch

from raytune_emotion.cli import command_main
from raytune_emotion.data.augment import normalise
from raytune_emotion.data.decode import decode_image
from raytune_emotion.data.prepare import prepare
from raytune_emotion.errors import UserError
from raytune_emotion.learn import checkpoint, export_folder, model_card
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.combine import images_per_second, mean_weights
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.learn.model import load_model, mean_std
from raytune_emotion.learn.run_folder import BEST, PREDICTIONS
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.execution.job import Job, train_here
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.report.publication import pull_for_report
from raytune_emotion.tuning.study import combination, combined_export
from raytune_emotion.tuning.study.combination import combine_ensemble, list_kept, read_candidates
from raytune_emotion.tuning.study.combined_export import export_soup, write_ensemble
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.spec import read_spec, write_spec
from tests.support.exports import predict_with_card, turned_picture
from tests.support.studies import forget_last_ending, write_study

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def short_measurements():
    """Measure for three batches how many images a second an ensemble predicts, and not for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_folder, "images_per_second", functools.partial(images_per_second, seconds=0.0))
        yield


def candidates_of(study, store):
    """The trials of a study that can be combined, with the store that they were trained on."""
    return read_candidates(list_kept(study, load(study).records()), {store.fingerprint: store}.get, CPU)


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    """A study of three trials, all with their weights."""
    folder = tmp_path_factory.mktemp("results") / "three"
    write_study(folder, store)
    return folder


def test_predictions_are_those_of_the_weights_whether_they_are_kept_or_not(study, store):
    kept = candidates_of(study, store)
    assert len(kept.trial_ids) == 3
    file = study / "trials" / kept.trial_ids[1] / PREDICTIONS
    content = file.read_bytes()
    file.unlink()
    try:
        again = candidates_of(study, store)
    finally:
        file.write_bytes(content)
    for first, second in zip(kept.predictions, again.predictions, strict=True):
        assert torch.allclose(first, second, atol=1e-3)


def test_trials_that_were_left_before_their_end_count(study, store, tmp_path):
    """As by a time budget. `best/` may be one of them."""
    shutil.copytree(study, tmp_path / "study")
    forget_last_ending(tmp_path / "study")
    records = load(tmp_path / "study").records()
    assert [record.status for record in records] == ["complete", "complete", "running"]
    assert len(candidates_of(tmp_path / "study", store).trial_ids) == 3
    assert len(combined_export._candidates(load(tmp_path / "study")).trial_ids) == 3
    pull_for_report(Remote((tmp_path / "study").as_uri()), tmp_path / "here", records)
    assert [name for name, _ in list_kept(tmp_path / "here", records)] == [record.trial_id for record in records]
    failed = [dataclasses.replace(record, status="failed") for record in records]
    assert list_kept(tmp_path / "study", failed) == []


def test_of_a_trial_that_reports_just_now_the_weights_are_predicted_anew(study, store, tmp_path):
    """Its predictions are written before its weights: they are of a later report."""
    shutil.copytree(study, tmp_path / "study")
    trial = tmp_path / "study" / "trials" / "0000"
    before = candidates_of(tmp_path / "study", store)
    best = read_best(trial / BEST)
    other_NK = torch.full(before.targets.shape, 1 / before.targets.shape[1])
    checkpoint._write(trial / PREDICTIONS, {"prob_NK": other_NK}, {"report": best.report["report"] + 1})
    after = candidates_of(tmp_path / "study", store)
    for first, second in zip(before.predictions, after.predictions, strict=True):
        assert torch.allclose(first, second, atol=1e-3)


def test_data_at_a_uri_are_fetched_to_combine_trials(study, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(study, tmp_path / "study")
    shutil.copytree(store.path, tmp_path / "faces")
    uri = (tmp_path / "faces").as_uri()
    spec = read_spec(tmp_path / "study")
    # That of another size, which no trial was trained on, is not looked for.
    stores, fingerprints = {32: uri, 48: f"{uri}/none"}, {**spec.fingerprints, 48: "0" * 64}
    write_spec(tmp_path / "study", dataclasses.replace(spec, stores=stores, fingerprints=fingerprints))
    assert command_main("export", [str(tmp_path / "study"), str(tmp_path / "best"), "--ensemble", "1"]) == 0
    assert "Means over all 33 validation images" in (tmp_path / "best" / "README.md").read_text()


@pytest.fixture(scope="module")
def ensemble(study, store, tmp_path_factory):
    """An ensemble of two backbones, whether that helps or not, in all formats."""
    dest = tmp_path_factory.mktemp("ensemble") / "best"
    found = combine_ensemble(candidates_of(study, store), 3)
    backbones = [best.settings["model.backbone"] for best in found.candidates.bests]
    chosen = dataclasses.replace(found, members=(backbones.index("test_vit"), backbones.index("test_resnet")))
    write_ensemble(dest, chosen, "three", ["onnx", "pt2"])
    return dest, chosen


def test_an_ensemble_says_what_it_is_and_what_it_brings(ensemble, store):
    dest, chosen = ensemble
    config, metrics = (json.loads((dest / name).read_text()) for name in ("config.json", "metrics.json"))
    assert [member["trial"] for member in config["members"]] == chosen.trial_ids
    assert config["label_names"] == list(store.classes)
    assert metrics["unseen_js"] == chosen.combined
    assert metrics["images_per_second_cpu"] > 0
    reports = [chosen.candidates.bests[number].report for number in chosen.members]
    assert metrics["params_millions"] == pytest.approx(sum(report["params_millions"] for report in reports))
    assert metrics["best_val_js"] == metrics["val_js"]
    of_one_run = {"report", "epoch", "seconds", "time", "train_loss", "lr", "images_per_second", "finished"}
    assert not of_one_run & metrics.keys()
    card = (dest / "README.md").read_text()
    for trial_id, backbone in zip(chosen.trial_ids, ("test_vit", "test_resnet"), strict=True):
        start = "Training began with random weights, so no licence of other weights applies."
        assert f"- Trial {trial_id}, {backbone}: {start}\n" in card
    assert "The trials and their epochs were selected on the whole set." in card
    assert f"JS {chosen.combined:.4f} bits; the best single model {chosen.single:.4f}" in card
    assert model_card._LIMITS in card


@pytest.mark.parametrize("orientation", [1, 6])
def test_every_way_to_predict_with_an_ensemble_gives_the_mean_of_its_members(
    study, ensemble, tmp_path, monkeypatch, capsys, orientation
):
    """By the command, and by the code of the card for ONNX and pt2; also a picture that EXIF turns."""
    dest, chosen = ensemble
    turned_picture(tmp_path / "face.jpg", orientation)
    pixels_NHWC = np.stack([decode_image(tmp_path / "face.jpg", 32)])
    expected_NK = []
    for trial_id in chosen.trial_ids:
        network = load_model(read_best(study / "trials" / trial_id / BEST))
        with torch.inference_mode():
            logits_NK = network(normalise(torch.from_numpy(pixels_NHWC), *mean_std(network)))
        expected_NK.append(logits_NK.softmax(-1))
    expected_K = torch.stack(expected_NK).mean(0)[0].numpy()

    (tmp_path / "best").symlink_to(dest)
    monkeypatch.chdir(tmp_path)
    assert command_main("predict", ["best", "face.jpg"]) == 0
    _, row = csv.reader(io.StringIO(capsys.readouterr().out))
    assert np.abs(np.array(row[1:], float) - expected_K).max() < 2e-6
    found = predict_with_card((dest / "README.md").read_text())
    assert len(found) == 2
    for probabilities_NK in found:
        assert np.abs(probabilities_NK[0] - expected_K).max() < 2e-6


def test_an_ensemble_whose_members_are_not_as_many_as_its_weights_is_damaged(ensemble, tmp_path):
    shutil.copytree(ensemble[0], tmp_path / "best")
    file = tmp_path / "best" / "config.json"
    config = json.loads(file.read_text())
    for members in ([], config["members"][:1], [*config["members"], config["members"][0]], "all"):
        file.write_text(json.dumps({**config, "members": members}))
        with pytest.raises(UserError, match="best: a damaged export"):
            load_package(tmp_path / "best")


def test_a_soup_is_a_model_of_timm_with_the_mean_weights(study, tmp_path, monkeypatch):
    # Whether that helps or not.
    monkeypatch.setattr(combination, "choose_soup", lambda predict, count, *_: (*range(count),))
    chosen = export_soup(Folder(study), Folder(tmp_path / "best"), ["timm"])
    backbones = {best.settings["model.backbone"] for best in chosen.candidates.bests}
    assert len(backbones) == 1
    assert len(chosen.trial_ids) > 1
    weights = [read_best(study / "trials" / trial_id / BEST).weights for trial_id in chosen.trial_ids]
    network = load_package(tmp_path / "best").model.model
    expected, found = mean_weights(weights), network.state_dict()
    # The temperature of an export is part of the last layer. Statistics of BatchNorm are no weights.
    names = [name for name, _ in network.named_parameters()]
    body = [name for name in names if not name.startswith(("fc.", "head."))]
    assert len(body) > 10
    assert all(torch.equal(found[name], expected[name]) for name in body)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "The mean of the weights of the trials" in card
    assert f"The settings below are those of trial {chosen.trial_ids[0]}, the first of them." in card
    assert "Means over all 33 validation images, with" in card
    metrics = json.loads((tmp_path / "best" / "metrics.json").read_text())
    assert metrics["members"] == len(chosen.trial_ids)
    assert "epoch" not in metrics


def test_a_trial_that_no_other_helps_is_exported_as_what_it_is(study, store, tmp_path, monkeypatch, capsys):
    alone = combine_ensemble(candidates_of(study, store), 1)
    best = alone.candidates.bests[alone.members[0]]
    monkeypatch.setattr(combined_export, "combine_soup", lambda candidates, device: (alone, best))
    write_ensemble(tmp_path / "ensemble", alone, "three", [])
    assert command_main("export", [str(study), str(tmp_path / "soup"), "--soup"]) == 0
    (trial_id,) = alone.trial_ids
    said = f"trial {trial_id} alone is exported to {tmp_path / 'soup'}: no other trial improves it\n"
    assert capsys.readouterr().out == said
    for dest in (tmp_path / "ensemble", tmp_path / "soup"):
        assert "members" not in json.loads((dest / "config.json").read_text())
        assert json.loads((dest / "metrics.json").read_text()) == best.report
        card = (dest / "README.md").read_text()
        assert f"Trial {trial_id} of the study three, alone, as no other trial helps it." in card


def test_where_the_data_are_gone_nothing_can_be_chosen(study):
    with pytest.raises(UserError, match="packed data of the run are not on this machine"):
        read_candidates(list_kept(study, load(study).records()), {}.get, CPU)


def test_where_no_trial_has_weights_it_is_said(study):
    with pytest.raises(UserError, match="no trial has weights"):
        read_candidates([], {}.get, CPU)


def test_the_card_of_an_ensemble_names_the_licence_of_pretrained_members(study, store, tmp_path):
    candidates = candidates_of(study, store)
    pretrained = [
        dataclasses.replace(best, settings={**best.settings, "model.pretrained": True}) for best in candidates.bests
    ]
    found = combine_ensemble(dataclasses.replace(candidates, bests=tuple(pretrained)), 2)
    write_ensemble(tmp_path / "best", dataclasses.replace(found, members=(0, 1)), "three", [])
    card = (tmp_path / "best" / "README.md").read_text()
    assert card.count(": Training began with the pretrained weights of test_") == 2
    assert card.count(". Their licence: ") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ensemble", "3", "--soup"], "--ensemble: cannot be combined with --soup; leave one of them out"),
        (["--trial", "1", "--soup"], "--trial: cannot be combined with --soup"),
        (["--ensemble", "2", "--format", "timm"], "--format timm: timm loads one network, and an ensemble is several"),
    ],
)
def test_options_that_do_not_go_together_are_refused(study, tmp_path, capsys, options, said):
    assert command_main("export", [str(study), str(tmp_path / "best"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "best").exists()


def test_the_command_exports_an_ensemble(study, store, tmp_path, monkeypatch, capsys):
    # Whether that helps or not.
    two = dataclasses.replace(combine_ensemble(candidates_of(study, store), 2), members=(0, 1))
    monkeypatch.setattr(combined_export, "combine_ensemble", lambda candidates, most: two)
    write_format = export_folder._write_format

    def write_weights(name, new, *rest):
        """Leave out the graph, which the fixture `ensemble` has."""
        if name == "timm":
            return write_format(name, new, *rest)
        (new / f"model.{name}").touch()
        return 0.0

    monkeypatch.setattr(export_folder, "_write_format", write_weights)
    assert command_main("export", [str(study), str(tmp_path / "best"), "--ensemble", "2"]) == 0
    assert {file.name for file in (tmp_path / "best").iterdir()} == {
        "README.md", "config.json", "metrics.json", "model.pt2", "model.safetensors"
    }  # fmt: skip
    assert f"the ensemble of the trials {', '.join(two.trial_ids)} is exported" in capsys.readouterr().out


@pytest.fixture
def untraceable(monkeypatch):
    """Let no model be written as a graph."""

    def fail(*args):
        raise RuntimeError("a loop that depends on data\nand a page of code")

    monkeypatch.setattr(export_folder, "write_graph", fail)


@pytest.mark.usefixtures("untraceable")
@pytest.mark.parametrize("members", [(0, 1), (0,)])
def test_an_ensemble_that_cannot_be_traced_is_exported_as_weights(study, store, tmp_path, monkeypatch, capsys, members):
    """Also if one trial alone is the best."""
    chosen = dataclasses.replace(combine_ensemble(candidates_of(study, store), 2), members=members)
    monkeypatch.setattr(combined_export, "combine_ensemble", lambda candidates, most: chosen)
    assert command_main("export", [str(study), str(tmp_path / "best"), "--ensemble", "2"]) == 0
    backbones = ", ".join(dict.fromkeys(best.settings["model.backbone"] for best in chosen.bests))
    what = f"an ensemble of {backbones}" if len(members) > 1 else backbones
    why = f"{what} cannot be exported as pt2 (RuntimeError: a loop that depends on data), so only the weights are"
    assert capsys.readouterr().err == f"{why} exported\n"
    assert {file.name for file in (tmp_path / "best").iterdir()} == {
        "README.md", "config.json", "metrics.json", "model.safetensors"
    }  # fmt: skip
    assert load_package(tmp_path / "best").image_size == 32
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"- {model_card.escape_markdown(why)} exported.\n" in card


@pytest.mark.usefixtures("untraceable")
def test_a_format_of_an_ensemble_that_is_named_and_cannot_be_made_is_refused(
    study, store, tmp_path, monkeypatch, capsys
):
    candidates = candidates_of(study, store)
    backbones = [best.settings["model.backbone"] for best in candidates.bests]
    members = (backbones.index("test_resnet"), backbones.index("test_vit"))
    two = dataclasses.replace(combine_ensemble(candidates, 2), members=members)
    monkeypatch.setattr(combined_export, "combine_ensemble", lambda candidates, most: two)
    assert command_main("export", [str(study), str(tmp_path / "best"), "--ensemble", "2", "--format", "pt2"]) == 2
    told = capsys.readouterr().err
    assert "best: an ensemble of test_resnet, test_vit cannot be exported as pt2 (" in told
    assert "; leave this format out" in told
    assert not (tmp_path / "best").exists()


def test_an_ensemble_whose_weights_cannot_be_written_is_refused_at_once(study, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no such type")

    monkeypatch.setattr(export_folder, "save_file", fail)
    assert command_main("export", [str(study), str(tmp_path / "best"), "--ensemble", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be exported as timm (" in line
    assert not (tmp_path / "best").exists()


def test_the_command_says_how_many_trials_of_other_image_sizes_are_left_out(study, store, faces, tmp_path, capsys):
    command = [str(tmp_path / "study"), str(tmp_path / "best"), "--soup"]
    shutil.copytree(study, tmp_path / "study")
    assert command_main("export", command) == 0
    assert "left out" not in capsys.readouterr().out
    other = candidates_of(study, store).trial_ids[-1]
    larger = prepare(faces, image_size=48)
    run = tmp_path / "study" / "trials" / other
    shutil.rmtree(run)
    settings = {"data.image_size": 48, "model.backbone": "test_resnet", "train.epochs": 1, "optim.lr": 1e-7}
    list(train_here(Job(other, str(run), str(larger.path), settings, Resources(1, 1, 0))))
    spec = read_spec(tmp_path / "study")
    stores, fingerprints = {**spec.stores, 48: str(larger.path)}, {**spec.fingerprints, 48: larger.fingerprint}
    write_spec(tmp_path / "study", dataclasses.replace(spec, stores=stores, fingerprints=fingerprints))
    assert command_main("export", command) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "left out: 1 trial of another image size than the 32 px of the best trial"
