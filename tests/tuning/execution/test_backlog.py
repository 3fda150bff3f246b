"""Several drivers on one study through PostgreSQL, without Ray."""

import contextlib
import dataclasses
import threading
import time
from collections import Counter

import pandas as pd
import pytest

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.execution import backlog as backlog_module
from raytune_emotion.tuning.execution import recorder as recorder_module
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.policy.decisions import Begin, TakeUp
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.study import drivers as drivers_module
from raytune_emotion.tuning.study.confirmation import plan_confirmation
from raytune_emotion.tuning.study.database import join_address
from raytune_emotion.tuning.study.drivers import join_study
from raytune_emotion.tuning.study.open_study import go_on, load, make_study, open_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.request import ConfirmRequest
from raytune_emotion.tuning.study.tables import TRIALS
from tests.support.studies import spec_of, train

SPACE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss": "kl", "start": [{"optim.lr": 1e-3}]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Let nobody wait."""
    monkeypatch.setattr(drivers_module, "_GRACE_S", 0.0)
    monkeypatch.setattr(backlog_module, "_ASK_AGAIN_S", 0.0)


@pytest.fixture
def make(tmp_path, store, postgres):
    """Makes a study in a database, and returns its folder."""
    url = postgres.new_database(tables=True)

    def make(**changes):
        asked = {"space": SPACE, "trials": 4, "epochs": 3, "storage": join_address(url, "first")}
        make_study(tmp_path / "study", spec_of(store, **asked | changes))
        return tmp_path / "study"

    return make


class Driver:
    """A driver that trains one trial at a time, an epoch at a time."""

    def __init__(self, folder):
        self._held = contextlib.ExitStack()
        self.folder, self.study = folder, self._held.enter_context(open_study(folder))
        self.events, self.ran = [], []
        self.recorder = Recorder(self.study, self.events.append)
        self._reports = None

    def work(self):
        """Do a bit: begin a trial, or train it for an epoch. Returns whether there was something to do."""
        if self._reports is None:
            proposal = self.recorder.next()
            if proposal is None:
                return False
            self.ran.append(proposal.trial_id)
            js = 0.3 + int(proposal.trial_id) % 5 / 50
            self._reports = train(self.folder, proposal.trial_id, js, time=time.monotonic())
        if not self.recorder.report(self.ran[-1], next(self._reports)):
            self._reports = None
        self.recorder.write_in_time()  # as after every event of Ray Tune
        return True

    def end(self):
        self.recorder.close()
        self._held.close()

    def die(self):
        """Be gone, as after SIGKILL: the server sees that the connection has closed."""
        self._held.close()
        with join_study(self.study.spec.storage) as watcher:
            while self.study.drivers.own in watcher.others():
                time.sleep(0.01)


def statuses(folder):
    return {record.trial_id: record.status for record in load(folder).records()}


@pytest.mark.parametrize("scheduler", ["asha", "freeze-thaw"])
def test_drivers_in_turns_make_exactly_the_trials_that_were_asked_for(make, scheduler):
    folder = make(trials=5, epochs=5, scheduler=scheduler)
    assert not (folder / JOURNAL).exists()
    one, two = Driver(folder), Driver(folder)
    while any([one.work(), two.work()]):
        pass
    assert one.recorder.is_over
    assert two.recorder.is_over
    assert one.ran
    assert two.ran
    one.end()
    two.end()
    ended = statuses(folder)
    assert [*ended] == [f"{i:04d}" for i in range(5)]
    assert {*ended.values()} <= {"complete", "pruned"}
    table = pd.read_csv(folder / TRIALS, dtype={"trial_id": str}).set_index("trial_id")
    assert table["status"].to_dict() == ended
    for driver in (one, two):  # each has heard of every ending once
        heard = Counter(e.proposal.trial_id for e in driver.events if e.status in ("complete", "pruned"))
        assert heard == Counter([*ended])
    for record in load(folder).records():
        assert [report["report"] for report in record.reports] == [*range(1, len(record.reports) + 1)]
    # A confirmation is the work of one process.
    assert plan_confirmation(ConfirmRequest(Folder(folder))).spec.storage is None


