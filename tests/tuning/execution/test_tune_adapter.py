"""What Ray Tune is told, without a cluster."""

import threading
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial

from raytune_emotion.tuning.execution import tune_adapter
from raytune_emotion.tuning.execution.capacity import Waiting
from raytune_emotion.tuning.execution.trial_actor import ENDING, NODES
from raytune_emotion.tuning.execution.tune_adapter import BetweenEvents, Gate, Recovery, Search, Silence
from raytune_emotion.tuning.study.endings import Failed
from raytune_emotion.tuning.study.optuna_study import Proposal


class Recorder:
    """Notes what it hears, and answers what it is told to."""

    def __init__(self, *answers, proposals=()):
        self.answers, self.proposals, self.heard = list(answers), list(proposals), []
        self.broken, self.is_over, self.waits = "", False, False

    def count_open(self):
        return len(self.proposals)

    def report(self, trial_id, report):
        self.heard.append((trial_id, report))
        return self.answers.pop(0)

    def give_back(self, trial_id):
        self.heard.append(trial_id)

    def end(self, trial_id, ending):
        self.heard.append((trial_id, ending))

    def next(self):
        if not self.proposals:
            self.is_over = True
            return None
        return self.proposals.pop(0)

    def write_in_time(self):
        pass


class Room:
    """Has so many places, on nodes of which some end soon."""

    def __init__(self, places=0, leaving=()):
        self.places, self.leaving = places, leaving

    def __call__(self):
        return self.places

    def is_leaving(self, node):
        return node in self.leaving


def search_of(recorder, room, waiting=None, stop=None):
    waiting, stop = waiting or Waiting(lambda: None), stop or threading.Event()
    search = Search(recorder, lambda proposal: SimpleNamespace(to_dict=dict), room, waiting, stop)
    search.add_configurations(["an experiment"])
    return search


@pytest.fixture
def made(monkeypatch):
    """The ids of the trials that Ray Tune gets."""
    made = []

    def make_trial(experiment, trial_id, config, settings):
        made.append(trial_id)
        return SimpleNamespace(config=config)

    monkeypatch.setattr(tune_adapter, "make_trial", make_trial)
    return made


def test_a_trial_stops_when_the_recorder_does_not_let_it_go_on():
    recorder, stop = Recorder(True, False), threading.Event()
    gate = Gate(recorder, search_of(recorder, Room()), stop)
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


def test_a_trial_that_is_taken_up_again_is_a_new_one_to_ray_tune(made):
    proposals = [Proposal("0000", {}, None), Proposal("0001", {}, None), Proposal("0000", {}, None)]
    recorder, room = Recorder(True, proposals=proposals), Room(places=1)
    search = search_of(recorder, room)
    assert search.next_trial()
    assert search.next_trial() is None, "no place is free"
    room.places = 2
    assert search.next_trial()
    search.on_trial_complete("0000", {"report": 1})
    room.places = 1
    assert search.next_trial() is None, "a node has left"
    room.places = 2
    assert search.next_trial()
    assert made == ["0000", "0001", "0000.2"]
    Gate(recorder, search, threading.Event())("0000.2", {"report": 2})
    assert recorder.heard == [("0000", {"report": 2})]


def test_a_study_that_is_over_ends_on_a_cluster_without_a_place(made):
    search = search_of(Recorder(), Room(places=0))
    assert search.next_trial() is None
    assert search.is_finished()
    waits = search_of(Recorder(proposals=[Proposal("0000", {}, None)]), Room(places=0))
    assert waits.next_trial() is None
    assert not waits.is_finished()


def test_a_trial_on_a_node_that_ends_soon_leaves_it_after_its_report(made):
    recorder, room = Recorder(True, True, False, proposals=[Proposal("0000", {}, None)] * 2), Room(1, {"b"})
    search = search_of(recorder, room)
    gate = Gate(recorder, search, threading.Event())
    trial = search.next_trial()
    assert not gate("0000", {"report": 1, NODES: ["a"]})
    assert gate("0000", {"report": 2, NODES: ["a", "b"]})
    assert recorder.heard == [("0000", {"report": 1, NODES: ["a"]}), ("0000", {"report": 2, NODES: ["a", "b"]}), "0000"]
    assert vars(trial) == {"config": {}, "raytune_emotion_forget": True}, "its process gets no other trial"
    search.on_trial_complete("0000", {"report": 2})
    search.next_trial()
    assert made == ["0000", "0000.2"]
    assert gate("0000.2", {"report": 3, NODES: ["a", "b"]})
    assert recorder.heard[3:] == [("0000", {"report": 3, NODES: ["a", "b"]})], "it has ended and is not given back"


