"""Studies on a real Ray cluster, with real training of tiny models."""

import contextlib
import dataclasses
import errno
import gc
import os
import signal
import subprocess
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial

from raytune_emotion.errors import Breakdown
from raytune_emotion.interruption import handle_signals
from raytune_emotion.learn.run_folder import read_history
from raytune_emotion.tuning.execution import runner
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.job import OutOfMemory, job_of, train_here
from raytune_emotion.tuning.execution.runner import run_study
from raytune_emotion.tuning.execution.trial_actor import TrialActor
from raytune_emotion.tuning.policy import freeze_thaw
from raytune_emotion.tuning.study import open_study
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import Proposal, load_study
from raytune_emotion.tuning.study.records import KEPT, trial_folder
from tests.support.cluster import RUN_SPACE, held_resources
from tests.support.reports import without_clocks
from tests.support.studies import run_here, spec_of


@pytest.fixture
def begin(tmp_path, store, cluster):
    """Makes a study and returns what runs it."""

    def make(name="study", *, space=RUN_SPACE, concurrency=1, **changes):
        folder = tmp_path / name
        make_study(folder, spec_of(store, name=name, space=space, concurrency=concurrency, **changes))

        def go(watch=lambda event: None, **more):
            study = load(folder)
            study = study.with_spec(dataclasses.replace(study.spec, **more))
            place = fit_to_cluster(workers=1, gpus_per_worker=0.0, concurrency=concurrency)
            return run_study(study, place, watch=watch)

        return folder, go

    return make


def test_a_trial_that_paused_goes_on_where_it_was_and_ends(begin, monkeypatch):
    # Else it would depend on the seconds that an epoch takes here whether a trial is taken up at all.
    monkeypatch.setattr(freeze_thaw, "_TAKE_UP_SHARE", 1e9)
    heard = []
    _, go = begin(trials=5, epochs=6, scheduler="freeze-thaw")
    records = go(watch=lambda event: heard.append((event.proposal.trial_id, event.status)))
    paused = {trial_id for trial_id, status in heard if status == "paused"}
    assert paused & {record.trial_id for record in records if record.status == "complete"}
    assert {record.status for record in records} == {"complete", "pruned"}
    for record in records:
        assert [report["report"] for report in record.reports] == [*range(1, len(record.reports) + 1)]
    assert held_resources() == (0.0, [])


def test_a_study_runs_from_its_space_to_its_tables(begin):
    events = []
    folder, go = begin(trials=7, epochs=3)

    def watch(event):
        events.append(event)
        if sum(event.status != "running" for event in events) == 7:
            assert sum(type(each) is Trial for each in gc.get_objects()) <= 2, "Tune keeps trials that have ended"

    def process():
        """What a study may not leave changed: Ray Tune leaves its handlers of signals (C6)."""
        without_clocks = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        return [signal.getsignal(number) for number in without_clocks], dict(os.environ)

    before = process()
    records = go(watch)
    assert process() == before
    assert [r.trial_id for r in records] == [f"{i:04d}" for i in range(7)]
    assert {r.status for r in records} == {"complete", "pruned"}
    # No rung is passed by more than those that deserve it, and a complete trial has all its reports.
    assert all(len(r.reports) == 3 for r in records if r.status == "complete")
    assert all(len(r.reports) < 3 for r in records if r.status == "pruned")

    told = load_study(folder).trials
    for record, trial in zip(records, told, strict=True):
        assert trial.state == {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}[record.status]
        assert trial.intermediate_values == {r["report"]: r["best_val_js"] for r in record.reports}
    table = pd.read_csv(folder / "trials.csv", dtype={"trial_id": str})
    assert len(table) == 7
    assert table["best_val_js"].is_monotonic_increasing
    assert len(list(folder.glob("trials/*/best.safetensors"))) == KEPT
    assert all(any(trial_folder(folder, r.trial_id).glob("events.out.tfevents.*")) for r in records)
    assert len({event.proposal.trial_id for event in events}) == 7
    assert held_resources() == (0.0, [])


def test_a_trial_is_the_same_in_a_fresh_process_in_a_reused_one_and_in_none_of_rays(begin, tmp_path):
    folder, go = begin(space={**RUN_SPACE, "loss": "kl"}, trials=4, epochs=2)
    records = go()
    resources = fit_to_cluster(workers=1, gpus_per_worker=0.0, concurrency=1).resources
    for record in (records[0], records[-1]):
        job = job_of(load(folder), resources, Proposal(record.trial_id, record.settings, None))
        alone = dataclasses.replace(job, folder=str(tmp_path / record.trial_id), location=None)
        with contextlib.closing(train_here(alone)) as reports:
            assert without_clocks(record.reports) == without_clocks(islice(reports, len(record.reports)))


