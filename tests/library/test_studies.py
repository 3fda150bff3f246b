"""The library's studies, with the names that it gives."""

import argparse
import importlib
import inspect
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

import raytune_emotion
from raytune_emotion import load_study
from raytune_emotion.cli import command_main
from raytune_emotion.errors import UserError
from raytune_emotion.learn.evaluation import evaluate
from raytune_emotion.library import studies
from raytune_emotion.storage.locations import Folder
from tests.support.studies import write_study

NAMES = {
    "create_model", "get_loss_function", "MSELoss", "L1Loss", "KLDivLoss", "CrossEntropyLoss", "JSLoss", "CombinedLoss",
    "MetricsCalculator", "create_loaders", "create_trainer", "load_checkpoint", "visualize_predictions",
    "plot_training_curves", "search", "load_study", "UserError", "__version__",
}  # fmt: skip


def test_the_names_of_the_library():
    assert set(raytune_emotion.__all__) == NAMES
    for name in NAMES:
        assert getattr(raytune_emotion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'create_modell'"):
        raytune_emotion.create_modell  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("library") / "study"
    write_study(folder, store)
    return folder


def test_a_study_has_its_trials_and_curves_as_tables(folder):
    study = load_study(folder)
    written = pd.read_csv(folder / "trials.csv", dtype={"trial_id": str})
    assert [*study.trials.columns] == [*written.columns]
    assert [*study.trials["trial_id"]] == [*written["trial_id"]]
    assert study.best["trial_id"] == written["trial_id"][0]
    assert study.best["best_val_js"] == study.curves["val_js"].min()
    assert len(study.curves) == 6
    assert study.spec.trials == 3


def test_the_model_of_a_study_has_the_numbers_of_its_best_trial(folder, store):
    study = load_study(str(folder))
    model = study.model()
    assert not model.training
    images = torch.from_numpy(store.val.gather(np.arange(4))).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(model(images).sum(-1), torch.ones(4))
    metrics = evaluate(model.backbone, store.val, classes=store.classes, device=torch.device("cpu"))
    assert metrics["js"] == pytest.approx(study.best["val_js"], abs=1e-6)
    assert metrics["kl"] == pytest.approx(study.best["val_kl"], abs=1e-6)


def test_what_is_no_study_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="no study"):
        load_study(tmp_path)
    with pytest.raises(UserError, match="study: no weights of trial 0099, because only the best ones are kept; choose"):
        load_study(folder).model("0099")


def test_a_search_takes_the_options_of_the_command():
    parser = argparse.ArgumentParser()
    importlib.import_module("raytune_emotion.search").add_arguments(parser)
    options = {action.dest for action in parser._actions} - {"help", "dry_run"}
    assert {*inspect.signature(studies.search).parameters} == options


