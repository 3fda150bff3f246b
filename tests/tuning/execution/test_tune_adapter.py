"""What Ray Tune is told, without a cluster."""

import threading
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial

from raytune_emotion.tuning.execution import tune_adapter
from raytune_emotion.tuning.execution.trial_actor import ENDING
from raytune_emotion.tuning.execution.tune_adapter import BetweenEvents, Gate, Search, Waiting
from raytune_emotion.tuning.study.endings import Failed
from raytune_emotion.tuning.study.optuna_study import Proposal


class Recorder:
    """Notes what it hears, and answers what it is told to."""

    def __init__(self, *answers, proposals=()):
        self.answers, self.proposals, self.heard = list(answers), list(proposals), []
        self.broken, self.is_over = "", False

    def report(self, trial_id, report):
        self.heard.append((trial_id, report))
        return self.answers.pop(0)

    def end(self, trial_id, ending):
        self.heard.append((trial_id, ending))

    def next(self):
        return self.proposals.pop(0) if self.proposals else None

    def write_in_time(self):
        pass


def test_a_trial_stops_when_the_recorder_does_not_let_it_go_on():
    recorder, stop = Recorder(True, False), threading.Event()
    gate = Gate(recorder, stop)
    assert [gate("0000", {"report": 1}), gate("0000", {"report": 2}), gate("0001", {ENDING: Failed("why")})] == [
        False, True, True,
    ]  # fmt: skip
    assert recorder.heard == [("0000", {"report": 1}), ("0000", {"report": 2}), ("0001", Failed("why"))]
    assert not gate.stop_all()
    recorder.broken = "full"
    assert gate.stop_all()
    recorder.broken = ""
    stop.set()
    assert gate.stop_all()


def test_a_trial_that_is_taken_up_again_is_a_new_one_to_ray_tune(monkeypatch):
    made = []

    def make_trial(experiment, trial_id, config, settings):
        made.append(trial_id)
        return SimpleNamespace(config=config)

    monkeypatch.setattr(tune_adapter, "make_trial", make_trial)
    proposals = [Proposal("0000", {}, None), Proposal("0001", {}, None), Proposal("0000", {}, None)]
    recorder = Recorder(True, proposals=proposals)
    waiting, stop = Waiting(lambda: None), threading.Event()
    search = Search(recorder, lambda proposal: SimpleNamespace(to_dict=dict), lambda: places, waiting, stop)
    search.add_configurations(["an experiment"])
    places = 1
    assert search.next_trial()
    assert search.next_trial() is None, "no place is free"
    places = 2
    assert search.next_trial()
    search.on_trial_complete("0000", {"report": 1})
    places = 1
    assert search.next_trial() is None, "a node has left"
    places = 2
    assert search.next_trial()
    assert made == ["0000", "0001", "0000.2"]
    Gate(recorder, threading.Event())("0000.2", {"report": 2})
    assert recorder.heard == [("0000", {"report": 2})]


@pytest.mark.parametrize("status", [Trial.PENDING, Trial.RUNNING])
def test_a_cluster_without_room_is_said_once(monkeypatch, status):
    now, said = [0.0], []
    monkeypatch.setattr(tune_adapter.time, "monotonic", lambda: now[0])
    between = BetweenEvents(Recorder(), Waiting(lambda: said.append(now[0])))
    for second in range(0, 100, 5):
        now[0] = float(second)
        between.on_step_end(second, [SimpleNamespace(status=status)])
    assert said == ([35.0] if status == Trial.PENDING else [])
    for second, states in ((105, [Trial.RUNNING]), (110, []), (141, [])):
        now[0] = float(second)
        between.on_step_end(second, [SimpleNamespace(status=state) for state in states])
    assert said[-1:] == [141.0]


def test_a_cluster_without_any_room_is_said_and_can_be_left(monkeypatch):
    now, said, stop = [0.0], [], threading.Event()
    monkeypatch.setattr(tune_adapter.time, "monotonic", lambda: now[0])
    waiting = Waiting(lambda: said.append(now[0]))
    search = Search(Recorder(proposals=[Proposal("0000", {}, None)]), lambda proposal: None, lambda: 0, waiting, stop)
    for now[0] in (10.0, 31.0, 100.0):
        assert search.next_trial() is None
    assert said == [31.0]
    assert not search.is_finished()
    stop.set()
    assert search.is_finished()
