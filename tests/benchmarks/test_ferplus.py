"""The budget and the sums of the FER+ benchmark, without its runs."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import ferplus
from benchmarks.ferplus import SPACE, Plan
from benchmarks.finishing import Faces

SEARCHED = """trial_id,status,epochs,best_val_js,val_kl,val_accuracy,seconds,model.pretrained
0001,complete,2,0.12,0.37,0.81,30,True
0002,pruned,1,0.29,0.78,0.62,15,False
0003,running,,,,,,True
"""
HEADER, _, _, RUNNING, _ = SEARCHED.split("\n")
#: Two faces that the search sees, and two that it does not. The seed is certain of all, and right of those it has seen.
SURE = np.array([1.0, 0.0])
TARGETS = {"a": SURE, "b": SURE}
UNSEEN = {"c": 1 - SURE, "d": SURE}


class Machine:
    """Runs the commands by a clock of its own; each leaves the tables that it would leave."""

    def __init__(self, folder):
        self.folder, self.now, self.limits, self.commands = folder, 0.0, [], []
        self.trials, self.takes, self.lost = SEARCHED, {"search": 330.0, "train": 30.0}, set()

    def run(self, command, seconds=None):
        self.commands.append(command)
        verb = command[2].rpartition(".")[2]
        self.limits.append(seconds)
        self.now += self.takes[verb] if seconds is None else min(seconds, self.takes[verb])
        name = command[command.index("--name") + 1]
        if name not in self.lost:
            (self.folder / name / "best").mkdir(parents=True)
            (self.folder / name / "trials.csv").write_text(self.trials)
            report = {"report": 1, "epoch": 3.0, "val_js": 0.2, "seconds": 9.0, "time": 1.0, "finished": True}
            report |= {"best_val_js": 0.2, "best_report": 1, "val_kl": 0.4, "train_loss": 0.4, "lr": 0.1}
            report |= {"images_per_second": 9.0, "accumulate": 1, "workers": 1, "params_millions": 1.0}
            (self.folder / name / "history.jsonl").write_text(json.dumps(report) + "\n")
        return 0, self.takes[verb]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    made = Machine(tmp_path)
    faces = Faces(tmp_path / "searched", TARGETS, tmp_path / "test", UNSEEN)
    monkeypatch.setattr(ferplus, "run_timed", made.run)
    monkeypatch.setattr(ferplus, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(ferplus, "split_validation", lambda data, work: faces)
    monkeypatch.setattr(ferplus, "predict", lambda export, *places: dict.fromkeys("abcd", SURE))
    monkeypatch.setattr(ferplus, "score", lambda predicted, targets, metric: np.mean([
        (predicted[face] == targets[face]).all() for face in targets
    ]))  # fmt: skip
    return made


def plan(seeds=3, weights="weights", **more):
    return Plan(Path("faces"), weights, SPACE, 64, 8, 600, seeds, "auto", **more)


def test_numbers_are_of_all_faces_and_of_those_that_chose_nothing(machine, tmp_path):
    *_, table = ferplus.study(plan(), tmp_path)
    rows = dict(table.rows)
    for name in ("JS, bits", "KL, nats", "accuracy"):
        assert rows[f"{name} on PublicTest, 3 fresh seeds"] == "0.7500 ± 0.0000"
        assert rows[f"{name} on the half of PublicTest that chose nothing, 3 fresh seeds"] == "0.5000 ± 0.0000"
    assert rows["epochs of seed2"] == 3.0
    assert rows["best JS from ImageNet weights, bits"] == 0.12
    assert rows["best JS from scratch, bits"] == 0.29
    assert table.notes == ["4 faces in PublicTest, 2 in the half of PublicTest that chose nothing."]
    search, *finals = machine.commands
    assert search[search.index("--weights-dir") + 1] == "weights"
    assert search[search.index("--warm-start") + 1] == "none"
    assert [final[final.index("--seed") + 1] for final in finals] == ["1", "2", "3"]
    assert all(final[final.index("--study") + 1] == str(tmp_path / "ferplus") for final in finals)


def test_the_search_has_half_of_the_time_and_the_final_runs_share_what_is_left(machine, tmp_path):
    list(ferplus.study(plan(), tmp_path))
    search = machine.commands[0]
    assert search[search.index("--time-budget") + 1] == "300s"
    # Of 270 s that are left, the first has a third, and the next half of the 240 s after it; a part is to predict in.
    # The search is asked to end only where it takes much more than its own time.
    assert machine.limits == [0.8 * 600, 0.8 * 90, 0.8 * 120, 0.8 * 210]


def test_the_search_may_have_another_share_of_the_time(machine, tmp_path):
    list(ferplus.study(plan(search=0.8), tmp_path))
    assert machine.commands[0][machine.commands[0].index("--time-budget") + 1] == "480s"


def test_the_share_of_a_gpu_is_told(machine, tmp_path):
    assert ferplus._share(tmp_path) == []
    (tmp_path / "ferplus").mkdir()
    for told, share in (("null", []), ("0.125", [0.125])):
        (tmp_path / "ferplus" / "study.yaml").write_text(f"gpus_per_worker: {told}\n")
        assert ferplus._share(tmp_path) == share


class Ticks:
    """An event that is set after some waits, each of which does something."""

    def __init__(self, *doings):
        self.doings = [*doings]

    def wait(self, seconds):
        if not self.doings:
            return True
        self.doings.pop(0)()
        return False


@pytest.mark.parametrize(("visible", "gpu"), [(None, "0"), ("", "0"), ("3,1", "3"), ("GPU-8f2a", "GPU-8f2a")])
def test_the_gpu_of_the_process_is_watched_from_the_first_report_on(tmp_path, monkeypatch, visible, gpu):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    answers, asked = ["[N/A], 40\n", "80, 50\n"], []

    def ask(query, **options):
        asked.append(query[query.index("-i") + 1])
        return SimpleNamespace(stdout=answers[len(asked) - 1])

    def report():
        (tmp_path / "ferplus" / "trials" / "0000").mkdir(parents=True)
        (tmp_path / "ferplus" / "trials" / "0000" / "history.jsonl").touch()

    monkeypatch.setattr(ferplus.subprocess, "run", ask)
    used = []
    ferplus._watch(tmp_path, used, Ticks(lambda: None, report, lambda: None))
    assert used == [(80.0, 50.0)]
    assert asked == [gpu, gpu]


def test_a_table_is_there_after_each_stage(machine, tmp_path):
    tables = list(itertools.islice(ferplus.study(plan(), tmp_path), 2))
    assert len(machine.commands) == 2
    assert "best JS from scratch, bits" in dict(tables[0].rows)
    assert "JS, bits on PublicTest, 1 fresh seeds" not in dict(tables[0].rows)
    assert dict(tables[1].rows)["JS, bits on PublicTest, 1 fresh seeds"] == "0.7500"


def test_a_seed_without_an_evaluation_is_said(machine, tmp_path):
    machine.lost = {"seed1"}
    machine.takes["train"] = 300.0
    *_, table = ferplus.study(plan(seeds=2), tmp_path)
    assert "JS, bits on PublicTest, 1 fresh seeds" in dict(table.rows)
    assert table.notes[1:] == ["seed1 has nothing to show: it ended with exit code 0 after 300 s."]


def test_a_search_that_takes_all_the_time_leaves_none(machine, tmp_path):
    machine.takes["search"] = 700.0
    *_, table = ferplus.study(plan(seeds=1, search=0.8), tmp_path)
    assert table.notes[1:] == ["seed1 has nothing to show: no time was left."]
    assert len(machine.commands) == 1


def test_a_search_that_takes_much_longer_than_its_time_is_asked_to_end(machine, tmp_path):
    machine.takes["search"] = 700.0
    *_, table = ferplus.study(plan(seeds=1), tmp_path)
    assert machine.limits == [480.0, 0.8 * 120]
    assert "JS, bits on PublicTest, 1 fresh seeds" in dict(table.rows)


def test_a_space_without_both_starts_is_summed_up_too(machine, tmp_path):
    machine.trials = "trial_id,status,epochs,best_val_js,val_kl,val_accuracy,seconds\n0000,complete,1,0.3,0.8,0.6,9\n"
    *_, table = ferplus.study(plan(weights=None), tmp_path)
    assert dict(table.rows)["best JS from the start of the space, bits"] == 0.3
    assert not any("--weights-dir" in command for command in machine.commands)


@pytest.mark.parametrize("begun", [False, True])
def test_a_search_without_a_report_is_said(machine, tmp_path, begun):
    machine.trials = f"{HEADER}\n{RUNNING}\n"
    machine.lost = set() if begun else {"ferplus"}
    (table,) = ferplus.study(plan(), tmp_path)
    assert dict(table.rows)["trials running"] == int(begun)
    assert table.notes[-1] == "No trial has reported."