def test_all_that_the_command_refuses_is_an_error(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.yaml").touch()
    with pytest.raises(UserError) as caught:
        raytune_emotion.search(tmp_path / "faces", {"optim.lrr": 1.0}, results=tmp_path, name="mine")
    taken, space, data = caught.value.faults
    assert taken.endswith("a study of this name exists already; continue it with --resume, or choose another name")
    assert "optim.lrr" in space
    assert data.startswith(f"{tmp_path / 'faces'}: no such")
    with pytest.raises(UserError, match="name: expected"):
        raytune_emotion.search(resume=True)
    with pytest.raises(UserError, match="--name: expected up to 100 letters"):
        raytune_emotion.search(name="")
    with pytest.raises(UserError) as caught:
        raytune_emotion.search("a\0b", name="c\0d", results=tmp_path, warm_start=["e\0f"])
    assert [fault.partition(": ")[0] for fault in caught.value.faults] == [
        r"'--data=a\x00b'", r"'--name=c\x00d'", r"'e\x00f'"
    ]  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The requests of searches; nothing is run."""
    requests = []

    def parse(verb, argv):
        parser = argparse.ArgumentParser()
        importlib.import_module(f"raytune_emotion.{verb}").add_arguments(parser)
        requests.append(parser.parse_args(argv))

    monkeypatch.setattr(studies, "run_command", parse)
    return requests


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ((), ["none"]),
        (["first"], [Folder(Path("first"))]),
        ("first", [Folder(Path("first"))]),
        (Path("first"), [Folder(Path("first"))]),
    ],
)
def test_earlier_studies_are_named_or_none_or_left_to_the_command(tmp_path, asked, given, meant):
    with pytest.raises(UserError):  # no study is made
        raytune_emotion.search(results=tmp_path, warm_start=given)
    assert asked[0].warm_start == meant


@pytest.mark.parametrize("resume", [False, True])
def test_each_argument_of_a_search_is_the_option_of_its_name(tmp_path, asked, resume):
    space = tmp_path / "space.yaml"
    space.write_text("loss: kl\n")
    numbers = {name: 2 + i for i, name in enumerate(("trials", "epochs", "seed", "concurrency", "max_failures"))}
    words = {
        "objective": "val_js per hour", "sampler": "tpe", "scheduler": "hyperband", "name": "mine",
        "storage": "postgresql://host/studies", "mlflow": "logs", "address": "10.0.0.1:6379",
    }  # fmt: skip
    plain = {**numbers, **words, "workers_per_trial": 9, "gpus_per_worker": 0.5, "resume": resume}
    flags = {"skip_bad": not resume, "finish": resume}
    typed = {"data": "faces", "space": space, "results": tmp_path, "time_budget": "90m", "until_gain": "0.25/h"}
    folders = {"warm_start": ["first", Path("second")], "weights_dir": Path("weights")}
    given = plain | flags | typed | folders
    assert given.keys() == inspect.signature(studies.search).parameters.keys()
    with pytest.raises(UserError):  # no study is made
        raytune_emotion.search(**given)
    assert vars(asked[0]) == plain | flags | {
        "data": Folder(Path("faces")),
        "space": None if resume else space,
        "results": Folder(tmp_path),
        "time_budget": timedelta(minutes=90),
        "until_gain": 0.25,
        "warm_start": [Folder(Path("first")), Folder(Path("second"))],
        "weights_dir": Path("weights"),
        "dry_run": False,
    }


def test_a_space_may_hold_numbers_of_numpy_and_paths(tmp_path):
    space = {
        "model.backbone": "resnet18",
        "model.weights_dir": tmp_path,
        "optim.lr": {"log_uniform": np.array([1e-4, 1e-2])},
        "train.batch_size": {"choice": [np.int64(32), 64]},
    }
    with studies._space_file(space) as file:
        read = YAML(typ="safe").load(file)
    assert read == {
        "model.backbone": "resnet18",
        "model.weights_dir": str(tmp_path),
        "optim.lr": {"log_uniform": [1e-4, 1e-2]},
        "train.batch_size": {"choice": [32, 64]},
    }
    with pytest.raises(UserError, match=r"space: cannot represent an object: .*; give texts, numbers, lists and dicts"):
        raytune_emotion.search(tmp_path / "faces", {"optim.lr": object()}, results=tmp_path)
    with pytest.raises(UserError, match="space: a number has too many digits; give a smaller one"):
        raytune_emotion.search(tmp_path / "faces", {"optim.lr": 10**5000}, results=tmp_path)


def test_a_space_may_have_a_name_that_a_study_cannot_have(tmp_path, asked):
    (tmp_path / "my space.yaml").touch()
    for _ in range(2):
        with pytest.raises(UserError, match="my_space_"):  # no study is made
            raytune_emotion.search(space=tmp_path / "my space.yaml", results=tmp_path)
    first, second = (request.name for request in asked)
    assert first.startswith("my_space_2")
    assert first != second, "searches that begin at once have names of their own"


@pytest.mark.usefixtures("without_ray", "no_plots")
def test_a_search_returns_its_study_and_goes_on(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "run_command", command_main)  # in this process, which has no Ray
    space = {"model.backbone": "test_resnet", "optim.lr": {"log_uniform": [1e-3, 1e-2]}, "data.image_size": 32}
    options = {"results": tmp_path, "name": "small", "concurrency": 2}
    study = raytune_emotion.search(faces, space, trials=2, epochs=1, **options)
    assert study.location.path == tmp_path / "small"
    assert len(study.trials) == 2
    assert study.trials["optim.lr"].between(1e-3, 1e-2).all()
    again = raytune_emotion.search(trials=3, resume=True, scheduler="freeze-thaw", **options)
    assert len(again.trials) == 3
    assert again.model()(torch.rand(1, 3, 32, 32)).shape == (1, 13)
