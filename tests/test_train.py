"""The command train: one configuration, from the command line to its export."""

import contextlib
import dataclasses
import json
import pickle
import re
import shutil
import socket

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from raytune_emotion.config import RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn import checkpoint
from raytune_emotion.learn.loop import batch_faults
from raytune_emotion.learn.run_folder import BEST, LAST, read_history
from raytune_emotion.storage.atomic import LOCK, exclusive_lock
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.execution import cluster, cluster_nodes, worker_group
from raytune_emotion.tuning.execution.job import InvalidForRun, OutOfMemory, train_here
from raytune_emotion.tuning.execution.placement import Demand, Placement
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.session import single_run
from raytune_emotion.tuning.session.single_run import Workers, train_single
from raytune_emotion.tuning.study.remote_copy import DRIVER, RemoteCopy
from raytune_emotion.tuning.study.trials import is_taken
from tests.support.cluster import DyingWorkers, joined_session
from tests.support.commands import exit_code, refusal
from tests.support.reports import without_clocks
from tests.support.studies import write_study
from tests.support.training import run_config


@pytest.fixture(autouse=True)
def one_core():
    """Two threads that wait for each other crawl where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained(tmp_path, faces, store):
    """Trains for an epoch, on the generated faces of the tests, unless it is said otherwise; returns the exit code."""

    def run(*argv, data=True):
        given = ["--data", faces] if data else []
        return exit_code(["train", "--results", tmp_path / "results", *given, *argv])

    return run


@pytest.fixture
def refused(tmp_path, own_cache, store, faces, capsys):
    """Runs a training that must refuse; all of it is right but what is said otherwise."""

    def run(*argv, data=faces):
        given = ["--results", tmp_path / "results", "--set", "model.backbone=test_resnet"]
        given += ["--data", data] if data else []
        return refusal(capsys, [tmp_path, own_cache / "raytune_emotion"], "train", *given, *argv)

    return run


TINY = ("--set", "model.backbone=test_resnet", "--epochs")


def test_a_run_from_its_settings_to_its_export(trained, tmp_path, capsys):
    assert trained(*TINY, 2, "--set", "loss.kl=0.25", "--set", "loss.js=0.75", "--set", "optim.lr=3e-3") == 0
    folder = tmp_path / "results" / "test_resnet_kl0.25-js0.75"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == f"run {folder}: 96 training and 33 validation images"
    assert [line[:12] for line in lines[1:3]] == ["epoch  1.00 ", "epoch  2.00 "]
    history = read_history(folder)
    best = min(report["val_js"] for report in history)
    assert len(history) == 2
    assert any(line.startswith(f"best JS     {best:.4f} bits (KL ") for line in lines)
    assert any(re.fullmatch(r"baseline    0\.\d{4} bits, predicting the training mean", line) for line in lines)
    assert lines[-1] == f"next: python -m raytune_emotion.predict {folder / 'best'} FACE.jpg"

    settings = json.loads((folder / "params.json").read_text())
    assert RunConfig.from_flat(settings).loss.weights == {"kl": 0.25, "js": 0.75}
    assert (settings["optim.lr"], settings["data.image_size"], settings["train.epochs"]) == (3e-3, 32, 2)
    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 13)


def test_a_run_goes_on_by_its_name(trained, refused, tmp_path, capsys):
    assert trained(*TINY, 1, "--set", "optim.lr=2e-3", "--name", "mine") == 0
    folder = tmp_path / "results" / "mine"
    first = read_history(folder)
    assert refused("--name", "mine") == [
        f"{folder}: a run of this name exists already; continue it with --resume, or choose another --name"
    ]
    with exclusive_lock(folder):
        assert refused("--resume", "--name", "mine") == [
            f"{folder}: another process is using it; wait until it ends, or end it"
        ]
    # Its settings and its data are its own: none need be said again, and none can be changed.
    assert trained("--resume", "--name", "mine", "--epochs", 3, data=False) == 0
    history = read_history(folder)
    assert [report["epoch"] for report in history] == [1, 2, 3]
    assert history[0] == first[0]
    assert history[-1]["lr"] == 2e-3
    capsys.readouterr()
    assert trained("--resume", "--name", "mine", "--set", "optim.lr=0.5", "--set", "optim.name=sgd") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f"error: {folder}: the run there began with optim.name = adamw, not sgd")
    (folder / "best" / "notes.txt").touch()
    assert trained("--resume", "--name", "mine", "--epochs", 4) == 2
    assert f"{folder / 'best'}: holds files that do not belong to an export (notes.txt)" in capsys.readouterr().err
    assert read_history(folder) == history, "it is said before anything is trained"
    (folder / "best" / "notes.txt").unlink()
    (folder / "data.txt").write_text(f"{tmp_path / 'gone'}\n")
    assert trained("--resume", "--name", "mine", data=False) == 2
    assert "gone: the packed data of the run are missing; name the data with --data" in capsys.readouterr().err
    # A run that has ended ends again.
    capsys.readouterr()
    assert trained("--resume", "--name", "mine") == 0
    assert read_history(folder) == history
    said = "nothing was trained: the run had used up its epochs or its patience before"
    assert capsys.readouterr().out.splitlines()[1] == said


def test_a_run_is_locked_until_it_is_exported(trained, monkeypatch):
    """Slurm may start its job again before the first one has written its export."""
    write, tried = single_run.write_package, []

    def write_package(dest, *given, **named):
        with pytest.raises(UserError, match="another process is using it"), exclusive_lock(dest.parent):
            pass
        tried.append(dest)
        write(dest, *given, **named)

    monkeypatch.setattr(single_run, "write_package", write_package)
    assert trained(*TINY, 1) == 0
    assert len(tried) == 1


@pytest.mark.long
def test_a_run_at_a_uri_goes_on_elsewhere_bit_for_bit(trained, tmp_path, monkeypatch, capsys):
    assert trained(*TINY, 3, "--name", "mine") == 0
    expected = tmp_path / "results" / "mine"
    results = Remote((tmp_path / "place").as_uri())
    run = results / "mine"
    at_uri = ["--results", results, "--name", "mine"]

    def interrupted(job):
        yield next(train_here(job))
        raise KeyboardInterrupt

    def continued_elsewhere(job):
        for report in train_here(job):
            RemoteCopy(tmp_path, run).claim()
            yield report

    with monkeypatch.context() as patched:
        patched.setattr(single_run, "train_here", interrupted)
        assert trained(*TINY, 3, *at_uri) == 130
        out = capsys.readouterr().out
        assert f"exported    {run / 'best'}\n" in out
        assert out.endswith(f"to continue: python -m raytune_emotion.train --resume --results {results} --name mine\n")
        after_one = {name for name in run.find("*") if "tfevents" not in name}
        assert trained(*TINY, 3, *at_uri) == 2
        assert f"{run}: a run of this name exists already; continue it with" in capsys.readouterr().err
        with exclusive_lock(run.working_folder()):
            assert trained("--resume", *at_uri, data=False) == 2
        assert "another process is using it" in capsys.readouterr().err

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        patched.setattr(single_run, "train_here", continued_elsewhere)
        assert trained("--resume", *at_uri, data=False) == 1
        assert f"error: {run}: another process has taken over" in capsys.readouterr().err
    assert trained("--resume", *at_uri, data=False) == 0
    assert {name for name in run.find("*") if "tfevents" not in name} == after_one
    with run.copy_here("*") as found:
        assert without_clocks(read_history(found)) == without_clocks(read_history(expected))
        for name in (LAST, BEST, "best/model.safetensors"):
            weights, wanted = load_file(found / name), load_file(expected / name)
            assert weights.keys() == wanted.keys()
            assert all(torch.equal(weights[key], wanted[key]) for key in wanted), name
    driver = run.read(DRIVER)
    assert trained("--resume", *at_uri, "--set", "optim.lr=0.5") == 2
    assert run.read(DRIVER) == driver, "a request that is refused ends no process at work"
    assert trained("--resume", "--results", results, "--name", "none") == 2
    assert f"{results / 'none'}: no run of this name to resume; choose one of mine" in capsys.readouterr().err


def test_a_folder_of_links_or_of_empty_folders_is_taken(trained, tmp_path, capsys):
    for name, make in (("links", lambda path: path.symlink_to(tmp_path)), ("empty", lambda path: path.mkdir())):
        entry = tmp_path / "results" / name / "train_set"
        entry.parent.mkdir(parents=True)
        make(entry)
        assert trained(*TINY, 1, "--name", name) == 2
        assert "this name is taken, but not by a run of train" in capsys.readouterr().err
        assert entry.is_dir()


@pytest.mark.usefixtures("without_locks")
def test_a_run_taken_over_by_another_process_ends_where_files_have_no_locks(trained, tmp_path, monkeypatch, capsys):
    def taken_over(job):
        for report in train_here(job):
            with exclusive_lock(folder) as other:
                other.claim()
                yield report

    folder = tmp_path / "results" / "mine"
    with monkeypatch.context() as patched:
        patched.setattr(single_run, "train_here", taken_over)
        assert trained(*TINY, 2, "--name", "mine") == 1
    assert f"error: {folder}: another process has taken over" in capsys.readouterr().err
    assert len(read_history(folder)) == 1
    with exclusive_lock(folder) as at_work:
        at_work.claim()
        for refused in (["--set", "optim.lr=0.5"], ["--set", "train.accumulate=1000"], ["--gpus-per-worker", 1]):
            assert trained("--resume", "--name", "mine", *refused) == 2
        assert trained(*TINY, 2, "--name", "mine") == 2
        assert at_work.is_held(), "a request that is refused ends no process at work"
        assert trained("--resume", "--name", "mine") == 0
        assert not at_work.is_held()


@pytest.mark.usefixtures("without_locks")
def test_a_new_run_leaves_the_files_of_a_process_that_has_taken_over(tmp_path):
    copy = RemoteCopy(tmp_path, Folder(tmp_path))
    with exclusive_lock(tmp_path) as lock, single_run._new_run(copy, lock):
        assert lock.claim()
        (tmp_path / "params.json").write_text("{}")
        with exclusive_lock(tmp_path) as other:
            assert other.claim()
    assert (tmp_path / "params.json").exists()


def test_a_run_at_a_uri_without_a_checkpoint_is_taken_back_by_its_own_process_alone(tmp_path):
    run = Remote((tmp_path / "place").as_uri())
    first, second = (RemoteCopy(tmp_path / name, run) for name in ("first", "second"))
    for copy in (first, second):
        copy.folder.mkdir()
    with exclusive_lock(first.folder) as lock, single_run._new_run(first, lock):
        first.claim()
        assert not is_taken(run), "a killed process would hold no name"
        with run.write("params.json") as file:
            file.write_text("{}")
        assert is_taken(run)
    assert run.find("*") == []
    assert not first.folder.exists()
    first.folder.mkdir()
    with exclusive_lock(first.folder) as lock, single_run._new_run(first, lock):
        first.claim()
        second.claim()
    assert run.find("*") == [DRIVER]


def test_a_run_that_was_killed_before_it_noted_its_data_asks_for_them(trained, refused, tmp_path):
    (tmp_path / "results" / "mine").mkdir(parents=True)
    (tmp_path / "results" / "mine" / "params.json").write_text('{"model.backbone": "test_resnet", "train.epochs": 1}')
    (sentence,) = refused("--name", "mine", "--resume", data=None)
    assert sentence.endswith("mine: the packed data of the run are missing; name the data with --data")
    assert trained("--name", "mine", "--resume") == 0


def test_losses_that_are_named_replace_those_of_the_file(trained, tmp_path):
    (tmp_path / "config.yaml").write_text("model.backbone: test_resnet\nloss.mse: 1\ntrain.epochs: 3\n")
    options = ["--config", tmp_path / "config.yaml", "--set", "loss.js=1", "--epochs", 1, "--seed", 7]
    assert trained(*options) == 0
    settings = json.loads((tmp_path / "results" / "test_resnet_js" / "params.json").read_text())
    assert (settings["loss.mse"], settings["loss.js"]) == (0, 1)
    assert (settings["train.epochs"], settings["train.seed"]) == (1, 7)


def test_a_recipe_that_is_named_replaces_the_augmentation_of_the_file(trained, tmp_path):
    """The file has every setting, as a run leaves it."""
    config = run_config(augment__recipe="light", augment__grey=0.7, train__epochs=1)
    (tmp_path / "params.json").write_text(json.dumps(config.to_flat()))
    options = ["--config", tmp_path / "params.json", "--set", "augment.recipe=strong", "--set", "augment.erase=0.9"]
    assert trained(*options, "--name", "strong") == 0
    settings = json.loads((tmp_path / "results" / "strong" / "params.json").read_text())
    strong = run_config(augment__recipe="strong", augment__erase=0.9)
    assert RunConfig.from_flat(settings).augment == strong.augment
    # The same command goes on.
    assert trained(*options, "--name", "strong", "--resume") == 0


@pytest.fixture(scope="module")
def study(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("results of a study") / "study"
    write_study(folder, store)
    return folder


class TestFromAStudy:
    def test_its_best_trial_is_trained_on_its_data(self, trained, study, tmp_path, capsys):
        assert trained("--study", study, "--epochs", 1, "--name", "final", data=False) == 0
        # The sample that stands in where nothing is named has 2000 images.
        assert "96 training and 33 validation images" in capsys.readouterr().out
        best = (study / "trials.csv").read_text().splitlines()[1][:4]
        wanted = json.loads((study / "trials" / best / "params.json").read_text())
        settings = json.loads((tmp_path / "results" / "final" / "params.json").read_text())
        assert {name: settings[name] for name in wanted} == wanted | {"train.epochs": 1}

    def test_a_trial_can_be_named_and_changed(self, trained, study, tmp_path):
        asked = ["--study", study, "--trial", "2", "--set", "optim.lr=0.004", "--name", "third", "--epochs", 1]
        assert trained(*asked) == 0
        wanted = json.loads((study / "trials" / "0002" / "params.json").read_text())
        settings = json.loads((tmp_path / "results" / "third" / "params.json").read_text())
        assert settings["model.backbone"] == wanted["model.backbone"]
        assert settings["loss.kl"] == wanted["loss.kl"]
        assert settings["optim.lr"] == 0.004 != wanted["optim.lr"]

    def test_what_it_does_not_have(self, refused, study, tmp_path, no_other_studies):
        (told,) = refused("--study", study, "--trial", "0009")
        assert told == f"{study}: no trial 0009; there are 0000 to 0002"
        (told,) = refused("--trial", "0009")
        assert told == "--trial 0009: requires --study; name the folder of the study"
        (told,) = refused("--study", tmp_path)
        assert told == f"{tmp_path}: not a study, because it has no study.yaml; name a folder that a search has made"

    def test_its_data_are_gone(self, study, tmp_path, capsys):
        copy = tmp_path / "study"
        shutil.copytree(study, copy)
        options = ["--study", copy, "--set", "data.image_size=48", "--results", tmp_path / "results"]
        (told,) = refusal(capsys, [tmp_path], "train", *options)
        assert told.endswith("the packed images of 48 px are missing; name the data with --data")


class TestBadSettings:
    @pytest.mark.parametrize(
        ("assignment", "said"),
        [
            ("nonsense", "--set nonsense: expected KEY=VALUE, such as optim.lr=1e-3"),
            ("=3", "--set =3: expected KEY=VALUE, such as optim.lr=1e-3"),
            ("optim.lr=", "optim.lr: should be a valid number, got None"),
            ("optim.lr=fast", "optim.lr: should be a valid number, got 'fast'"),
            ("optim.lr=.nan", "optim.lr: should be"),
            ("optim.lr=[", "--set optim.lr=[: '[' is not a plain value"),
            ("optim.lr=2026-99-99", "--set optim.lr=2026-99-99: '2026-99-99' is not a plain value"),
            ("optim.lr=!!python/name:os.system", "is not a plain value"),
            ("optim.momentun=0.9", "optim.momentun: unknown setting; did you mean optim.momentum?"),
            ("loss.hinge=1", "loss.hinge: unknown setting"),
            ("loss.kl=0.5", "loss: the weights of the mixture must sum to 1, but their sum is 0.5"),
            ("model.backbone=resnet81", "resnet81: no such timm model; did you mean"),
            ("data.classes=happy", "data.classes: should be a valid tuple, got 'happy'"),
            ("data.image_size=8", "data.image_size: should be greater than or equal to 16, got 8"),
            ("optim.warmup_epochs=40", "optim.warmup_epochs: less than train.epochs (30), got 40"),
        ],
    )
    def test_a_setting_that_is_none(self, refused, assignment, said):
        (told,) = refused("--set", assignment)
        assert said in told

    def test_all_of_them_at_once(self, refused, tmp_path):
        assert len(refused("--set", "x", "--set", "optim.lr=[", "--trial", "1", "--config", tmp_path / "none")) == 4
        assert len(refused("--set", "x=1", "--set", "optim.lr=0", "--set", "model.dropout=2")) == 3

    def test_wrong_settings_hide_no_other_error(self, refused, tmp_path, no_other_studies):
        wrong = ["--set", "optim.lr=-1", "--set", "model.backbone=zz"]
        (tmp_path / "file").touch()
        told = refused(*wrong, "--address", "bad:1", "--results", tmp_path / "file" / "x", data=tmp_path / "nope")
        begins = [
            "optim.lr: ",
            "model.backbone: zz",
            f"{tmp_path / 'file'}",
            "--address bad:1: ",
            f"{tmp_path / 'nope'}: ",
        ]
        assert all(any(line.startswith(begin) for line in told) for begin in begins)
        assert len(told) == len(begins)

    @pytest.mark.parametrize("source", [("--study", "none"), ("--resume", "--name", "none")])
    def test_a_missing_source_of_settings_hides_no_other_error(self, refused, tmp_path, source, no_other_studies):
        """Its settings are unknown, so nothing is said on how they fit together with the others."""
        wrong = ["--set", "optim.lr=-1", "--set", "optim.warmup_epochs=40", "--set", "x.y=1"]
        told = refused(*source, *wrong, data=tmp_path / "nope")
        begins = ["optim.lr: ", "x.y: unknown setting", f"{tmp_path / 'nope'}: "]
        assert all(any(line.startswith(begin) for line in told) for begin in begins)
        assert len(told) == len(begins) + 1

    @pytest.mark.parametrize(
        "option",
        ["--workers=0", "--workers=two", "--gpus-per-worker=nan", "--name=../up", "--name=", "--epochs=x", "--seed=-1"],
    )
    def test_a_value_that_is_none(self, refused, option):
        (told,) = refused(option)
        assert option.partition("=")[0].lstrip("-").partition("-")[0] in told

    @pytest.mark.parametrize("text", [b"", b"- a\n", b"optim.lr: [\n", b"1: 2\n", b"\xff\xd8\xff"])
    def test_a_file_without_settings(self, refused, tmp_path, text):
        (tmp_path / "config.yaml").write_bytes(text)
        (told,) = refused("--config", tmp_path / "config.yaml")
        assert told.startswith(f"{tmp_path / 'config.yaml'}:")

    def test_a_file_that_says_a_setting_twice(self, refused, tmp_path):
        (tmp_path / "config.yaml").write_text("optim.lr: 1e-3\noptim.lr: 1e-4\n")
        (told,) = refused("--config", tmp_path / "config.yaml")
        assert told.startswith(f'{tmp_path / "config.yaml"}:2: not valid YAML: found duplicate key "optim.lr" with ')
        assert told.endswith("; correct the file")


class TestBadRequests:
    def test_results_that_are_a_file(self, refused, tmp_path):
        (tmp_path / "results").touch()
        assert refused() == [f"{tmp_path / 'results'}: is not a folder; name another path"]

    def test_what_is_no_run_cannot_go_on(self, refused, tmp_path):
        (tmp_path / "results" / "empty").mkdir(parents=True)
        for name in ("empty", "none"):
            assert refused("--resume", "--name", name) == [
                f"{tmp_path / 'results' / name}: no run of this name to resume; name its folder with --results"
            ]

    def test_a_gpu_that_is_not_here(self, refused, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert refused("--gpus-per-worker", "1") == [
            "--gpus-per-worker 1: this machine has no GPU that PyTorch can use; use "
            "--gpus-per-worker 0 to train on cores"
        ]

    @pytest.mark.parametrize("options", [[], ["--gpus-per-worker", 1], ["--workers", 2]])
    def test_a_gpu_below_an_old_driver(self, refused, broken_gpu, options):
        """Without a word, one worker would train on the CPU."""
        assert refused(*options) == [broken_gpu]

    def test_a_cluster_that_is_not_there(self, refused):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            (told,) = refused("--workers", "2", "--address", address)
        assert told.startswith(f"--address {address}: no Ray cluster answers there (")

    def test_cluster_that_the_workers_do_not_fit_is_refused_before_data_are_packed(self, refused, monkeypatch):
        def refuse(address, demand):
            raise UserError(f"{demand} on {address}")

        monkeypatch.setattr(cluster, "check_cluster", lambda address: None)
        monkeypatch.setattr(cluster_nodes, "check_fit", refuse)
        demand = Demand(workers=2, gpus_per_worker=1.0, concurrency=1)
        assert refused("--address=auto", "--workers=2", "--gpus-per-worker=1") == [f"{demand} on auto"]

    def test_a_model_that_cannot_be_built_leaves_the_name_free(self, refused, tmp_path):
        (told,) = refused("--set", "model.backbone=efficientformer_l1")
        assert told.startswith("model.backbone: efficientformer_l1 cannot take images of 32 px (data.image_size)")

    def test_pretrained_weights_that_do_not_do(self, refused, tmp_path):
        (told,) = refused("--weights-dir", tmp_path)
        assert told.startswith(f"model.weights_dir: no file {tmp_path / 'test_resnet.safetensors'}")
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / "test_resnet.safetensors")
        told = refused("--weights-dir", tmp_path)
        assert told
        assert all("test_resnet.safetensors does not fit test_resnet" in line for line in told)
        (tmp_path / "test_resnet.safetensors").write_bytes(b"junk")
        (told,) = refused("--weights-dir", tmp_path)
        assert "test_resnet.safetensors cannot be read as safetensors" in told

    def test_data_of_other_classes(self, refused):
        told = refused("--set", "data.classes=[calm, tense]")
        assert "(13 values for 2 classes)" in told[0]


def test_a_run_is_continued_by_as_many_workers_as_before(trained, monkeypatch):
    assert trained(*TINY, 1, "--name", "mine") == 0
    workers = []

    def read(folder, real=checkpoint.read_progress):
        progress = real(folder)
        return dataclasses.replace(progress, history=({**progress.history[-1], "workers": 2},))

    monkeypatch.setattr(checkpoint, "read_progress", read)
    monkeypatch.setattr(single_run, "train_single", lambda place, config, store, own, **_: workers.append(own.count))
    assert trained("--resume", "--name", "mine", data=False) == 0
    assert trained("--resume", "--name", "mine", "--workers", 1, data=False) == 0
    assert workers == [2, 1]


def test_weights_that_are_not_used_are_named(trained, tmp_path, capsys):
    assert trained(*TINY, 1, "--weights-dir", tmp_path, "--set", "model.pretrained=false") == 0
    told = f"--weights-dir {tmp_path}: model.pretrained is false, so training begins with random weights"
    assert told in capsys.readouterr().err.splitlines()


def test_a_configuration_that_two_workers_cannot_train_is_the_users_fault(trained, tmp_path, capsys, monkeypatch):
    """Their processes send it; real ones do in `machines/test_commands_at_uri.py`."""
    closed = []

    class RefusingWorkers:
        def __init__(self, first, while_waiting):
            assert first.resources.workers == 2

        def train(self, job):
            faults = batch_faults(RunConfig.from_flat(job.settings), 96, 2)
            raise pickle.loads(pickle.dumps(InvalidForRun(tuple(faults))))
            yield

        def close(self):
            closed.append(True)

    monkeypatch.setattr(worker_group, "Workers", RefusingWorkers)
    monkeypatch.setattr(single_run, "ray_session", joined_session)
    monkeypatch.setattr(single_run, "fit_to_cluster", lambda demand: Placement(Resources(2, 1.0, 0.0), 1))
    asked = ["--workers", 2, "--set", "train.batch_size=3", "--set", "train.accumulate=2"]
    assert trained(*TINY, 1, *asked) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: train.batch_size: 3 rows are too few for 2 micro-batches (train.accumulate) for ")
    assert err.count("\n") == 1
    assert not [*(tmp_path / "results").iterdir()]
    assert closed


def test_a_training_whose_workers_die_again_and_again_ends_with_a_sentence(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker_group, "Workers", DyingWorkers)
    monkeypatch.setattr(single_run, "ray_session", joined_session)
    monkeypatch.setattr(single_run, "fit_to_cluster", lambda demand: Placement(Resources(2, 1.0, 0.0), 1))
    assert trained(*TINY, 1, "--workers", 2, "--name", "mine") == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'results' / 'mine'}: the training failed: its workers died 4 times without a new report "
        f"(OSError: the actor died); find out why in Ray's logs, then continue with --resume\n"
    )


def test_an_interruption_before_the_first_report_leaves_the_name_free(trained, tmp_path, monkeypatch):
    def interrupted(job):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patched:
        patched.setattr(single_run, "train_here", interrupted)
        assert trained(*TINY, 1, "--name", "mine") == 130
    assert trained(*TINY, 1, "--name", "mine") == 0


def test_machine_that_does_not_see_the_run_makes_no_folder(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results" / "mine"

    def on_another_machine(job):
        folder.rename(tmp_path / "elsewhere")
        yield from train_here(job)

    monkeypatch.setattr(single_run, "train_here", on_another_machine)
    assert trained(*TINY, 1, "--name", "mine") == 1
    assert f"{folder}: there is no {LOCK} in it; put the results where " in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("advise", [True, False])
def test_an_interrupted_run_says_how_it_goes_on_unless_its_caller_does(tmp_path, store, monkeypatch, capsys, advise):
    def interrupted(job):
        yield next(train_here(job))
        raise KeyboardInterrupt

    monkeypatch.setattr(single_run, "train_here", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_single(Folder(tmp_path / "run"), run_config(), store, Workers(1, 0.0, None), fresh=True, advise=advise)
    assert ("to continue: " in capsys.readouterr().out) == advise


def test_a_cluster_that_is_named_trains_one_worker_too(tmp_path, store, monkeypatch):
    """This machine may have no GPU."""
    asked = []
    monkeypatch.setattr(single_run, "_train_on_cluster", lambda console, workers, *_, **__: asked.append(workers))
    monkeypatch.setattr(single_run, "train_here", lambda job: pytest.fail("it is trained here"))
    monkeypatch.setattr(single_run, "_conclude", lambda *_, **__: None)
    train_single(Folder(tmp_path / "run"), run_config(), store, Workers(1, 1.0, "auto"), fresh=True)
    assert asked == [Workers(1, 1.0, "auto")]


@pytest.mark.parametrize("at_work", [True, False])
def test_a_run_that_has_taken_the_name_meanwhile_is_left_as_it_is(tmp_path, store, at_work):
    """Its name was free when the other command looked, which may be ten seconds before Ray has started."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    with exclusive_lock(folder) if at_work else contextlib.nullcontext(), pytest.raises(UserError) as raised:
        train_single(Folder(folder), run_config(), store, Workers(1, 0.0, None), fresh=True)
    said = "another process is using it" if at_work else "a run of this name exists already"
    assert str(raised.value).startswith(f"{folder}: {said}")
    assert (folder / "params.json").exists()


