"""The process of a trial, without Ray."""

import dataclasses
import errno
import platform
import subprocess
import time
from pathlib import Path

import pytest

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.report import DRIVER_KEYS
from raytune_emotion.learn.run_folder import read_history
from raytune_emotion.storage import locations
from raytune_emotion.tuning.execution import trial_actor
from raytune_emotion.tuning.execution.job import (
    DiskFull,
    InvalidForRun,
    Job,
    OutOfMemory,
    TrialFailed,
    job_of,
    train_here,
)
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.trial_actor import ENDING, NODES, TrialActor
from raytune_emotion.tuning.study.endings import Broken, Failed
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.studies import ONE_CORE, run_here, spec_of


@pytest.fixture
def job(tmp_path, store):
    settings = {
        "model.backbone": "test_vit", "data.image_size": store.image_size, "train.epochs": 2, "train.batch_size": 32,
    }  # fmt: skip
    return Job(
        "a trial", str(tmp_path / "study" / "trials" / "0000"), str(store.path), settings, Resources(1, 1.0, 0.0)
    )


def test_a_result_is_what_the_driver_hears(job):
    actor = TrialActor(job.to_dict())
    results = [actor.train(), actor.train()]
    assert [set(result) for result in results] == [{"pid", "host", "nodes", *DRIVER_KEYS}] * 2
    assert [result["finished"] for result in results] == [False, True]
    actor.stop()


def test_a_process_goes_from_trial_to_trial_and_says_again_what_was_not_heard(job, tmp_path):
    actor = TrialActor(job.to_dict())
    first = actor.train()
    other = dataclasses.replace(job, folder=str(tmp_path / "study" / "trials" / "0001"))
    assert actor.reset(other.to_dict())
    assert actor.train()["report"] == 1
    began = time.time()
    assert actor.reset(job.to_dict())
    again, second = actor.train(), actor.train()
    assert again == first
    resumed_in, trained = second.pop("resumed_in"), second["seconds"] - first["seconds"]
    assert 0 < resumed_in <= time.time() - began - trained + 0.1
    assert (second["report"], second["finished"]) == (2, True)
    assert [report["report"] for report in read_history(tmp_path / "study" / "trials" / "0000")] == [1, 2]
    assert actor.reset(job.to_dict())
    assert actor.train() == second, "its ending was not heard"


