"""The command search: what it refuses, and one whole study as a user runs it."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from raytune_emotion import search
from raytune_emotion.cli import folder_name
from raytune_emotion.data.prepare import find_data
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.run_folder import read_history
from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.storage.locations import Folder, parse_location
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution import cluster_nodes, placement
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.policy.objective import BY_SIZE
from raytune_emotion.tuning.policy.portfolio import PORTFOLIO
from raytune_emotion.tuning.policy.warm_start import EARLIER
from raytune_emotion.tuning.report import dry_run
from raytune_emotion.tuning.session import run_search, search_inputs
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study import earlier
from raytune_emotion.tuning.study.creation import new_spec, resumed_spec
from raytune_emotion.tuning.study.open_study import load, make_study, open_existing, open_study
from raytune_emotion.tuning.study.optuna_study import create_study, study_lock
from raytune_emotion.tuning.study.records import KEPT
from raytune_emotion.tuning.study.remote_copy import TAKEN_OVER, RemoteCopy
from raytune_emotion.tuning.study.request import SearchRequest, name_study
from raytune_emotion.tuning.study.spec import read_spec, write_spec
from tests.support.cluster import joined_session
from tests.support.commands import exit_code, refusal
from tests.support.faces import write_folder, write_row
from tests.support.folders import tree
from tests.support.studies import SMALL_SPACE, run_here, searcher_of, spec_of, write_study


@pytest.fixture
def space(tmp_path):
    """Writes a search space."""

    def write(text: str = SMALL_SPACE, name: str = "space.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def sessions(monkeypatch):
    """The Ray sessions that a search has begun: none is real, and no study may be made in one."""
    begun = []

    def begin(address, **options):
        begun.append(address)
        return joined_session(address)

    monkeypatch.setattr(cluster_module, "ray_session", begin)
    monkeypatch.setattr(cluster_nodes, "fit_to_cluster", lambda demand: pytest.fail("nothing is refused"))
    return begun


@pytest.fixture
def refused(tmp_path, own_cache, store, faces, space, capsys, sessions):
    """Runs a search that must refuse before it makes a study; all of it is right but what is said otherwise."""

    def run(*argv, **options) -> list[str]:
        given = {"data": faces, "space": options.get("space") or space(), "results": tmp_path / "results"} | options
        line = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
        return refusal(capsys, [tmp_path, own_cache / "raytune_emotion"], "search", *line, *argv)

    return run


def uniform_but(value):
    return ",".join([value, *["0.0769231"] * 12]) + "\n"


#: What can be wrong with a row: how it is made so, and what is said of it.
BAD_ROWS = {
    "count": (",".join(["0.125"] * 8), "wrong number of values (1 file): train_set/annotations/{id}_prob_rank.txt (8"),
    "not a number": (uniform_but("nan"), "values that are not finite (1 file): train_set/annotations/{id}_prob_rank"),
    "negative": (uniform_but("-0.2"), "negative values (1 file): train_set/annotations/{id}_prob_rank.txt"),
    "sum": (uniform_but("-0.0") + "", "sum is not one (1 file): train_set/annotations/{id}_prob_rank.txt (0.923"),
    "text": (uniform_but("happy"), "text in place of numbers (1 file): train_set/annotations/{id}_prob_rank.txt"),
    "empty": ("", "empty annotation (1 file): train_set/annotations/{id}_prob_rank.txt"),
    "torn image": (None, "image cannot be decoded (1 file): train_set/images/{id}.png"),
    "no image": (None, "annotation without an image (1 file): train_set/annotations/{id}_prob_rank.txt"),
}


def spoil(folder: Path, fault: str, id_: str) -> str:
    """Makes one row of a folder faulty, and returns what must be said of it."""
    text, sentence = BAD_ROWS[fault]
    write_row(folder, "train", id_, **({} if text is None else {"text": text}))
    image = folder / "train_set" / "images" / f"{id_}.png"
    if fault == "torn image":
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    if fault == "no image":
        image.unlink()
    return f"{folder}: {sentence.format(id=id_)}"


def command_on(verb: str, data: Path, results: Path, space: Path) -> list[str]:
    if verb == "pack":
        return ["pack", str(data), str(results), "--image-size", "32"]
    rest = ["--space", str(space)] if verb == "search" else ["--set", "model.backbone=test_resnet"]
    return [verb, "--data", str(data), "--results", str(results), *rest]


@pytest.mark.usefixtures("sessions")
class TestBadData:
    @pytest.mark.parametrize("fault", BAD_ROWS)
    @pytest.mark.parametrize("verb", ["pack", "search", "train"])
    def test_a_faulty_row_is_named(self, tmp_path, own_cache, space, capsys, verb, fault):
        data = write_folder(tmp_path / "faces")
        sentence = spoil(data, fault, "77")
        argv = command_on(verb, data, tmp_path / "results", space())
        told = refusal(capsys, [tmp_path, own_cache / "raytune_emotion"], *argv)
        assert len(told) == 2
        assert told[0].startswith(sentence)
        assert told[1].startswith(f"{data}: nothing is packed because of these faults")

    @pytest.mark.parametrize("verb", ["pack", "search", "train"])
    def test_all_faulty_rows_are_named_at_once(self, tmp_path, own_cache, space, capsys, verb):
        data = write_folder(tmp_path / "faces")
        sentences = {spoil(data, fault, str(70 + i)) for i, fault in enumerate(BAD_ROWS)}
        argv = command_on(verb, data, tmp_path / "results", space())
        told = refusal(capsys, [tmp_path, own_cache / "raytune_emotion"], *argv)
        assert len(told) == len(BAD_ROWS) + 1
        for sentence in sentences:
            assert sum(line.startswith(sentence) for line in told) == 1

    @pytest.mark.parametrize("verb", ["pack", "search", "train"])
    def test_what_is_no_dataset(self, tmp_path, own_cache, faces, space, capsys, verb):
        folders = [tmp_path, own_cache / "raytune_emotion"]
        told = refusal(capsys, folders, *command_on(verb, faces / "train_set", tmp_path / "results", space()))
        assert len(told) == 1
        assert "not a folder in the layout of AffectNetFused, which has train_set/annotations" in told[0]
        told = refusal(capsys, folders, *command_on(verb, tmp_path / "none", tmp_path / "results", space()))
        assert told == [f"{tmp_path / 'none'}: no such folder; name an existing one"]

    def test_classes_that_are_not_those_of_the_data(self, refused, space):
        told = refused(space=space(f"{SMALL_SPACE}data.classes: [calm, tense]\n"))
        assert "(13 values for 2 classes)" in told[0]
        assert "expected one value for each of the 2 classes calm, tense" in told[0]
        for classes in ("calm", "[calm]", "[1, 2]"):
            told = refused(space=space(f"{SMALL_SPACE}data.classes: {classes}\n"))
            assert told
            assert all("space.yaml:5: data.classes" in line for line in told)

    def test_a_store_of_another_size(self, refused, space, store):
        told = refused(data=store.path, space=space(SMALL_SPACE.replace("32", "48")))
        assert len(told) == 1
        assert "holds images of 32 px, but data.image_size is 48; set data.image_size to 32" in told[0]


class TestBadStorage:
    @pytest.fixture
    def url(self, postgres):
        return postgres.new_database()

    def test_every_error_of_a_shared_study_is_said_at_once(self, refused, tmp_path):
        away = "postgresql://127.0.0.1:1/studies"
        told = refused("--finish", storage=away, data=tmp_path / "none")
        assert len(told) == 4
        assert told[0].startswith("--storage: drivers find their study by its name")
        assert told[1].startswith("--finish: only one process can finish a study")
        assert told[1].endswith("; leave it out, and at the end type --resume --finish without --storage")
        assert told[2].startswith(f"{away}: cannot be opened (")
        assert told[3] == f"{tmp_path / 'none'}: no such folder; name an existing one"

    def test_results_at_a_uri_are_refused(self, url):
        request = SearchRequest(results=parse_location("s3://bucket/results"), name="s", storage=url)
        with pytest.raises(UserError, match="with --storage, name a folder that every driver can access"):
            request.check_storage()

    def test_password_in_the_url_is_refused(self, capsys):
        assert exit_code(["search", "--storage=postgresql://me:hunter2@db/studies"]) == 2
        err = capsys.readouterr().err
        assert "--storage: postgresql://***@db/studies: contains a password" in err
        assert "hunter2" not in err

    def test_study_keeps_its_storage(self, refused, tmp_path, store, url, postgres):
        results = tmp_path / "results"
        for name, storage, said in (("shared", f"{url}#shared", url), ("own", None, "its own journal")):
            make_study(results / name, spec_of(store, storage=storage))
            (results / name / LOCK).touch()
            (told,) = refused(storage=postgres.new_database(), name=name, space=None, data=None)
            assert told.startswith(f"--storage: a study keeps the storage that it began with, {said}; leave the option")


class TestBadSpaces:
    @pytest.mark.parametrize("sizes", ["{choice: [16, 64]}", "{int_log_uniform: [16, 64]}", "64"])
    def test_more_evaluations_than_steps_of_the_largest_batch(self, refused, space, sizes):
        """Reports of trials with such a batch would be fewer, and at other epochs than those of the others."""
        told = refused(space=space(f"{SMALL_SPACE}train.evals_per_epoch: 6\ntrain.batch_size: {sizes}\n"))
        assert len(told) == 1
        assert "train.evals_per_epoch: 96 rows in batches of 64 (train.batch_size) make 1 step an epoch" in told[0]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("optim.momentum: {uniform: [0.9, 0.1]}", "optim.momentum: the lower bound must be below the upper"),
            ("optim.lrr: 3", "optim.lrr: unknown setting; did you mean optim.lr?"),
            ("optim.name: {choice: []}", "optim.name: choice needs a list of values"),
            ("model.pretrained: {choices: [true]}", "got `choices`"),
            ("train.batch_size: {uniform: [1, 2]}", "train.batch_size: a whole number; write int_uniform"),
            ("model.dropout: 2", "model.dropout: should be less than 1, got 2"),
            ("optim.warmup_epochs: 40", "optim.warmup_epochs: less than train.epochs ("),
        ],
    )
    def test_a_fault_is_told_with_its_line(self, refused, space, tmp_path, line, said):
        told = refused(space=space(f"{SMALL_SPACE}{line}\n"))
        assert len(told) == 1
        assert told[0].startswith(f"{tmp_path / 'space.yaml'}:5: ")
        assert said in told[0]

    def test_all_faults_are_told_at_once(self, refused, space, tmp_path):
        lines = (
            "model.backbone: {choice: [resnet81]}",
            "loss: {simplex: [kl, fancy]}",
            "optim.lr: {log_uniform: [1, 0]}",
        )
        file = space("\n".join(lines))
        told = refused(space=file)
        assert [line.removeprefix(f"{file}:").partition(" ")[0] for line in told] == ["1:", "2:", "3:"]
        assert "resnet81: no such timm model; did you mean" in told[0]
        assert "loss: should be 'mse', 'l1', 'kl', 'ce' or 'js', got 'fancy'" in told[1]

    @pytest.mark.parametrize("text", ["", "optim.lr: [\n", "- a\n- b\n", "optim.lr: 1e-3\n", "\0"])
    def test_what_is_no_space(self, refused, space, tmp_path, text):
        told = refused(space=space(text))
        assert len(told) == 1
        assert told[0].startswith(f"{tmp_path / 'space.yaml'}")

    def test_a_space_that_is_not_there(self, refused, tmp_path):
        what = "the search space cannot be read: No such file or directory"
        assert refused(space=tmp_path / "none.yaml") == [f"{tmp_path / 'none.yaml'}: {what}; name a readable file"]

    def test_a_backbone_that_cannot_take_the_size(self, refused, space):
        told = refused(space=space(SMALL_SPACE.replace("test_resnet", "efficientformer_l1")))
        assert len(told) == 1
        assert told[0].startswith("model.backbone: efficientformer_l1 cannot take images of 32 px (data.image_size)")

    def test_a_backbone_without_blocks_to_skip(self, refused, space):
        skipped = SMALL_SPACE.replace("[test_resnet,", "[vgg11, test_resnet,").replace(
            "image_size: 32", "image_size: 64"
        )
        told = refused(space=space(f"{skipped}model.drop_path: {{uniform: [0, 0.2]}}\n"))
        assert told == ["model.drop_path: vgg11 has no blocks to skip; set it to 0, or choose another backbone"]

    def test_batches_too_small_for_the_workers(self, refused, space):
        """Also where only one branch of the space has them."""
        branch = "when:\n  - if: {model.backbone: test_vit}\n    train.accumulate: {choice: [1, 16]}\n"
        told = refused(
            space=space(f"{SMALL_SPACE}train.batch_size: {{choice: [16, 32]}}\n{branch}"), workers_per_trial=2
        )
        assert len(told) == 1
        assert told[0].startswith(
            "train.batch_size: 16 rows are too few for 16 micro-batches (train.accumulate) for each of 2 w"
        )

    def test_one_row_for_each_worker_where_a_model_has_batchnorm(self, refused, space):
        (told,) = refused(space=space(f"{SMALL_SPACE}train.batch_size: 2\n"), workers_per_trial=2)
        assert "the BatchNorm layers of test_resnet see no variance in one row; choose a larger batch" in told

    def test_half_precision_without_a_gpu_before_ray_starts_and_data_are_packed(
        self, refused, space, sessions, monkeypatch
    ):
        monkeypatch.setattr(placement, "local_node", lambda: {"CPU": 2.0})
        (told,) = refused(space=space(f"{SMALL_SPACE}train.precision: fp16\n"))
        assert told.startswith("train.precision: fp16 needs a GPU, but trials on this machine get none; use ")
        assert sessions == []

    def test_a_gpu_below_an_old_driver_before_ray_starts_and_data_are_packed(self, refused, sessions, broken_gpu):
        """Else every trial fails."""
        assert refused() == refused(gpus_per_worker=1.0) == [broken_gpu]
        assert sessions == []

    def test_pretrained_weights_that_are_not_at_hand(self, refused, space, tmp_path):
        weights = tmp_path / "weights"
        weights.mkdir()
        # Said by the space or by the command line, which wins.
        for told in (
            refused(space=space(f"{SMALL_SPACE}model.weights_dir: {weights}\n")),
            refused(space=space(f"{SMALL_SPACE}model.weights_dir: /elsewhere\n"), weights_dir=weights),
        ):
            assert len(told) == 2
            for name, line in zip(("test_resnet", "test_vit"), told, strict=True):
                assert f"model.weights_dir: no file {weights / name}.safetensors; on a machine with" in line

    @pytest.mark.parametrize("by_option", [False, True])
    def test_weights_of_another_architecture(self, refused, space, tmp_path, by_option):
        weights = tmp_path / "weights"
        weights.mkdir()
        for name in ("test_resnet", "test_vit"):
            save_file(timm.create_model("test_resnet").state_dict(), weights / f"{name}.safetensors")
        if by_option:
            told = refused(weights_dir=weights)
        else:
            told = refused(space=space(f"{SMALL_SPACE}model.weights_dir: {weights}\n"))
        assert told
        assert all(f"{weights / 'test_vit.safetensors'} does not fit test_vit" in line for line in told)


class TestBadRequests:
    @pytest.mark.parametrize(
        "option",
        [
            "--trials=0", "--trials=1.5", "--trials=many", "--epochs=-1", "--concurrency=0", "--workers-per-trial=0",
            "--gpus-per-worker=-1", "--gpus-per-worker=nan", "--gpus-per-worker=1.5", "--seed=-1", "--seed=1e3",
            "--seed=99999999999", "--max-failures=-1", "--time-budget=2", "--time-budget=0h", "--time-budget=-2h",
            "--time-budget=999999999999d", "--until-gain=0.001", "--until-gain=0/h", "--until-gain=-1/h",
            "--until-gain=1e999/h", "--name=a/b", "--name=..", "--name=", f"--name={'n' * 300}", "--nonsense",
            "--trials=9999999999", "--epochs=1000001", "--trials=" + 5000 * "9", "--results=", "--data=",
        ],
    )  # fmt: skip
    def test_a_value_that_is_none(self, refused, option):
        (told,) = refused(option)
        assert option.partition("=")[0] in told

    def test_a_front_that_is_to_end_by_its_gain(self, refused):
        assert refused("--until-gain=0.001/h", objective="val_js, params_millions") == [
            "--until-gain: a gain is only defined for the JS alone, not for a front ('val_js, params_millions'); leave "
            "the option out, or search for 'val_js'"
        ]

    def test_a_name_that_is_taken(self, refused, tmp_path):
        taken = tmp_path / "results" / "mine"
        taken.mkdir(parents=True)
        (taken / "params.json").touch()  # of a run of train
        assert refused(name="mine") == [f"{taken}: this name is taken, but not by a study; choose another name"]
        (taken / "study.yaml").touch()
        assert refused(name="mine") == [
            f"{taken}: a study of this name exists already; continue it with --resume, or choose another name"
        ]

    @example("my space")
    @example("quick (1)")
    @example("...")
    @example("-=")
    @example("顔" * 80)
    @given(st.text(st.characters()))  # also those that a name of a file has in place of bytes that are no text
    def test_a_study_that_is_named_by_its_space_can_be_named_again(self, stem):
        name = name_study(Path(f"{stem}.yaml"))
        assert folder_name(name) == name
        assert len(name.encode()) <= 255
        assert request_of("--space", "my space.yaml").find_study().name.startswith("my_space_2")

    @pytest.mark.parametrize("below", ["", "deeper/still"])
    def test_results_that_are_a_file(self, refused, tmp_path, below):
        (tmp_path / "results").touch()
        assert refused(results=tmp_path / "results" / below) == [
            f"{tmp_path / 'results'}: is not a folder; name another path"
        ]

    def test_a_cluster_by_way_of_its_client(self, refused):
        (told,) = refused(address="ray://127.0.0.1:10001")
        assert told.startswith("--address ray://127.0.0.1:10001: a study cannot run through Ray's client; run it on a")

    @pytest.mark.parametrize("address", ["127.0.0.1:{port}", "nobody.invalid:{port}", "nonsense"])
    def test_a_cluster_that_is_not_there(self, refused, address):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            address = address.format(port=taken.getsockname()[1])
            began = time.monotonic()
            (told,) = refused(address=address)
            assert time.monotonic() - began < 120  # a name server may take a while
        assert told.startswith(f"--address {address}: no Ray cluster answers there (")

    def test_nothing_to_start_from_beside_studies(self, refused, space, tmp_path):
        told = refused("--warm-start", "none", str(tmp_path))
        advice = "leave one of them out (a folder of this name: ./none)"
        assert told == [f"--warm-start: 'none' cannot be combined with studies; {advice}"]
        both = refused("--warm-start", "none", str(tmp_path), space=space("optim.lr: {uniform: [2, 1]}\n"))
        assert len(both) == 2
        assert both[1:] == told

    @pytest.mark.parametrize("options", [("--sampler", "gp"), ("--sampler=tpe", "--scheduler=none")])
    def test_earlier_studies_that_nothing_would_use(self, refused, tmp_path, options):
        (told,) = refused("--warm-start", str(tmp_path), *options)
        assert re.match(
            r"--warm-start: neither the sampler (gp|tpe) nor the scheduler none uses earlier studies; ", told
        )

    def test_everything_that_takes_no_time_is_told_before_ray_starts(self, refused, space, tmp_path, sessions):
        (tmp_path / "results").touch()
        told = refused(data=tmp_path / "none", space=space("optim.lr: {uniform: [2, 1]}\n"), address="nonsense")
        assert [line.partition(": ")[0].removeprefix(f"{tmp_path}/") for line in told] == [
            "results", "--address nonsense", "space.yaml:1", "none",
        ]  # fmt: skip
        assert sessions == []

    def test_more_than_the_cluster_has(self, refused, cluster, monkeypatch):
        # Ray can be started only once in a process, and has been.
        monkeypatch.setattr(cluster_nodes, "fit_to_cluster", fit_to_cluster)
        monkeypatch.setattr(placement, "fit_here", lambda demand: None)
        (told,) = refused(workers_per_trial=16)
        assert told.startswith("a trial of 16 workers with 1 CPU each does not fit: the cluster has 2 CPU on 1 node, ")
        (told,) = refused(gpus_per_worker=1)
        assert told.startswith("--gpus-per-worker 1: the cluster has no GPU")
        told = refused(gpus_per_worker="auto", workers_per_trial=2)
        assert told == [
            "--gpus-per-worker auto: the cluster has no GPU that PyTorch can use; use "
            "--gpus-per-worker 0 to train on cores",
            "--gpus-per-worker auto: the workers of a trial cannot share a GPU; leave it out",
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("finished") / "study"
    write_study(folder, store)
    return folder


class TestBadResuming:
    @pytest.fixture
    def resumed(self, tmp_path, own_cache, finished, capsys, sessions):
        """Goes on with a copy of a study, which must be refused before anything runs."""
        folder = tmp_path / "study"
        shutil.copytree(finished, folder)

        def run(*argv, name="study"):
            given = ["search", "--resume", f"--results={tmp_path}", *([f"--name={name}"] if name else []), *argv]
            return refusal(capsys, [tmp_path, own_cache / "raytune_emotion"], *given)

        run.folder = folder
        return run

    def test_what_is_no_study(self, resumed, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        assert resumed(name="none") == [f"{tmp_path / 'none'}: no study of this name to resume; choose one of study"]
        assert "not a study, because it has no study.yaml" in resumed(name="file")[0]
        assert "not a study, because it has no study.yaml" in resumed(name="empty")[0]
        (resumed.folder / "optuna.journal").unlink()
        assert "not a study, because it has no optuna.journal" in resumed()[0]
        (resumed.folder / "study.yaml").unlink()
        assert resumed(name=None) == [f"{tmp_path}: contains no study to resume; name its folder with --results"]

    def test_one_that_is_at_work(self, resumed):
        with study_lock(resumed.folder):
            told = resumed()
        assert told == [f"{resumed.folder}: another process is using it; wait until it ends, or end it"]

    def test_an_export_that_could_not_be_written_at_the_end(self, resumed):
        for name in ("best", "finished"):
            (resumed.folder / name).mkdir(exist_ok=True)
            (resumed.folder / name / "thesis.tex").touch()
        told = resumed("--finish")
        assert [line.partition(" (thesis.tex)")[0] for line in told] == [
            f"{resumed.folder / name}: holds files that do not belong to an export" for name in ("best", "finished")
        ]

    def test_a_confirmation_of_another_length_that_a_finish_would_meet(self, resumed):
        make_study(resumed.folder / "confirmed", read_spec(resumed.folder))
        assert resumed("--finish", "--epochs=40") == [
            f"{resumed.folder / 'confirmed'}: its runs have 2 epochs, but trials of the study now have 40; move it "
            f"away to confirm the study again"
        ]

    def test_what_may_not_change(self, resumed, tmp_path, space):
        write_folder(tmp_path / "others")
        other = space(SMALL_SPACE.replace("1e-2", "2e-2"))
        told = resumed(
            f"--space={other}", "--objective=val_js per hour", "--seed=1", "--epochs=1", f"--data={tmp_path / 'none'}",
            "--address=nonsense", f"--warm-start={tmp_path}",
        )  # fmt: skip
        assert {line.partition(": ")[0].removeprefix(f"{tmp_path}/") for line in told} == {
            "--space", "--objective", "--seed", "--epochs", "--address nonsense", "none", "--warm-start",
        }  # fmt: skip
        (seed,) = [line for line in told if line.startswith("--seed")]
        assert seed == (
            "--seed: a study keeps the seed that it began with, 0; leave the option out, or begin a new study under "
            "another name"
        )

    def test_a_space_that_cannot_be_read_hides_no_other_error(self, resumed, space):
        told = resumed(f"--space={space('optim.lr: -1')}", "--seed=1", "--epochs=1")
        assert ": optim.lr: " in told[0]
        assert [line.partition(":")[0] for line in told[1:]] == ["--seed", "--epochs"]

    @pytest.mark.parametrize(("began", "asked"), [("the portfolio", "none"), ("the portfolio", "."), ("none", ".")])
    def test_another_warm_start(self, resumed, began, asked):
        if began != "none":
            shutil.copy(PORTFOLIO, resumed.folder / EARLIER)
        told = resumed(f"--warm-start={asked}")
        assert [line.partition(";")[0] for line in told] == [
            f"--warm-start: a study keeps the warm-start that it began with, {began}"
        ]

    def test_what_the_study_has_may_be_said_again(self, resumed, tmp_path, space, sessions):
        """So the command that began the study goes on with it when --resume is added."""
        same = (f"--space={space()}", "--objective=val_js", "--seed=0", "--epochs=2", "--trials=3")
        told = resumed(*same, "--address=nonsense")
        assert len(told) == 1
        assert told[0].startswith("--address nonsense: ")
        assert sessions == [], "Ray itself would look for the cluster for a quarter of an hour"
        # The space may name what the command line said otherwise.
        told = resumed(f"--space={space(SMALL_SPACE + 'train.epochs: 7')}", "--address=nonsense")
        assert len(told) == 1

    def test_weights_that_have_moved_are_no_other_space(self, resumed, tmp_path, space, sessions):
        weights = tmp_path / "weights"
        weights.mkdir()
        for name in ("test_resnet", "test_vit"):
            save_file(timm.create_model(name).state_dict(), weights / f"{name}.safetensors")
        spec = read_spec(resumed.folder)
        spec = dataclasses.replace(
            spec, weights_dir="/gone", space={**spec.space, "model.weights_dir": "/gone", "model.pretrained": True}
        )
        write_spec(resumed.folder, spec)
        file = space(f"{SMALL_SPACE}model.pretrained: true\n")
        (told,) = resumed(f"--space={file}", f"--weights-dir={weights}", "--address=nonsense")
        assert told.startswith("--address nonsense: ")
        request = request_of("--results", tmp_path, "--resume", "--space", file, "--weights-dir", weights)
        spec = resumed_spec(request, load(resumed.folder), [])
        assert spec.settings({"model.weights_dir": "/gone"})["model.weights_dir"] == str(weights)
        # The study knows where they are the next time.
        write_spec(resumed.folder, spec)
        (told,) = resumed(f"--space={file}", "--address=nonsense")
        assert told.startswith("--address nonsense: ")

    def test_weights_for_a_study_that_began_without(self, resumed, tmp_path):
        """Its trials could not continue: with the weights, they would be pretrained."""
        (tmp_path / "weights").mkdir()
        (told, *_) = resumed(f"--weights-dir={tmp_path / 'weights'}")
        assert told == (
            "--weights-dir: trials of this study begin with random weights, because it began with neither "
            "--weights-dir nor model.pretrained; leave the option out, or begin a new study under another name"
        )
        spec = read_spec(resumed.folder)
        write_spec(resumed.folder, dataclasses.replace(spec, space={**spec.space, "model.pretrained": True}))
        told = resumed(f"--weights-dir={tmp_path / 'weights'}")
        assert {line.partition(":")[0] for line in told} == {"model.weights_dir"}, "weights of a hub may be files now"

    def test_a_front_that_is_to_end_by_its_gain(self, resumed):
        write_spec(resumed.folder, dataclasses.replace(read_spec(resumed.folder), objective="val_js, params_millions"))
        (told,) = resumed("--until-gain=0.001/h")
        assert told.startswith("--until-gain: a gain is only defined for the JS alone")

    def test_other_data(self, resumed, tmp_path, own_cache, capsys):
        others = write_folder(tmp_path / "others")
        argv = ["search", "--resume", f"--results={tmp_path}", "--name=study", f"--data={others}"]
        (told,) = refusal(capsys, [tmp_path], *argv)  # but packed they are
        assert told == f"{others}: not the data with which the study began; its trials could not be compared"

    def test_data_that_are_gone(self, resumed):
        write_spec(resumed.folder, dataclasses.replace(read_spec(resumed.folder), stores={32: "/gone"}, data="/gone"))
        assert resumed() == ["/gone: the packed data of the study are missing; name the data with --data"]

    def test_weights_that_are_gone(self, resumed, tmp_path):
        write_spec(resumed.folder, dataclasses.replace(read_spec(resumed.folder), weights_dir="/gone"))
        for told, place in ((resumed(), "/gone"), (resumed(f"--weights-dir={tmp_path}"), tmp_path)):
            assert [line.partition(";")[0] for line in told] == [
                f"model.weights_dir: no file {place}/{name}.safetensors" for name in ("test_resnet", "test_vit")
            ]

    def test_more_workers_than_a_batch_has_rows(self, resumed):
        """Every trial would fail, for good."""
        assert resumed("--workers-per-trial=33") == [
            "train.batch_size: 32 rows are too few for 1 micro-batches (train.accumulate) for each of 33 workers; "
            "choose a larger batch or fewer of the others"
        ]

    def test_one_row_for_each_worker_where_a_model_has_batchnorm(self, resumed):
        (told,) = resumed("--workers-per-trial=32")
        assert "the BatchNorm layers of test_resnet see no variance in one row; choose a larger batch" in told

    def test_half_precision_where_there_is_no_gpu(self, resumed, monkeypatch):
        spec = read_spec(resumed.folder)
        fp16 = {"train.precision": {"choice": ["fp32", "fp16"]}}
        write_spec(resumed.folder, dataclasses.replace(spec, space={**spec.space, **fp16}))
        on_cores = functools.partial(placement.fit, [{"CPU": 2.0}], "the cluster")
        monkeypatch.setattr(cluster_nodes, "fit_to_cluster", on_cores)
        assert resumed() == [
            "train.precision: fp16 needs a GPU, but trials on the cluster get none; use --gpus-per-worker 1 if "
            "there are GPUs, or search with bf16 or fp32"
        ]

    def test_a_gpu_below_an_old_driver_unless_the_study_trains_on_cores(self, resumed, broken_gpu):
        spec = read_spec(resumed.folder)
        write_spec(resumed.folder, dataclasses.replace(spec, gpus_per_worker=None))
        assert resumed() == [broken_gpu]
        on_cores = "--gpus-per-worker=0", "--workers-per-trial=33"
        assert broken_gpu not in resumed(*on_cores)
        write_spec(resumed.folder, dataclasses.replace(spec, gpus_per_worker=0.0))
        assert broken_gpu not in resumed(on_cores[1])

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("name: study", "name: ["),
            ("seed: 0\n", ""),
            ("log_uniform", "log_uniforn"),
            ("test_vit", "test_bit"),
        ],
    )
    def test_a_damaged_study(self, resumed, old, new):
        file = resumed.folder / "study.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
        (told,) = resumed()
        assert told.startswith(str(file))


class TestFinishing:
    """A study whose search is over goes on with its finish."""

    @pytest.fixture
    def study(self, tmp_path, finished):
        shutil.copytree(finished, tmp_path / "study")
        (tmp_path / "study" / ".searched").touch()
        return tmp_path / "study"

    @pytest.fixture
    def resumed(self, study, monkeypatch):
        """Goes on with it, without a search and a finish that are real; returns the exit code and what was done."""

        def run(*argv, broken_by=None):
            done = []

            def finish(*_, **__):
                done.append("finished")
                if broken_by is not None:
                    raise broken_by

            monkeypatch.setattr(run_search, "_search", lambda *_: done.append("searched") or load(study))
            monkeypatch.setattr(run_search, "_conclude", lambda *_: done.append("concluded"))
            monkeypatch.setattr("raytune_emotion.tuning.session.finish.finish_study", finish)
            given = ["--resume", "--finish", "--results", study.parent, "--name", study.name]
            return exit_code(["search", *given, *argv]), done

        return run

    def test_and_not_with_its_search(self, resumed, study, capsys):
        assert resumed("--concurrency=7") == (0, ["concluded", "finished"])
        assert read_spec(study).concurrency == 7
        assert "the search is over, so only the finish continues; to search further, ra" in capsys.readouterr().out

    def test_and_says_what_it_passes_over(self, resumed, study, capsys, monkeypatch):
        write_spec(study, dataclasses.replace(read_spec(study), trials=9))
        monkeypatch.setattr(search_inputs, "_check_mlflow", lambda request: None)
        monkeypatch.setattr(search_inputs, "refuse_absent_gpu", lambda *_: None)
        assert resumed("--mlflow=logs", "--gpus-per-worker=auto") == (0, ["concluded", "finished"])
        out = capsys.readouterr().out
        assert "the search is over, so only the finish continues, without the remaining trials; to sea" in out
        ignored = "applies only to a search, and is ignored here"
        assert f"--mlflow: {ignored}\n--gpus-per-worker auto: {ignored}\n" in out

    @pytest.mark.parametrize("more", ["--trials=9", "--epochs=9", "--time-budget=1h", "--until-gain=0.1/h"])
    def test_unless_more_of_the_search_is_asked_for(self, resumed, more):
        assert resumed(more) == (0, ["searched", "finished"])

    def test_and_with_its_search_where_that_is_not_over_though_it_was_confirmed_before(self, resumed, study):
        (study / ".searched").unlink()
        make_study(study / "confirmed", read_spec(study))
        assert resumed() == (0, ["searched", "finished"])

    def test_and_knows_it_from_the_moment_when_the_search_is_over(self, study, monkeypatch):
        (study / ".searched").unlink()
        done, broken = [], {"concluded"}

        def step(name):
            def run(*_, **__):
                done.append(name)
                if name in broken:
                    raise KeyboardInterrupt

            return run

        monkeypatch.setattr(cluster_module, "ray_session", joined_session)
        monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
        monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", step("searched"))
        monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", step("concluded"))
        monkeypatch.setattr("raytune_emotion.tuning.session.finish.finish_study", step("finished"))

        def resumed(*argv):
            done.clear()
            command = ["search", "--resume", "--finish", "--results", study.parent, "--name", "study", *argv]
            return exit_code(command), done

        assert resumed("--time-budget=1h") == (130, ["searched", "concluded"])
        broken.clear()
        # The very same command goes on, and writes first what the interrupted one has not.
        assert resumed("--time-budget=1h") == (0, ["concluded", "finished"])
        assert resumed() == (0, ["concluded", "finished"])
        broken.add("searched")
        assert resumed("--trials=9") == (130, ["searched", "concluded"])
        broken.clear()
        assert resumed() == (0, ["searched", "concluded", "finished"])
        assert resumed("--trials=9") == (0, ["concluded", "finished"])
        assert resumed("--time-budget=1h") == (0, ["searched", "concluded", "finished"])
        assert resumed("--time-budget=2h") == (0, ["searched", "concluded", "finished"])

    def test_and_knows_it_at_a_uri(self, study, monkeypatch):
        (study / ".searched").unlink()
        done, results = [], study.parent.as_uri()
        monkeypatch.setattr(cluster_module, "ray_session", joined_session)
        monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
        monkeypatch.setattr(
            "raytune_emotion.tuning.session.console_run.run_with_progress", lambda console, run, _: run.study.claim()
        )
        monkeypatch.setattr(
            "raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: done.append("concluded")
        )

        def finish(place, address, *, check):
            check()
            done.append(f"{place} is finished")
            if len(done) > 2:
                RemoteCopy(study.parent / "other", place).claim()
                with pytest.raises(Breakdown, match=TAKEN_OVER):
                    check()

        (study.parent / "other").mkdir()
        monkeypatch.setattr("raytune_emotion.tuning.session.finish.finish_study", finish)
        command = ["search", "--resume", "--finish", "--results", results, "--name", "study"]
        assert exit_code([*command, "--time-budget=1h"]) == 0
        assert json.loads((study / ".searched").read_text()) == {"time_budget": 3600.0}
        monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", None)
        # The search is over, and what is asked for now is kept at the URI.
        assert exit_code([*command, "--concurrency=7"]) == 0
        assert done == ["concluded", f"{results}/study is finished"] * 2
        assert read_spec(study).concurrency == 7

    @pytest.mark.parametrize("is_searched", [True, False])
    def test_and_is_of_no_other_search_until_it_is_finished(self, study, monkeypatch, capsys, is_searched):
        """Another one could delete weights that the finish needs."""
        if not is_searched:
            (study / ".searched").unlink()
        told, command = [], ["search", "--resume", "--results", study.parent, "--name", "study"]

        def finish(place, address, *, check):
            check()
            assert exit_code([*command, "--trials=64"]) == 2
            told.append(capsys.readouterr().err)

        monkeypatch.setattr(cluster_module, "ray_session", joined_session)
        monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
        monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", lambda *_: None)
        monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: None)
        monkeypatch.setattr("raytune_emotion.tuning.session.finish.finish_study", finish)
        assert exit_code([*command, "--finish"]) == 0
        assert len(told) == 1
        assert f"{study}: another process is using it" in told[0]
        assert exit_code([*command, "--trials=64"]) == 0

    @pytest.mark.usefixtures("without_locks")
    def test_and_notices_another_search_where_files_have_no_locks(self, study, monkeypatch, capsys):
        def finish(place, address, *, check):
            check()
            with open_study(study) as other, other.drivers.turn("trials"):
                pass
            check()

        monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: None)
        monkeypatch.setattr("raytune_emotion.tuning.session.finish.finish_study", finish)
        command = ["search", "--resume", "--finish", "--results", study.parent, "--name", "study"]
        assert exit_code(command) == 1
        out, err = capsys.readouterr()
        assert err.endswith(f"error: {study}: {TAKEN_OVER}\n")
        assert "to continue" not in out, "it would take the study back"

    @pytest.mark.parametrize(
        ("why", "code"),
        [(KeyboardInterrupt(), 130), (Breakdown("no room"), 1), (ClusterLost("Ray has died"), 1), (UserError("a"), 2)],
    )
    def test_says_what_to_type_where_it_is_broken_off(self, resumed, study, capsys, why, code):
        assert resumed(broken_by=why) == (code, ["concluded", "finished"])
        assert capsys.readouterr().out.endswith(
            f"\nto continue: python -m raytune_emotion.search --resume --finish --results {study.parent} --name study\n"
        )


def test_a_study_that_goes_on_says_what_is_left_to_run(tmp_path, finished, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "study")
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", lambda *_, **__: None)
    monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: None)
    argv = ["search", "--resume", "--results", tmp_path, "--name", "study"]
    assert exit_code([*argv, "--trials", 2]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "every trial has ended, so nothing remains to run; ask for more than 3 trials with --trials"
    assert exit_code([*argv, "--epochs", 9]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"(\d{4}, )*\d{4}: continued to epoch 9, each as a new trial", told)
    spec = read_spec(tmp_path / "study")
    from_scratch = {**spec.space, "model.pretrained": False}
    write_spec(tmp_path / "study", dataclasses.replace(spec, weights_dir=str(tmp_path), space=from_scratch))
    assert exit_code(argv) == 0
    told = "--weights-dir: the space has model.pretrained: false, so trials begin with random weights"
    assert told in capsys.readouterr().out.splitlines()


def test_the_limits_that_are_asked_for_reach_the_run(tmp_path, store, space, monkeypatch):
    runs = []
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr(
        "raytune_emotion.tuning.session.console_run.run_with_progress", lambda console, run, _: runs.append(run)
    )
    monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: None)
    begin = ["search", "--data", store.path, "--space", space(), "--results", tmp_path, "--name", "s"]
    resume = ["search", "--resume", "--results", tmp_path, "--name", "s"]
    for argv in (
        [*begin, "--time-budget=1h", "--until-gain=0.1/h", "--max-failures=7"],
        resume,
        [*resume, "--time-budget=90m", "--until-gain=0.2/h", "--max-failures=0"],
    ):
        assert exit_code(argv) == 0
    limits = [(run.time_budget, run.until_gain, run.study.spec.max_failures) for run in runs]
    assert limits == [(timedelta(hours=1), 0.1, 7), (None, None, 7), (timedelta(hours=1.5), 0.2, 0)]
    assert read_spec(tmp_path / "s").max_failures == 0


@pytest.mark.parametrize("how", [None, KeyboardInterrupt, ClusterLost("Ray has died")])
def test_a_study_is_its_searchs_alone_until_all_is_written(tmp_path, store, space, monkeypatch, capsys, how):
    """Its best trial, its page and its tables too, however it ended (C8)."""
    folder, concluded = tmp_path / "results" / "s", []

    def run_shown(*_, **__):
        if how is not None:
            raise how

    def conclude(*_, **__):
        with pytest.raises(UserError, match="another process is using it"), study_lock(folder):
            pass
        concluded.append(True)

    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", run_shown)
    monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", conclude)
    argv = ["search", "--data", store.path, "--space", space(), "--results", folder.parent, "--name", "s"]
    assert exit_code(argv) == {None: 0, KeyboardInterrupt: 130}.get(how, 1)
    assert concluded == [True]
    with study_lock(folder):
        pass


def test_a_study_that_another_search_makes_while_ray_starts_is_refused(tmp_path, store, space, monkeypatch, capsys):
    folder = tmp_path / "results" / "s"

    def start_slowly(address, **options):
        make_study(folder, spec_of(store))
        return joined_session(address, **options)

    monkeypatch.setattr(cluster_module, "ray_session", start_slowly)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    argv = ["search", "--data", store.path, "--space", space(), "--results", folder.parent, "--name", "s"]
    assert exit_code(argv) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: {folder}: another search has just made this study; choose another name"


def test_a_package_that_cannot_be_imported_at_the_end_leaves_the_study_and_says_so(
    tmp_path, store, space, monkeypatch, capsys
):
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "raytune_emotion.tuning.report.conclusion", None)
    folder = tmp_path / "results" / "s"
    argv = ["search", "--data", store.path, "--space", space(), "--results", folder.parent, "--name", "s"]
    assert exit_code(argv) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder}: the study is recorded, but its export and its page cannot be made (" in told
    assert told.endswith(f"search --resume --results {folder.parent} --name s`")
    with study_lock(folder):
        read_spec(folder)


def test_a_study_whose_folder_was_renamed_goes_on_by_the_name_of_the_folder(tmp_path, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "raytune_emotion.tuning.report.conclusion", None)
    shutil.copytree(finished, tmp_path / "renamed")
    (tmp_path / "link").symlink_to(tmp_path / "renamed")
    for name in ("renamed", "link"):
        with pytest.raises(Breakdown, match=f"search --resume --results {tmp_path} --name {name}`"):
            run_search._conclude(request_of("--results", tmp_path), load(tmp_path / name))


@pytest.mark.parametrize("fits", [True, False])
def test_cluster_is_asked_whether_trials_fit_and_left_again_before_data_are_packed(
    tmp_path, own_cache, space, capsys, sessions, monkeypatch, fits
):
    """To pack may take hours, in which nobody would see that the cluster has died."""
    seen = []

    @contextlib.contextmanager
    def session(address):
        seen.append("joined")
        yield
        seen.append("left")

    def fit(demand):
        seen.append(demand)
        if not fits:
            raise UserError("it does not fit")

    monkeypatch.setattr(cluster_module, "check_cluster", lambda address: None)
    monkeypatch.setattr(cluster_nodes, "ray_session", session)
    monkeypatch.setattr(cluster_nodes, "fit_to_cluster", fit)
    data = write_folder(tmp_path / "faces")
    sentence = spoil(data, "negative", "77")
    told = refusal(
        capsys, [tmp_path, own_cache / "raytune_emotion"], *command_on("search", data, tmp_path / "r", space()),
        "--address=10.0.0.1:6379",
    )  # fmt: skip
    assert told[0].startswith(sentence if fits else "it does not fit")
    needs = placement.Demand()
    assert seen == ["joined", needs, *(["left"] if fits else [])]
    assert sessions == []


@pytest.mark.parametrize("options", [[], ["--finish"]])
def test_an_interrupted_search_writes_its_report_and_says_how_it_goes_on(
    tmp_path, store, space, monkeypatch, capsys, no_plots, options
):
    def run_one_trial(console, run, watches):
        run_here(run.study.with_spec(dataclasses.replace(run.study.spec, trials=1)))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", run_one_trial)
    argv = ["search", "--data", store.path, "--space", space(), "--trials", 3, "--epochs", 1, "--name", "first"]
    assert exit_code([*argv, *options]) == 130
    out, err = capsys.readouterr()
    assert err.endswith("\ninterrupted\n")
    command = " ".join(["python -m raytune_emotion.search --resume", *options, "--results ray_results --name first"])
    assert out.splitlines()[-1] == f"  {command}"
    study = tmp_path / "ray_results" / "first"
    assert len(pd.read_csv(study / "trials.csv")) == 1
    assert (study / "report.html").stat().st_mtime >= (study / "trials.csv").stat().st_mtime
    assert (study / "best" / "model.safetensors").exists()


def test_a_search_that_is_interrupted_before_any_report_says_how_it_goes_on(
    tmp_path, store, space, monkeypatch, capsys, no_plots
):
    def interrupt(console, run, watches):
        Recorder(run.study).next()
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr("raytune_emotion.tuning.session.console_run.run_with_progress", interrupt)
    argv = ["search", "--data", store.path, "--space", space(), "--trials", 1, "--epochs", 1, "--name", "first"]
    assert exit_code([*argv, "--results", tmp_path]) == 130
    assert capsys.readouterr().out.endswith(
        f"""