@pytest.mark.parametrize("last", [{"report": 1, NODES: ["a", "b"]}, {ENDING: Failed("why"), NODES: ["a", "b"]}])
def test_process_on_node_that_ends_soon_gets_no_other_trial_however_its_own_ends(made, last):
    recorder = Recorder(False, proposals=[Proposal("0000", {}, None)])
    search = search_of(recorder, Room(1, {"b"}))
    trial = search.next_trial()
    assert Gate(recorder, search, threading.Event())("0000", last)
    assert vars(trial) == {"config": {}, "raytune_emotion_forget": True}
    assert len(recorder.heard) == 1, "it is not given back"


def test_only_a_report_that_is_new_forgives_deaths():
    recovery, trial = Recovery(), Trial("a trainable", trial_id="0000", stub=True)
    deaths = []
    for result in ({"report": 1}, {"report": 1}, {"report": 2}, {ENDING: Failed("why")}):
        trial.run_metadata.num_failures = 2
        recovery.on_trial_result(0, [], trial, result)
        deaths.append(trial.num_failures)
    assert deaths == [0, 2, 0, 2]


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


@pytest.mark.parametrize(("unplaced", "expected"), [(0, []), (1, []), (2, [35.0])])
def test_trials_whose_workers_all_wait_for_places_wait_for_room(monkeypatch, unplaced, expected):
    now, said = [0.0], []
    monkeypatch.setattr(tune_adapter.time, "monotonic", lambda: now[0])
    between = BetweenEvents(Recorder(), Waiting(lambda: said.append(now[0])), lambda: unplaced)
    for second in range(0, 60, 5):
        now[0] = float(second)
        between.on_step_end(second, [SimpleNamespace(status=Trial.RUNNING)] * 2)
    assert said == expected


def test_a_cluster_without_any_room_is_said_and_can_be_left(monkeypatch):
    now, said, stop = [0.0], [], threading.Event()
    monkeypatch.setattr(tune_adapter.time, "monotonic", lambda: now[0])
    waiting = Waiting(lambda: said.append(now[0]))
    search = search_of(Recorder(proposals=[Proposal("0000", {}, None)]), Room(), waiting, stop)
    for now[0] in (10.0, 31.0, 100.0):
        assert search.next_trial() is None
    assert said == [31.0]
    assert not search.is_finished()
    stop.set()
    assert search.is_finished()


class Minutes:
    """Tells the time of a study, in which `Silence` looks at all trials each minute."""

    def __init__(self):
        self.now, self.said = 0.0, []
        self.silence = Silence(self.said.append, lambda: self.now)

    def wait(self, minutes):
        for _ in range(minutes):
            self.now += 60
            self.silence.on_step_end(1, [])

    def start(self, trial_id):
        self.silence.on_trial_start(1, [], SimpleNamespace(trial_id=trial_id))

    def hear(self, trial_id):
        self.silence.on_trial_result(1, [], SimpleNamespace(trial_id=trial_id), {"host": "gpu-7", "pid": 4711})

    def end(self, trial_id, how="complete"):
        getattr(self.silence, f"on_trial_{how}")(1, [], SimpleNamespace(trial_id=trial_id))


def test_a_trial_that_is_silent_for_far_longer_than_others_is_named_once():
    study, trials = Minutes(), ("0000", "0001.2", "0002", "0003")
    for trial_id in trials:
        study.start(trial_id)
        study.hear(trial_id)
    study.wait(10)
    for trial_id in trials:
        study.hear(trial_id)
    study.end("0002")
    study.end("0003", "recover")
    for _ in range(30):
        study.wait(10)
        study.hear("0000")
        assert len(study.said) == (study.now > 600 + 6000)
    assert study.said == [
        "trial 0001 (process 4711 on gpu-7) has not reported for 101 min; the longest time between two reports was "
        "10.0 min; if its process hangs, end it with `kill -9`, and the trial continues from its checkpoint"
    ]


def test_a_resumed_trial_that_repeats_its_newest_report_does_not_make_others_seem_silent():
    study = Minutes()
    study.start("0000")
    study.now += 3
    study.hear("0000")
    study.wait(120)
    assert not study.said, "nobody knows how long a report takes"
    study.hear("0000")
    study.wait(600)
    assert not study.said


def test_the_report_of_a_trial_that_was_named_shows_how_long_one_may_take():
    study = Minutes()
    for trial_id in ("quick", "slow"):
        study.start(trial_id)
        study.hear(trial_id)
    study.wait(1)
    study.hear("quick")
    study.wait(40)
    assert len(study.said) == 2
    study.hear("slow")
    study.wait(300)
    assert len(study.said) == 2


def test_a_trial_that_hangs_before_its_first_report_is_named_without_a_process():
    study = Minutes()
    study.start("0000")
    study.hear("0000")
    study.wait(1)
    study.hear("0000")
    study.end("0000", "error")
    study.start("0001")
    study.wait(31)
    (line,) = study.said
    assert line.startswith("trial 0001 has not reported for 31 min; ")
