"""When the expected gain of a study is computed, and when a study ends by it; driven by hand, without Ray."""

import dataclasses
import math
import threading
import time
from types import SimpleNamespace

import pytest

from raytune_emotion.tuning.execution import gain_watch, runner
from raytune_emotion.tuning.execution.gain_watch import GainWatch
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.report.summary import BestTrial, describe, gain_text, summarize
from raytune_emotion.tuning.study.open_study import load, make_study, raise_epochs
from raytune_emotion.tuning.study.optuna_study import expected_gain
from tests.support.events import Clock
from tests.support.reports import make_report
from tests.support.studies import spec_of, train

SPACE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss": "kl"}
MUCH = 1e9  # bits an hour, more than anything brings


@pytest.fixture
def make(tmp_path, store):
    def made(**changes):
        make_study(tmp_path / "study", spec_of(store, space=SPACE, trials=12, epochs=3, **changes))
        return tmp_path / "study"

    return made


def run(recorder):
    """Run trials one after the other, until the recorder gives none; return their ids."""
    begun = []
    while (proposal := recorder.next()) is not None:
        begun.append(proposal.trial_id)
        for epoch in (1, 2, 3):
            js = 0.3 + 0.1 / epoch + proposal.settings["optim.lr"] * 10
            if not recorder.report(proposal.trial_id, make_report(epoch, js, finished=epoch == 3, time=1.0 * epoch)):
                break
    return begun


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [("freeze-thaw", "forecast"), ("freeze-thaw", "qmc"), ("asha", "random"), ("hyperband", "tpe"),
     ("median", "forecast"), ("none", "random")],
)  # fmt: skip
def test_a_study_ends_once_little_is_expected_and_goes_on_when_it_is_asked_to(make, scheduler, sampler):
    folder, clock = make(scheduler=scheduler, sampler=sampler), Clock()
    recorder = Recorder(load(folder), until_gain=MUCH, clock=clock)
    begun = run(recorder)
    recorder.close()
    assert 4 <= len({*begun}) < 12
    gain = expected_gain(load(folder).optuna)
    assert 0 < gain.per_hour < MUCH
    assert recorder.shortfall == (
        f"further training is expected to gain {gain.per_hour:.2g} bits an hour ({gain.bits:.2g} with the next "
        f"trial), less than 1e+09: running trials are left as they are"
    )
    assert run(Recorder(load(folder), until_gain=MUCH, clock=clock)) == []
    goes_on = Recorder(load(folder), until_gain=1e-9, clock=clock)
    run(goes_on)
    goes_on.close()
    records = load(folder).records()
    assert len(records) == 12
    assert {record.status for record in records} <= {"complete", "pruned"}
    assert goes_on.shortfall == ""


def test_the_study_that_ran_is_told_its_gain_by_status_and_events(make):
    folder, heard = make(), []
    recorder = Recorder(load(folder), heard.append, clock=Clock())
    run(recorder)
    recorder.close()
    study = load(folder)
    gain = expected_gain(study.optuna)
    assert [event.gain for event in heard if event.status != "running"][-1] == gain
    summary = summarize(study, study.records(), now=time.time())
    told = dataclasses.asdict(summary)
    assert told["expected_gain"] == {"bits": gain.bits, "seconds": gain.seconds}
    assert told["expected_gain_per_hour"] == 3600 * gain.bits / gain.seconds
    reached = dataclasses.replace(summary, best=BestTrial("0003", "complete", 0.3, 3.0, {}))
    assert f"gain        {gain_text(gain)}" in describe(reached)


def test_the_gain_at_the_end_is_that_of_the_last_ending(make, monkeypatch):
    monkeypatch.setattr(gain_watch, "_SHARE", 1e-9)  # it is due once
    folder = make()
    recorder = Recorder(load(folder))
    run(recorder)
    recorder.close()
    gain = expected_gain(load(folder).optuna)
    assert gain is not None
    Recorder(load(folder))  # it computes the gain again
    assert expected_gain(load(folder).optuna) == gain


def test_a_study_that_ended_by_its_gain_goes_on_with_more_epochs(make):
    def run_all(recorder, epochs):
        begun = []
        while (proposal := recorder.next()) is not None:
            begun.append(proposal.continues)
            for report in train(study.folder, proposal.trial_id, 0.2 + 0.01 * len(begun), epochs=epochs):
                if not recorder.report(proposal.trial_id, report):
                    break
        recorder.close()
        return begun

    study = load(make())
    begun = run_all(Recorder(study, until_gain=MUCH), 3)
    assert len(begun) < 12
    for epochs in (6, 12):
        study = raise_epochs(study, dataclasses.replace(study.spec, epochs=epochs))
        recorder = Recorder(study, until_gain=MUCH)
        assert expected_gain(study.optuna) is None, "no trial has reached the new end"
        assert run_all(recorder, epochs)[0] is not None, "the best goes on"


def test_a_confirmation_has_no_gain(make):
    study = load(make(confirms={"0001": 0.3}, scheduler="none"))
    recorder = Recorder(study, until_gain=MUCH, clock=Clock())
    assert {*run(recorder)} == {f"{number:04d}" for number in range(12)}
    assert expected_gain(study.optuna) is None
    assert recorder.shortfall == ""


def test_the_gain_is_computed_in_a_small_share_of_the_time():
    clock, asked = Clock(), []

    def note_gain(forecast):
        asked.append(clock.now)
        clock.now += 0.1  # that it takes
        return Gain(0.5, 3600.0)

    watch = GainWatch(SimpleNamespace(note_gain=note_gain), lambda past: None, until=None, clock=clock)
    for _ in range(2000):
        watch.update()
        clock.now += 0.01
    # 20 s and what it took: each takes 0.1 s, after which there are 5 s of rest.
    assert len(asked) == 4
    assert watch.value == Gain(0.5, 3600.0)
    assert watch.shortfall == ""


def test_a_run_ends_in_order_and_says_why(make, monkeypatch):
    """Without Ray: in its place, a thread runs trials by hand until there are none, and waits to be stopped."""
    folder, said, stopped = make(), [], threading.Event()

    def tune(recorder, study_run, stop, scratch):
        run(recorder)
        assert stop.wait(60)
        stopped.set()

    monkeypatch.setattr(runner, "_tune", tune)
    monkeypatch.setattr(gain_watch, "_SHARE", math.inf)  # the trials take no time
    run_study(StudyRun(load(folder), None, until_gain=MUCH, say=said.append))
    assert stopped.is_set()
    assert len(load(folder).records()) < 12
    (sentence,) = said
    assert sentence.startswith("further training is expected to gain ")