no trial has a result yet: none has reported, or all that reported have failed

next:
  python -m raytune_emotion.search --resume --results {tmp_path} --name first
"""
    )


def test_a_search_that_is_refused_leaves_the_files_of_the_one_at_work(tmp_path, finished, capsys, sessions):
    shutil.copytree(finished, tmp_path / "results" / "study")
    argv = ["--results", (tmp_path / "results").as_uri(), "--name", "study", "--resume"]
    with contextlib.ExitStack() as at_work:
        study = open_existing(parsed(*argv).find_study(), at_work)
        local = study.folder
        before = tree(local)
        assert local / "study.yaml" in map(Path, before)
        assert exit_code(["search", *argv]) == 2
        assert f"error: {local}: another process is using it" in capsys.readouterr().err
        assert tree(local) == before
        assert sessions == []


@pytest.mark.usefixtures("without_locks")
def test_a_search_that_is_refused_ends_none_at_work_where_files_have_no_locks(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    shutil.copytree(finished, tmp_path / "study")
    argv = ["search", "--resume", "--results", tmp_path, "--name", "study"]
    with open_study(tmp_path / "study") as study:
        with study.drivers.turn("trials"):
            before = tree(study.folder)
        assert exit_code([*argv, "--seed", 12345]) == 2
        assert "--seed: a study keeps the seed" in capsys.readouterr().err
        assert exit_code([*argv, "--workers-per-trial", 10_000]) == 2
        assert "10000" in capsys.readouterr().err, "this error is found once the study is loaded"
        assert study.drivers.failure() == ""
        assert tree(study.folder) == before


@pytest.mark.usefixtures("without_locks")
def test_a_search_whose_local_copy_another_one_overwrites_ends_where_files_have_no_locks(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "results" / "study")
    place = parsed("--results", (tmp_path / "results").as_uri(), "--name", "study", "--resume").find_study()
    with contextlib.ExitStack() as held:
        first, second = (open_existing(place, held) for _ in range(2))
        assert (first.drivers.failure(), second.drivers.failure()) == (f"{first.folder}: {TAKEN_OVER}", "")


def test_local_copy_of_another_study_is_kept_when_the_one_at_a_uri_goes_on(tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "results" / "study")
    place = parsed("--results", (tmp_path / "results").as_uri(), "--name", "study", "--resume").find_study()
    folder = place.working_folder()
    shutil.copytree(finished, folder)
    (folder / "study.yaml").write_text((folder / "study.yaml").read_text().replace("created: '", "created: '1"))
    (folder / "trials.csv").write_text("of days of work")
    with contextlib.ExitStack() as held:
        study = open_existing(place, held)
    assert study.folder == folder
    assert not (folder / "trials.csv").exists()
    (aside,) = set(folder.parent.iterdir()) - {folder}
    assert (aside / "trials.csv").read_text() == "of days of work"
    assert f"are kept in {aside}" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "seed"), [((), 5), (("--seed", "3"), 3)])
def test_the_seed_of_a_study_is_that_of_its_trials(tmp_path, store, space, option, seed):
    argv = ["--data", str(store.path), "--space", str(space(f"{SMALL_SPACE}train.seed: 5\n")), *option]
    request = parsed(*argv)
    spec = new_spec(request, "new", request.load_space(), find_data(request.data))
    study = create_study(tmp_path, parse_space(spec.space))
    proposal = searcher_of(study, parse_space(spec.space), seed=spec.seed).ask()
    assert spec.seed == proposal.settings["train.seed"] == spec.settings(proposal.settings)["train.seed"] == seed


@pytest.mark.parametrize(
    ("options", "scheduler"),
    [((), "freeze-thaw"), (("--sampler", "qmc"), "freeze-thaw"), (("--sampler", "tpe"), "asha"),
     (("--sampler", "gp"), "none"), (("--sampler", "cmaes"), "none"),
     (("--sampler", "tpe", "--scheduler", "freeze-thaw"), "freeze-thaw")],
)  # fmt: skip
def test_a_sampler_that_learns_from_ended_or_complete_trials_alone_has_a_scheduler_that_makes_them(
    store, space, options, scheduler
):
    request = parsed("--data", str(store.path), "--space", str(space()), *options)
    assert new_spec(request, "new", request.load_space(), find_data(request.data)).scheduler == scheduler


def parsed(*argv) -> SearchRequest:
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    return SearchRequest(**vars(parser.parse_args(argv)))


def test_a_dry_run_shows_the_space_and_its_cost_and_runs_nothing(tmp_path, faces, capsys, monkeypatch):
    monkeypatch.setattr(placement, "usable_cores", lambda: 2)
    monkeypatch.setattr(dry_run, "find_device", lambda gpus: torch.device("cpu" if gpus == 0 else "cuda"))
    (tmp_path / "space.yaml").write_text(SMALL_SPACE)
    before = tree(tmp_path)
    asked = ["--data", faces, "--space", tmp_path / "space.yaml", "--results", tmp_path / "results"]
    assert exit_code(["search", "--dry-run", "--gpus-per-worker", 0, "--trials", 8, "--epochs", 3, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"backbone test_\w+  lr 0\.\d+  kl ", line)]) == 10
    for backbone in ("test_resnet", "test_vit"):
        assert any(re.match(rf"\s*{backbone}\s+32\s+\d+\.\d\d\s+\d+\s+\d+\.\d", line) for line in lines), backbone
    assert "the search is guided by nothing, because the portfolio does not fit this space" in lines
    assert re.match(r"8 trials of 3 epochs on 96 images, 2 at once: \d+\.\d (s|min) on this device if ", lines[-1])
    assert "training on this machine (cpu, 1 thread)" in lines
    assert lines[-1].endswith("; measured in a few steps, beside other programs")
    (rate,) = (line.split(None, 1)[1].strip() for line in lines if line.startswith("  optim.lr"))
    assert rate == "real number from 0.001 to 0.01, uniform in its logarithm"
    assert tree(tmp_path) == before
    assert exit_code(["search", "--dry-run", *asked[:-4], "--space", tmp_path / "none.yaml"]) == 2
    capsys.readouterr()
    refused = ["--gpus-per-worker", 1, "--mlflow", "http://name:word@host"]
    assert exit_code(["search", "--dry-run", *asked, *refused]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2, "what a search refuses, a dry run refuses, too"


@pytest.mark.parametrize(
    ("options", "threads", "said", "hours"),
    [
        ((), 1, "2 at once", 4 / 2),
        (("--concurrency", 1), 2, "1 at once", 4),
        (("--concurrency", 4), 1, "4 at once, each on 0.5 core", 4 * 2 / 4),
        (("--workers-per-trial", 2), 2, "1 at once", 4),
    ],
)
def test_a_dry_run_measures_with_the_threads_of_a_trial_and_counts_those_at_once(
    tmp_path, faces, capsys, monkeypatch, options, threads, said, hours
):
    used = []

    def cost(backbone, size, weights_dir, device):
        used.append(torch.get_num_threads())
        return dry_run.Cost(backbone, size, 1.0, 96 / 3600)  # an hour an epoch

    before = torch.get_num_threads()
    monkeypatch.setattr(placement, "usable_cores", lambda: 2)
    monkeypatch.setattr(dry_run, "find_device", lambda gpus: torch.device("cpu"))
    monkeypatch.setattr(dry_run, "_cost", cost)
    (tmp_path / "space.yaml").write_text(SMALL_SPACE)
    asked = ["--data", faces, "--space", tmp_path / "space.yaml", "--results", tmp_path / "results", "--trials", 4]
    assert exit_code(["search", "--dry-run", "--epochs", 1, *asked, *options]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"4 trials of 1 epoch on 96 images, {said}: {hours:.1f} h on this device if ")
    assert {*used} == {threads}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--trials", "4"),
            "the portfolio, 64 configurations recorded on drawn and ferplus_small, once 4 trials have paused or ended "
            "(--warm-start none leaves it out)",
        ),
        (("--trials", "3"), ""),
        (("--warm-start", "none"), "nothing (--warm-start none)"),
        (("--sampler", "tpe"), "nothing (--sampler tpe)"),
    ],
)
def test_what_guides_the_search_is_told(own_cache, faces, tmp_path, options, told):
    request = request_of("--data", faces, "--space", "quick", *options)
    assert search_inputs.check_new(request, Folder(tmp_path / "new")).warm_start.description == told


@pytest.mark.parametrize(
    ("sampler", "only"),
    [("forecast", ""), ("tpe", ", but only in its pauses, because the sampler tpe does not use earlier studies")],
)
def test_what_earlier_studies_guide_is_told(tmp_path, monkeypatch, sampler, only):
    monkeypatch.setattr(earlier, "gather_earlier", lambda studies: "[]")
    request = request_of("--warm-start", tmp_path, "--sampler", sampler, "--scheduler", "freeze-thaw")
    assert earlier.gather_warm_start(request, Space({})).description == f"{tmp_path} (--warm-start){only}"


def request_of(*argv):
    """Return what a command line asks for."""
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    return SearchRequest(**vars(parser.parse_args([*map(str, argv)])))


@pytest.mark.parametrize("trials", [1, 4])
def test_a_study_of_the_quick_space_keeps_the_portfolio_and_says_so_if_it_will_use_it(
    faces, tmp_path, monkeypatch, without_ray, trials
):
    proposed = []
    monkeypatch.setattr(
        "raytune_emotion.tuning.session.console_run.run_study",
        lambda run: proposed.append(Recorder(run.study).next()),
    )
    monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: None)
    code, out, err = search_on_cluster(
        "--data", faces, "--trials", trials, "--epochs", 1, "--name", "first", cwd=tmp_path
    )
    assert code == 0, err
    assert ("the search is guided by the portfolio, 64 configurations" in out) == (trials >= 4)
    assert [proposal.trial_id for proposal in proposed] == ["0000"]
    kept = tmp_path / "ray_results" / "first" / EARLIER
    assert json.loads(kept.read_text()) == json.loads(PORTFOLIO.read_text())


def search_on_cluster(*argv, cwd):
    """Run `search` on the cluster that this process has joined; return its exit code, its output and its errors."""
    with pytest.MonkeyPatch.context() as patched, contextlib.ExitStack() as stack:
        patched.chdir(cwd)
        # Ray can be started only once in a process, and has been.
        patched.setattr(cluster_module, "ray_session", joined_session)
        patched.setattr("raytune_emotion.tuning.report.page.draw_all", lambda *_: ())  # as `no_plots` does
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        code = exit_code(["search", *argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="class")
def begun(cluster, tmp_path_factory, faces):
    folder = tmp_path_factory.mktemp("a study")
    (folder / "space.yaml").write_text(SMALL_SPACE)
    options = ["--data", faces, "--space", "space.yaml", "--trials", 4, "--epochs", 2, "--name", "first"]
    options += ["--objective", BY_SIZE]
    code, out, err = search_on_cluster(*options, cwd=folder)
    assert code == 0, err
    return folder, out, err


def front_of(table):
    """The rows that no smaller model has bettered, of a table that has the best first."""
    rows = [*table.itertuples()]
    return [row for i, row in enumerate(rows) if all(row.params_millions < above.params_millions for above in rows[:i])]


@pytest.fixture(scope="class")
def study(begun):
    return begun[0] / "ray_results" / "first"


class TestAStudy:
    def test_says_what_came_out_and_what_to_type_next(self, begun, study):
        _, out, err = begun
        table = pd.read_csv(study / "trials.csv", dtype={"trial_id": str})
        best = table.iloc[0]
        lines = out.splitlines()
        assert f"best JS     {best.best_val_js:.4f} bits, trial {best.trial_id} (4 trials)" in lines
        assert any(re.fullmatch(r"baseline    0\.4\d{3} bits, predicting the training mean", line) for line in lines)
        assert "exported    ray_results/first/best" in lines
        # Another trial may be as good as the best: `test_conclusion.py`.
        assert [line for line in lines if "  # trial" not in line][-4:] == [
            "next:",
            "  python -m raytune_emotion.predict ray_results/first/best FACE.jpg",
            "  tensorboard --logdir ray_results/first/trials",
            "  python -m raytune_emotion.search --resume --results ray_results --name first --trials 8",
        ]
        assert len([line for line in lines if re.match(r"000\d  (complete|pruned)  ", line)]) == 4
        printed = out.partition("Pareto front: no smaller model has a lower JS")[2]
        assert re.findall(r"^ +(\d{4}) +test_", printed, re.MULTILINE) == [row.trial_id for row in front_of(table)]
        assert "Traceback" not in err

    def test_leaves_the_files_of_the_contract_and_no_others(self, study):
        names = {path.name for path in study.iterdir()}
        assert {name for name in names if not name.endswith((".png", ".csv"))} == {
            ".lock", "study.yaml", "optuna.journal", "curves.parquet", "report.html", "trials", "best",
        }  # fmt: skip
        assert {"trials.csv", "results.csv", "predictions.csv"} <= names
        assert {path.name for path in (study / "best").iterdir()} == {
            "model.safetensors", "config.json", "metrics.json", "README.md",
        }  # fmt: skip
        trials = sorted((study / "trials").iterdir())
        assert [path.name for path in trials] == ["0000", "0001", "0002", "0003"]
        for trial in trials:
            names = {path.name for path in trial.iterdir() if not path.name.startswith("events.out.tfevents.")}
            always = {"params.json", "data.txt", "history.jsonl"}
            assert always <= names <= always | {"last.safetensors", "best.safetensors", "predictions.safetensors"}
            assert len(list(trial.glob("events.out.tfevents.*"))) == 1
        table = pd.read_csv(study / "trials.csv", dtype={"trial_id": str})
        kept = {*table.trial_id[:KEPT], *(row.trial_id for row in front_of(table))}
        assert {file.parent.name for file in study.glob("trials/*/best.safetensors")} == kept
        assert [path.name for path in study.parent.iterdir()] == ["first"]

    def test_its_tables_are_those_of_its_trials(self, study):
        table = pd.read_csv(study / "trials.csv", dtype={"trial_id": str})
        assert sorted(table.trial_id) == ["0000", "0001", "0002", "0003"]
        assert table.best_val_js.is_monotonic_increasing
        assert set(table.status) <= {"complete", "pruned"}
        assert set(table["model.backbone"]) <= {"test_resnet", "test_vit"}
        assert (abs(table["loss.kl"] + table["loss.js"] - 1) < 1e-9).all()
        curves = pd.read_parquet(study / "curves.parquet")
        for row in table.itertuples():
            history = read_history(study / "trials" / row.trial_id)
            assert row.best_val_js == pytest.approx(min(report["val_js"] for report in history))
            assert list(curves[curves.trial_id == row.trial_id].val_js) == [report["val_js"] for report in history]
            assert row.epochs == history[-1]["epoch"]
            assert row.epochs == 2 or row.status == "pruned"

    def test_timm_loads_its_best(self, study):
        model = timm.create_model(f"local-dir:{study / 'best'}", pretrained=True).eval()
        with torch.inference_mode():
            assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 13)
        table = pd.read_csv(study / "trials.csv")
        assert json.loads((study / "best" / "metrics.json").read_text())["val_js"] == table.best_val_js[0]

    def test_goes_on_with_more_trials(self, study, tmp_path, without_ray):
        study = shutil.copytree(study, tmp_path / "ray_results" / "first")
        before = pd.read_csv(study / "trials.csv", dtype={"trial_id": str}).set_index("trial_id").sort_index()
        code, out, err = search_on_cluster("--resume", "--trials", 5, cwd=tmp_path)  # the newest, without a name
        assert code == 0, err
        after = pd.read_csv(study / "trials.csv", dtype={"trial_id": str}).set_index("trial_id").sort_index()
        assert list(after.index) == ["0000", "0001", "0002", "0003", "0004"]
        pd.testing.assert_frame_equal(after.loc[before.index, before.columns], before)
        assert [line[:4] for line in out.splitlines() if re.match(r"00\d\d  ", line)] == ["0004"]
