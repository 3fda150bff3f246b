"""Studies on a real Ray cluster, whose trials train nothing."""

import contextlib
import dataclasses
import errno
import gc
import os
import re
import signal
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial

from raytune_emotion.errors import Breakdown
from raytune_emotion.interruption import handle_signals, wait_unless_interrupted
from raytune_emotion.tuning.execution import runner, tune_adapter
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.placement import Demand
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.execution.trial_actor import TrialActor
from raytune_emotion.tuning.policy import freeze_thaw
from raytune_emotion.tuning.study import open_study
from raytune_emotion.tuning.study.endings import Broken, Failed
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.records import KEPT
from tests.support.cluster import RUN_SPACE, held_resources
from tests.support.stand_in import stand_in
from tests.support.studies import spec_of


@pytest.fixture
def begin(tmp_path, store, cluster):
    """Makes a study and returns what runs it."""

    def make(name="study", *, space=RUN_SPACE, concurrency=1, **changes):
        folder = tmp_path / name
        make_study(folder, spec_of(store, name=name, space=space, concurrency=concurrency, **changes))

        def go(watch=lambda event: None, say=lambda text: None, **more):
            study = load(folder)
            study = study.with_spec(dataclasses.replace(study.spec, **more))
            place = fit_to_cluster(Demand(workers=1, gpus_per_worker=0.0, concurrency=concurrency))
            run_study(StudyRun(study, place, watch=watch, say=say))
            return study.records()

        return folder, go

    return make


def test_a_study_runs_from_its_space_to_its_tables_and_paused_trials_go_on_where_they_were(begin, monkeypatch):
    """What its actors train is nothing; real training is in `TestAStudy` of `test_search.py`."""
    # Else it would depend on the seconds that an epoch takes here whether a trial is taken up at all.
    monkeypatch.setattr(freeze_thaw, "_TAKE_UP_SHARE", 1e9)
    monkeypatch.setattr(runner, "TrialActor", stand_in())
    for name in ("_SILENT_S", "_SILENT_TIMES"):
        monkeypatch.setattr(tune_adapter, name, 0)  # each trial between two of its reports
    events, said = [], []
    folder, go = begin(trials=5, epochs=6, scheduler="freeze-thaw")

    def watch(event):
        events.append(event)
        if sum(event.status != "running" for event in events) == 5:  # a pause ends a trial of Tune's too
            assert sum(type(each) is Trial for each in gc.get_objects()) <= 2, "Tune keeps trials that have ended"

    def process():
        """What a study may not leave changed: Ray Tune leaves its handlers of signals (C6)."""
        without_clocks = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        return [signal.getsignal(number) for number in without_clocks], dict(os.environ)

    before = process()
    records = go(watch, said.append)
    assert process() == before
    assert any(re.match(r"trial \d{4} \(process \d+ on .+\) has not reported for 0 min; ", line) for line in said)
    assert [r.trial_id for r in records] == [f"{i:04d}" for i in range(5)]
    assert {r.status for r in records} == {"complete", "pruned"}
    paused = {event.proposal.trial_id for event in events if event.status == "paused"}
    assert paused & {r.trial_id for r in records if r.status == "complete"}
    for record in records:
        assert [report["report"] for report in record.reports] == [*range(1, len(record.reports) + 1)]
        assert (len(record.reports) == 6) == (record.status == "complete")

    told = load_study(folder).trials
    for record, trial in zip(records, told, strict=True):
        assert trial.state == {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}[record.status]
        assert trial.intermediate_values == {r["report"]: r["best_val_js"] for r in record.reports}
    table = pd.read_csv(folder / "trials.csv", dtype={"trial_id": str})
    assert len(table) == 5
    assert table["best_val_js"].is_monotonic_increasing
    assert len(list(folder.glob("trials/*/best.safetensors"))) == KEPT
    assert len({event.proposal.trial_id for event in events}) == 5
    assert held_resources() == (0.0, [])


