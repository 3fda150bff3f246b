"""Exports as ONNX and as a program of torch.export: what they predict, and what happens where they cannot be made."""

import errno
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from raytune_emotion.config import RunConfig
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn import export_folder
from raytune_emotion.learn.export_files import check_export, check_formats
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.learn.graphs import PixelsToProbabilities, predict_graph, write_graph
from raytune_emotion.learn.model import build_model, mean_std
from tests.support.exports import untrained_best


@pytest.fixture(scope="module")
def package(whole_export):
    return whole_export


@pytest.mark.parametrize("name", ["onnx", "pt2"])
@pytest.mark.parametrize("count", [1, 5])
def test_graph_predicts_what_predict_does_for_any_number_of_images(package, store, name, count):
    images_NHWC = store.val.gather(np.arange(count))
    prob_NK = predict_graph(name, package / f"model.{name}", images_NHWC)
    assert prob_NK.shape == (count, 13)
    assert np.abs(prob_NK - load_package(package).predict(images_NHWC)).max() < 1e-5


def test_graphs_name_their_classes_and_their_ends(package):
    import onnx

    graph = onnx.load(package / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {prop.key: json.loads(prop.value) for prop in graph.metadata_props} == {"classes": list(EMOTIONS)}
    (images,), (probabilities,) = graph.graph.input, graph.graph.output
    assert (images.name, probabilities.name) == ("images", "probabilities")
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"
    kept = {"classes.json": ""}
    with (package / "model.pt2").open("rb") as stream:
        torch.export.load(stream, extra_files=kept)
    assert json.loads(kept["classes.json"]) == list(EMOTIONS)


def test_card_says_how_near_the_formats_are_and_on_what(package, tmp_path):
    card = (package / "README.md").read_text()
    for file in ("model.safetensors", "model.onnx", "model.pt2"):
        assert f"{file} differs from the model by " in card
    assert "on 33 validation images; up to 0.0001 is accepted" in card
    write_package(tmp_path / "elsewhere", untrained_best("test_resnet", 32))
    assert "on 8 drawn faces, because the data of the run are not" in (tmp_path / "elsewhere/README.md").read_text()


def test_format_alone_has_no_weights_for_predict(package, sharp, store, tmp_path, monkeypatch):
    # The graph is that of the export of the same model in all formats.
    monkeypatch.setattr(export_folder, "write_graph", lambda name, file, *_: shutil.copy(package / "model.pt2", file))
    write_package(tmp_path / "best", sharp, formats=("pt2",), store=store)
    assert not (tmp_path / "best/model.safetensors").exists()
    with pytest.raises(UserError, match="best: contains only the format pt2; export it again also as timm"):
        check_export(tmp_path / "best")


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_model_that_cannot_be_traced_is_a_sentence_and_the_old_export_stays(tmp_path, monkeypatch, name):
    class Undecided(nn.Module):
        """Take a way that depends on the values of its input, which no graph can."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x_BCHW):
            return self.model(x_BCHW) * (2 if x_BCHW.sum() > 0 else 1)

    dest = tmp_path / "best"
    write_package(dest, untrained_best("test_resnet", 32))
    before = (dest / "README.md").read_bytes()
    monkeypatch.setattr(
        export_folder,
        "PixelsToProbabilities",
        lambda model, mean, std: PixelsToProbabilities(Undecided(model), mean, std),
    )
    with pytest.raises(UserError, match=f"best: test_resnet cannot be exported as {name} .*; leave this format out"):
        write_package(dest, untrained_best("test_resnet", 32, seed=1), formats=(name,))
    assert (dest / "README.md").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_error_whose_first_line_is_blank_is_said(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("\n    Some tensors share memory:\n    two of them")

    monkeypatch.setattr(export_folder, "save_file", refuse)
    with pytest.raises(UserError, match=r"as timm \(RuntimeError: Some tensors share memory:\); leave"):
        write_package(tmp_path / "best", untrained_best("test_resnet", 32))


def test_full_disk_is_an_error_and_does_not_end_the_process():
    model = build_model(RunConfig.from_flat({"data.image_size": 32, "model.backbone": "test_resnet"}))
    with pytest.raises(OSError, match="No space left on device"):
        write_graph("pt2", Path("/dev/full"), PixelsToProbabilities(model, *mean_std(model)), 32, EMOTIONS)


@pytest.mark.parametrize(
    ("name", "writes", "error"),
    [
        ("timm", "save_file", SafetensorError("Error while serializing: No space left on device (os error 28)")),
        ("pt2", "write_graph", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_full_disk_is_no_fault_of_a_format(tmp_path, monkeypatch, name, writes, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(export_folder, writes, full)
    with pytest.raises(Breakdown, match="best: no space left on the disk; free some space, or name another"):
        write_package(tmp_path / "best", untrained_best("test_resnet", 32), formats=(name,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["timm", "onnx"])
def test_format_that_predicts_something_else_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(export_folder, "write_graph", lambda name, file, *_: file.write_bytes(b"a graph"))
    monkeypatch.setattr(export_folder, "predict_graph", lambda *_: np.full((8, 13), 1 / 13))
    save = export_folder.save_file
    monkeypatch.setattr(
        export_folder, "save_file", lambda weights, *rest: save({k: v * 2 for k, v in weights.items()}, *rest)
    )
    with pytest.raises(
        UserError, match=rf"test_resnet as {name} gives probabilities that differ by .*, more than 0.0001"
    ):
        write_package(tmp_path / "best", untrained_best("test_resnet", 32), formats=(name,))
    assert not list(tmp_path.iterdir())


def test_what_a_format_needs_is_named_where_it_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UserError) as error:
        check_formats(["pt2", "onnx", "tflite"])
    assert error.value.faults == (
        "--format onnx: needs onnxruntime, not installed here; install them with pip install 'raytune_emotion[onnx]'",
        "--format tflite: unknown format; choose one of timm, onnx, pt2",
    )