def test_a_full_disk_ends_the_study_which_can_be_resumed(store, cluster, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        folder = disk / "study"
        space = {"model.backbone": "test_vit", "optim.lr": {"log_uniform": [1e-4, 1e-2]}}
        make_study(folder, spec_of(store, space=space, trials=2, epochs=6))
        place = fit_to_cluster(workers=1, gpus_per_worker=0.0, concurrency=1)
        with pytest.raises(Breakdown, match="no space left on the disk; the study can be resumed"):
            run_study(load(folder), place)
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        records = run_here(load(folder), place.resources)
        assert {r.status for r in records} <= {"complete", "pruned"}
        assert [r["report"] for r in records[0].reports] == list(range(1, 7))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_before_a_study_goes_on_is_said(begin, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, go = begin()
    monkeypatch.setattr(open_study, "read_records", full)
    with pytest.raises(Breakdown, match=f"{folder}: no space left on the disk; the study can be resumed: {folder}"):
        go()


def test_trials_fail_for_good_or_go_on_in_smaller_micro_batches_and_the_study_goes_on(begin, monkeypatch):
    class Actor(TrialActor):
        """Have no room for the second trial, and little for the third: 16 rows, and from its second epoch on 8."""

        def _attempt(self, job):
            trial_id, accumulate = Path(job.folder).name, job.settings.get("train.accumulate", 1)
            # As Ray says of a process that its memory monitor has killed.
            killed = RuntimeError("1 worker(s) were killed due to the node running low on memory. And so on.\nHelp.")
            if trial_id == "0001" or (trial_id == "0002" and accumulate < 2):
                raise OutOfMemory("out of memory on the device")
            if trial_id == "0002" and accumulate < 4 and read_history(Path(job.folder)):
                raise killed
            for report in super()._attempt(job):
                yield report
                if trial_id == "0002" and accumulate < 4:
                    raise killed

    monkeypatch.setattr(runner, "TrialActor", Actor)
    rates = [100.0, 1e-2, 1e-3]
    space = {"model.backbone": "test_vit", "optim.name": "sgd", "optim.lr": {"choice": rates}}
    folder, go = begin(space=space | {"start": [{"optim.lr": rate} for rate in rates]}, trials=3, epochs=2)
    diverged, too_large, complete = go()
    assert diverged.reason.startswith("diverged")
    assert too_large.reason == "out of memory on the device"
    assert [r["accumulate"] for r in complete.reports] == [2, 4]
    assert [r.status for r in (diverged, too_large, complete)] == ["failed", "failed", "complete"]
    assert [t.state for t in load_study(folder).trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]


def test_a_process_that_dies_unheard_or_between_two_trials_ends_none(begin, tmp_path, monkeypatch):
    class DyingTrialActor(TrialActor):
        """Dies once, between the writing of a report and the hearing of it, and fails once to leave a trial."""

        def reset(self, config):
            if not (tmp_path / "stuck").exists():
                (tmp_path / "stuck").touch()
                raise RuntimeError("a worker has died")
            return super().reset(config)

        def train(self):
            result = super().train()
            if not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    killed = []

    def kill_once(event):
        if event.status == "complete" and not killed:
            killed.append(kill("TrialActor"))

    monkeypatch.setattr(runner, "TrialActor", DyingTrialActor)
    folder, go = begin(trials=3, epochs=3)
    records = go(kill_once)
    assert killed
    assert (tmp_path / "stuck").exists()
    assert records[0].status == "complete"
    assert {r.status for r in records} <= {"complete", "pruned"}
    for record, trial in zip(records, load_study(folder).trials, strict=True):
        assert [r["report"] for r in record.reports] == list(range(1, len(record.reports) + 1))
        assert trial.intermediate_values == {r["report"]: r["best_val_js"] for r in record.reports}
    assert [r["report"] for r in records[0].reports] == [1, 2, 3]


def test_an_interruption_between_two_trials_is_one_and_a_study_can_be_extended(begin):
    folder, go = begin(trials=2, epochs=1)

    def interrupt(event):
        if event.status == "complete":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(interrupt)
    study = load(folder)
    after = run_here(study.with_spec(dataclasses.replace(study.spec, trials=4)))
    assert [r.status for r in after] == ["complete"] * 4
    assert go() == after


def test_trials_share_the_cores(cluster):
    for concurrency, cpus, at_once in ((None, 1.0, 2), (1, 2.0, 1), (2, 1.0, 2)):
        place = fit_to_cluster(workers=1, gpus_per_worker=None, concurrency=concurrency)
        assert (place.resources.cpus_per_worker, place.concurrency) == (cpus, at_once)


def kill(title):
    """Kills one of this cluster's processes whose title holds a word."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if command and command[0].startswith("ray::") and title in " ".join(command):
                os.kill(process.pid, signal.SIGKILL)
                return process.pid
    raise AssertionError(f"no process {title}")


def test_an_interrupted_search_leaves_ray_only_after_ray_tune(monkeypatch, tmp_path):
    """A thread that is inside Ray when this process leaves Ray crashes it."""
    ended = []

    def tune_trials(recorder, study, placement, stop, say, scratch):
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
        assert stop.wait(60)
        time.sleep(0.5)
        ended.append("in order")

    monkeypatch.setattr(runner, "_tune", tune_trials)
    recorder = SimpleNamespace(gain=SimpleNamespace(shortfall=""), broken="", check=lambda: None)
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        runner._run(recorder, None, None, None, print, lambda: "")
    assert ended == ["in order"]
