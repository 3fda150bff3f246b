import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import timm
import torch

from raytune_emotion.config import RunConfig
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.run_folder import BEST


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more threads, and sums are always made in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with on_one_thread():
        yield


@pytest.fixture(scope="session")
def trained_run(store, tmp_path_factory):
    """A folder that a model was trained in, and its reports."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig.from_flat(
        {"data.image_size": 32, "model.backbone": "test_resnet", "train.epochs": 2, "optim.lr": 3e-3}
    )
    with on_one_thread():
        return folder, list(fit(config, store, device=torch.device("cpu"), folder=folder))


@pytest.fixture(scope="session")
def sharp(trained_run):
    """The best checkpoint of a model that is far too sure of itself: its last layer is ten times as large."""
    trained = read_best(trained_run[0] / BEST)
    (name,) = [timm.create_model("test_resnet").pretrained_cfg["classifier"]]
    grown = {key: value * 10 if key.startswith(f"{name}.") else value for key, value in trained.weights.items()}
    return dataclasses.replace(trained, weights=grown)


@pytest.fixture(scope="session")
def whole_export(sharp, store, tmp_path_factory):
    """An export that is calibrated, in all formats, compared on validation images."""
    dest = tmp_path_factory.mktemp("whole") / "best"
    with on_one_thread():
        write_package(dest, sharp, ["Trial 0007 of the study x."], formats=("timm", "onnx", "pt2"), store=store)
    return dest