def test_a_full_disk_ends_the_study_which_can_be_resumed(store, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        folder = disk / "study"
        space = {"model.backbone": "test_vit", "optim.lr": {"log_uniform": [1e-4, 1e-2]}}
        make_study(folder, spec_of(store, space=space, trials=2, epochs=6))
        study = load(folder)
        recorder = Recorder(study)
        while (proposal := recorder.next()) is not None:
            actor, goes_on = TrialActor(job_of(study, ONE_CORE, proposal).to_dict()), True
            while goes_on:
                result = actor.train()
                if ENDING in result:
                    recorder.end(proposal.trial_id, result[ENDING])
                    break
                goes_on = recorder.report(proposal.trial_id, result)
            actor.stop()
        with pytest.raises(Breakdown, match="no space left on the disk; the study can be resumed"):
            recorder.close()
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        records = run_here(load(folder))
        assert {r.status for r in records} <= {"complete", "pruned"}
        assert [r["report"] for r in records[0].reports] == list(range(1, 7))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_of_temporary_files_ends_the_study_and_not_the_trial(job, tmp_path, monkeypatch):
    """The checkpoint of a trial at a URI is copied there before anything is trained."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/raytune_emotion-x")

    at_uri = dataclasses.replace(job, location=(tmp_path / "place").as_uri())
    monkeypatch.setattr(locations, "scratch_folder", full)
    ending = TrialActor(at_uri.to_dict()).train()[ENDING]
    told = f"{platform.node()}, /tmp/raytune_emotion-x: no space left on the disk"
    assert ending == Broken(told)
    with pytest.raises(DiskFull, match=told):  # as each of several workers trains
        next(train_here(at_uri))


def test_data_that_a_machine_does_not_see_end_the_study_and_not_the_trial(job, tmp_path):
    """Such a machine would fail one trial after the other."""
    away = dataclasses.replace(job, store=str(tmp_path / "elsewhere"))
    ending = TrialActor(away.to_dict()).train()[ENDING]
    assert isinstance(ending, Broken)
    what = f"{tmp_path / 'elsewhere'}: not a packed store, because it has no manifest.json; name a store"
    assert ending.reason.startswith(f"{what}; put the data where ")


@pytest.mark.parametrize("workers", [1, 2])
def test_machine_that_does_not_see_the_study_ends_it_and_makes_no_folder(store, tmp_path, workers):
    folder = tmp_path / "study"
    make_study(folder, spec_of(store, trials=1))
    study = load(folder)
    job = job_of(study, Resources(workers, 1.0, 0.0), Recorder(study).next())
    folder.rename(tmp_path / "elsewhere")
    ending = TrialActor(job.to_dict()).train()[ENDING]
    assert isinstance(ending, Broken)
    assert ending.reason.startswith(f"{folder}: there is no study.yaml in it; put the results where ")
    assert not folder.exists()


def test_a_machine_that_refuses_what_has_trained_ends_the_study_and_not_the_trial(job):
    """As one without a GPU does with fp16: the trial goes on elsewhere."""
    in_fp16 = dataclasses.replace(job, settings={**job.settings, "train.precision": "fp16"}).to_dict()
    refusal = "train.precision: fp16 needs a GPU; choose bf16 or fp32"
    assert TrialActor(in_fp16).train()[ENDING] == Failed(refusal), "it has never trained"
    before = TrialActor(job.to_dict())
    report = before.train()
    before.stop()
    actor = TrialActor(in_fp16)
    assert actor.train() == report
    ending = actor.train()[ENDING]
    assert isinstance(ending, Broken)
    assert ending.reason.startswith("trial a trial has trained before, but ")
    assert ending.reason.endswith(f" refuses it now: {refusal}")


def test_a_trial_that_ran_out_of_memory_goes_on_in_the_micro_batches_that_fit(job):
    attempts = []

    class Actor(TrialActor):
        def _attempt(self, job):
            attempts.append((job.accumulate, job.resident))
            if job.accumulate == 1:
                raise OutOfMemory("out of memory on the device")
            yield from super()._attempt(job)

    before = Actor(job.to_dict())
    before.train()
    before.stop()
    assert attempts == [(1, True), (2, False)]
    actor = Actor(job.to_dict())
    assert [actor.train()["report"], actor.train()["report"]] == [1, 2]
    actor.stop()  # before its folder is deleted
    assert attempts[2:] == [(2, False)]


def test_trial_whose_process_was_killed_for_its_memory_goes_on_in_micro_batches_of_half_the_size(job):
    """Also where they had been made smaller before."""
    for accumulate, epochs in ((2, 1), (4, 2)):
        settings = {**job.settings, "train.accumulate": accumulate}
        actor = TrialActor(dataclasses.replace(job, settings=settings).to_dict())
        results = [actor.train() for _ in range(epochs)]
        actor.stop()
    assert [result["report"] for result in results] == [1, 2]
    assert [report["accumulate"] for report in read_history(Path(job.folder))] == [2, 4]


@pytest.mark.parametrize(
    ("before", "workers", "expected"),
    [
        ((1, 2), 1, 2),
        ((1, 2), 4, 1),  # of 8 rows each, where 16 fitted
        ((4, 2), 1, 8),
        ((4, 1), 1, 1),  # no memory had run out
    ],
)
def test_micro_batches_have_as_few_rows_as_fitted_before_on_however_many_workers(job, before, workers, expected):
    attempts = []

    class Actor(TrialActor):
        def _attempt(self, job):
            attempts.append(job.accumulate)
            yield from ()

    report = {**dict.fromkeys(DRIVER_KEYS, 0), "workers": before[0], "accumulate": before[1]}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trial_actor, "newest_report", lambda job: report)
        actor = Actor(dataclasses.replace(job, resources=Resources(workers, 1.0, 0.0)).to_dict())
        for _ in range(2):
            actor.train()
    assert attempts == [expected]


def test_micro_batches_that_become_too_small_fail_a_trial_that_has_trained(job):
    """They would be refused again, whenever memory runs out again. The lack of memory is the reason."""

    class Actor(TrialActor):
        def _train_together(self, job):
            if job.accumulate == 1:
                raise OutOfMemory("out of memory on the device")
            raise InvalidForRun(("a micro-batch of one row",))
            yield

    before = TrialActor(job.to_dict())
    before.train()
    before.stop()
    two = dataclasses.replace(job, resources=Resources(2, 1.0, 0.0))
    actor = Actor(two.to_dict())
    actor.train()
    assert actor.train()[ENDING] == Failed("out of memory on the device")


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (TrialFailed("the loss is not a number"), Failed("the loss is not a number")),
        (OutOfMemory("out of memory on the device"), Failed("out of memory on the device")),
        (Breakdown("the URI is away"), Broken("the URI is away")),
    ],
)
def test_what_ends_a_trial_is_a_result_with_a_type(job, error, ending):
    class Actor(TrialActor):
        def _attempt(self, job):
            raise error
            yield

    actor = Actor(job.to_dict())
    assert actor.train() == {ENDING: ending, NODES: actor._nodes}