def test_a_training_out_of_memory_goes_on_in_smaller_micro_batches(trained, tmp_path, monkeypatch, capsys):
    whole = single_run.train_here

    def with_little_memory(job):
        if job.settings.get("train.accumulate", 1) == 1:
            raise OutOfMemory("out of memory on the device: DefaultCPUAllocator: can't allocate memory")
        yield from whole(job)

    monkeypatch.setattr(single_run, "train_here", with_little_memory)
    assert trained(*TINY, 1, "--name", "small") == 0
    assert [report["accumulate"] for report in read_history(tmp_path / "results" / "small")] == [2]


def test_a_training_that_diverges_is_no_fault_of_the_command_line(trained, tmp_path, capsys):
    assert trained(*TINY, 30, "--set", "optim.name=sgd", "--set", "optim.lr=100", "--name", "wild") == 1
    err = capsys.readouterr().err
    assert "wild: the training failed: diverged before report" in err
    assert "Traceback" not in err


def test_run_that_was_killed_before_it_wrote_anything_holds_no_name(tmp_path):
    assert not is_taken(Folder(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    assert not is_taken(Folder(tmp_path / "run"))
    (tmp_path / "run" / "params.json").touch()
    assert is_taken(Folder(tmp_path / "run"))
    (tmp_path / "file").touch()
    assert is_taken(Folder(tmp_path / "file"))


def test_a_run_that_cannot_be_made_is_one_sentence(tmp_path, faces, capsys):
    """The file system of the kernel looks like one that can be written to."""
    argv = ["train", "--data", faces, "--results", "/proc", "--name", "run", "--set", "model.backbone=test_resnet"]
    assert exit_code(argv) in (1, 2)
    err = capsys.readouterr().err
    assert "error: /proc" in err
    assert "Traceback" not in err