def test_a_disk_that_is_full_before_a_study_goes_on_is_said(begin, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder, go = begin()
    monkeypatch.setattr(open_study, "read_records", full)
    with pytest.raises(Breakdown, match=f"{folder}: no space left on the disk; the study can be resumed: {folder}"):
        go()


def test_the_stand_in_for_the_actor_has_its_methods():
    def public(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(stand_in()) - {"ending"} == public(TrialActor)


def test_trials_fail_for_good_or_go_on_in_smaller_micro_batches_and_a_full_disk_ends_the_study(begin, monkeypatch):
    class Actor(stand_in()):
        """Diverge in the first trial, have no room for the second, little for the third, no disk for the fourth."""

        def ending(self, trial_id, report):
            ends = {"0000": Failed("diverged"), "0001": Failed("out of memory"), "0003": Broken("no space left")}
            if trial_id == "0002" and report == 2 and self.settings.get("train.accumulate", 1) < 2:
                # As Ray says of a process that its memory monitor has killed.
                raise RuntimeError("1 worker(s) were killed due to the node running low on memory. And so on.\nHelp.")
            return ends.get(trial_id)

    monkeypatch.setattr(runner, "TrialActor", Actor)
    folder, go = begin(trials=4, epochs=2)
    with pytest.raises(Breakdown, match="no space left; the study can be resumed"):
        go()
    records = load(folder).records()
    diverged, too_large, complete, _ = records
    assert (diverged.reason, too_large.reason) == ("diverged", "out of memory")
    assert [r["accumulate"] for r in complete.reports] == [1, 2]
    assert [r.status for r in records] == ["failed", "failed", "complete", "running"]
    ended = [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    assert [t.state for t in load_study(folder).trials] == [*ended, TrialState.RUNNING]


@pytest.mark.long
def test_a_process_that_dies_ends_no_trial_and_an_interruption_between_two_trials_the_study(
    begin, tmp_path, monkeypatch
):
    class DyingTrialActor(stand_in()):
        """Dies between the writing of a report and the hearing of it, twice, and fails once to leave a trial.

        As the second death comes after a new report, both are no more than the one that a trial may have.
        """

        def reset(self, config):
            if not (tmp_path / "stuck").exists():
                (tmp_path / "stuck").touch()
                raise RuntimeError("a worker has died")
            return super().reset(config)

        def train(self):
            result = super().train()
            mark = tmp_path / f"died at {result['report']}"
            if result["report"] < 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    ended, killed = [], []

    def kill_and_interrupt(event):
        if event.status == "complete" and not killed:
            killed.append(kill("TrialActor"))
        if event.status in ("complete", "pruned"):
            ended.append(event)
            if len(ended) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "TrialActor", DyingTrialActor)
    folder, go = begin(trials=4, epochs=3, max_failures=1)
    with pytest.raises(KeyboardInterrupt):
        go(kill_and_interrupt)
    records = go()
    assert len(records) == 4
    assert killed
    assert (tmp_path / "stuck").exists()
    assert records[0].status == "complete"
    assert {r.status for r in records} <= {"complete", "pruned"}
    for record, trial in zip(records, load_study(folder).trials, strict=True):
        assert [r["report"] for r in record.reports] == list(range(1, len(record.reports) + 1))
        assert trial.intermediate_values == {r["report"]: r["best_val_js"] for r in record.reports}
    assert [r["report"] for r in records[0].reports] == [1, 2, 3]
    assert go() == records, "all have ended"


def test_trials_share_the_cores(cluster):
    for concurrency, cpus, at_once in ((None, 1.0, 2), (1, 2.0, 1), (2, 1.0, 2)):
        place = fit_to_cluster(Demand(workers=1, gpus_per_worker=None, concurrency=concurrency))
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
    ended, waits, said = [], threading.Event(), threading.Event()

    def say(text):
        assert text.startswith("interrupted: the record and the results are being completed; ")
        said.set()

    def tune_trials(recorder, run, stop, scratch):
        assert waits.wait(600)
        os.kill(os.getpid(), signal.SIGTERM)
        assert said.wait(60), "the interruption is said at once, before the wait for the last reports"
        assert stop.wait(600)
        time.sleep(0.5)
        ended.append("in order")

    monkeypatch.setattr(runner, "_tune", tune_trials)
    recorder = SimpleNamespace(shortfall="", broken="", check=waits.set)
    with handle_signals(), pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as leaving:
        runner._run(recorder, StudyRun(None, None, say=say), leaving)
    assert ended == ["in order"]


def test_ray_is_left_after_a_thread_that_an_outage_has_held_up(monkeypatch):
    """It waits for a URI within the recorder, and ends only once the record is closed."""
    closed, ended = threading.Event(), []

    def tune_trials(*_):
        assert closed.wait(600)
        time.sleep(0.5)
        ended.append("in order")

    recorder = SimpleNamespace(shortfall="", broken="", check=lambda: None, close=closed.set)
    monkeypatch.setattr(runner, "_tune", tune_trials)
    monkeypatch.setattr(runner, "Recorder", lambda *_, **__: recorder)
    waits = runner.wait_for_end
    # The time of an outage is longer than the time for an end in order.
    monkeypatch.setattr(runner, "wait_for_end", lambda *given: waits(*given[:2], 30.0 if closed.is_set() else 0.1))
    run_study(StudyRun(SimpleNamespace(), None, time_budget=timedelta(microseconds=1)))
    assert ended == ["in order"]


def test_an_interruption_while_a_uri_is_away_stays_one(monkeypatch, capsys):
    """Slurm requeues a job that was interrupted, and none that failed."""

    class Away:
        broken = ""

        def close(self):
            raise Breakdown("the URI is away")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "Recorder", lambda *_, **__: Away())
    monkeypatch.setattr(runner, "_run", interrupt)
    run = SimpleNamespace(study=None, watch=None, until_gain=None)
    with pytest.raises(KeyboardInterrupt):
        run_study(run)
    assert capsys.readouterr().err == "the URI is away\n"
    monkeypatch.setattr(runner, "_run", lambda *_: None)
    with pytest.raises(Breakdown, match="the URI is away"):
        run_study(run)


@pytest.mark.parametrize(("fault", "told"), [(None, ""), (Breakdown("the URI is away"), "the URI is away\n")])
def test_a_signal_does_not_cut_the_record_that_is_being_closed(monkeypatch, capsys, fault, told):
    """The time budget is spent, and Slurm sends its signal. The signal ends the wait for a URI, and nothing else."""
    closed = []

    class Recorder:
        broken = ""

        def close(self):
            os.kill(os.getpid(), signal.SIGTERM)
            assert not wait_unless_interrupted(60)
            closed.append("in order")
            if fault is not None:
                raise fault

    monkeypatch.setattr(runner, "Recorder", lambda *_, **__: Recorder())
    monkeypatch.setattr(runner, "_run", lambda *_: None)
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        run_study(SimpleNamespace(study=None, watch=None, until_gain=None))
    assert closed == ["in order"]
    assert capsys.readouterr().err == told