def test_drivers_at_the_same_time_make_exactly_the_trials_that_were_asked_for(make):
    folder = make(trials=6, sampler="random")
    drivers = [Driver(folder) for _ in range(3)]

    def work(driver):
        while not driver.recorder.is_over:
            driver.work()
        driver.end()

    threads = [threading.Thread(target=work, args=(driver,), daemon=True) for driver in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
        assert not thread.is_alive()
    assert [driver.recorder.broken for driver in drivers] == ["", "", ""]
    assert sorted(trial_id for driver in drivers for trial_id in driver.ran) == [f"{i:04d}" for i in range(6)]
    assert {*statuses(folder).values()} <= {"complete", "pruned"}
    assert len(pd.read_csv(folder / TRIALS)) == 6


def test_trial_of_a_dead_driver_is_taken_over_and_that_of_a_living_one_is_not(make):
    folder = make(trials=3, scheduler="none")
    dead, alive, third = (Driver(folder) for _ in range(3))
    for driver in (dead, dead, alive):
        driver.work()
    dead.die()
    alive.work()
    assert (dead.ran, alive.ran) == (["0000"], ["0001"])
    assert third.work()
    assert third.ran == ["0000"], "before a new one begins"
    while not third.recorder.is_over:
        third.work()
        alive.work()
    third.end()
    alive.end()
    assert sorted(third.ran + alive.ran) == ["0000", "0001", "0002"]
    assert statuses(folder) == dict.fromkeys(["0000", "0001", "0002"], "complete")
    (first, *_) = load(folder).records()
    assert [report["report"] for report in first.reports] == [1, 2, 3], "it went on where it was"


def test_driver_with_nothing_to_do_waits_for_the_others_and_takes_up_what_they_leave(make):
    folder = make(trials=1)
    one, two = Driver(folder), Driver(folder)
    one.work()
    one.work()
    assert not two.work()
    assert two.recorder.waits
    assert not two.recorder.is_over
    one.die()
    while two.work():
        pass
    two.end()
    assert two.ran == ["0000"]
    assert statuses(folder) == {"0000": "complete"}


class TornSpace:
    """A space whose suggestion is cut short: the process is killed before the settings are recorded."""

    def suggest(self, trial):
        trial.suggest_float("optim.lr", 1e-4, 1e-2, log=True)
        raise RuntimeError("killed")


def test_asking_that_a_dead_driver_was_killed_in_is_completed(make):
    folder = make(trials=2)
    one = Driver(folder)
    one.recorder._searcher._space = TornSpace()
    assert one.recorder.next() is None
    assert one.recorder.broken == "RuntimeError: killed"
    assert SETTINGS not in one.study.optuna.trials[0].user_attrs
    one.die()
    two = Driver(folder)
    while not two.recorder.is_over:
        two.work()
    two.end()
    assert two.ran == ["0000", "0001"]
    assert statuses(folder) == {"0000": "complete", "0001": "pruned"}


def test_paused_trial_is_taken_up_by_one_driver(make, monkeypatch):
    class Policy:
        def decide(self, trial_id, report, past, limits):
            return "pause" if report["report"] == 1 else "go on"

        def decide_again(self, *about):
            return self.decide(*about)

        def replay(self, trials):
            pass

        def next(self, past, limits):
            paused = [trial.number for trial in past if trial.user_attrs.get("paused")]
            return TakeUp(paused[0]) if paused else Begin({}) if limits.new else None

    monkeypatch.setattr(recorder_module, "make_policy", lambda *_, **__: Policy())
    folder = make(trials=1)
    one, two, third = (Driver(folder) for _ in range(3))
    one.work()
    assert statuses(folder) == {"0000": "paused"}
    assert [two.work(), third.work(), one.work()] == [True, False, False]
    assert third.recorder.waits
    while two.work():
        pass
    assert statuses(folder) == {"0000": "complete"}
    for driver in (one, two, third):
        driver.work()
        assert driver.recorder.is_over
        driver.end()


def test_driver_deletes_no_weights_of_trials_that_others_run(make):
    folder = make(trials=6, epochs=2, scheduler="none")
    one, two = Driver(folder), Driver(folder)
    two.work()
    two.work()
    (running,) = two.ran
    while len(one.ran) < 6 and one.work():
        assert (folder / "trials" / running / BEST).exists()
    ended = {trial for trial, status in statuses(folder).items() if status == "complete"}
    kept = {file.parent.name for file in folder.glob(f"trials/*/{BEST}")}
    assert len(ended) == 5
    assert len(kept & ended) == 3
    while any([one.work(), two.work()]):
        pass
    one.end()
    two.end()
    assert len([*folder.glob(f"trials/*/{BEST}")]) == 3


def test_driver_whose_connection_is_lost_ends_with_how_to_go_on_and_writes_nothing(make, postgres, monkeypatch):
    monkeypatch.setattr(drivers_module, "_CHECK_S", 0.0)
    folder = make()
    one = Driver(folder)
    one.work()
    one.recorder.check()
    assert not one.recorder.is_over
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'rayt%'")
    one.recorder.check()
    assert one.recorder.is_over
    assert one.recorder.next() is None
    with pytest.raises(Breakdown, match=r"the connection was lost .*; the study can be resumed: "):
        one.recorder.close()
    assert not (folder / TRIALS).exists()
    assert statuses(folder) == {"0000": "running"}


def test_epochs_are_not_raised_while_another_driver_is_at_work(make):
    folder = make(trials=2, scheduler="none")
    one = Driver(folder)
    one.work()
    with open_study(folder) as study, open_study(folder) as late:
        longer = dataclasses.replace(study.spec, epochs=5)
        with pytest.raises(UserError, match="another driver works with 3 epochs"):
            go_on(study, longer)
        while one.work():
            pass
        one.end()
        raised = go_on(study, longer)
        assert (raised.spec.epochs, raised.spec.trials) == (5, 4)
        with pytest.raises(UserError, match="another driver works with 5 epochs"):
            go_on(late, late.spec)
