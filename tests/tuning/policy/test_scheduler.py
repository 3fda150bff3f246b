import random

import pytest

from raytune_emotion.tuning.policy.scheduler import Halving, RunToEnd, replay
from raytune_emotion.tuning.study.records import TrialRecord

EPOCHS = 9
RUNGS = [3.0]


def report(epoch, js, time, **more):
    return {"report": epoch, "epoch": epoch, "best_val_js": js, "time": time, "finished": False, **more}


def simulate(seed):
    """Run trials side by side under a scheduler; return it, what they report in the order of time, and the stopped."""
    rng = random.Random(seed)
    scheduler = Halving(RUNGS)
    histories, stopped, time = {}, set(), 0.0
    live = []
    for number in range(30):
        histories[f"{number:04d}"] = []
        live.append((f"{number:04d}", rng.random()))
        while len(live) >= 4 or (number == 29 and live):
            trial_id, quality = rng.choice(live)
            epoch = len(histories[trial_id]) + 1
            time += 1
            histories[trial_id].append(report(epoch, quality + 1 / epoch, time, finished=epoch == EPOCHS))
            if epoch == EPOCHS:
                live.remove((trial_id, quality))
            elif not scheduler.keeps(trial_id, histories[trial_id][-1]):
                live.remove((trial_id, quality))
                stopped.add(trial_id)
    return scheduler, histories, stopped


def records_of(histories, status):
    return [TrialRecord(t, status(t), {}, "", tuple(reports)) for t, reports in histories.items()]


def test_about_a_third_of_many_trials_pass_the_rung():
    _, histories, stopped = simulate(0)
    assert {len(histories[trial_id]) for trial_id in stopped} == {EPOCHS // 3}
    assert 5 <= len(histories) - len(stopped) <= 15


def test_a_replayed_scheduler_has_the_rungs_of_the_uninterrupted_one():
    for seed in range(5):
        scheduler, histories, stopped = simulate(seed)
        assert len(stopped) > 5
        fresh = Halving(RUNGS)
        replay(fresh, records_of(histories, lambda t, stopped=stopped: "pruned" if t in stopped else "complete"))
        assert fresh._reached == scheduler._reached


def test_a_trial_that_was_stopped_and_not_told_is_found():
    _, histories, stopped = simulate(1)
    last = max(stopped)
    running = replay(
        Halving(RUNGS),
        records_of(histories, lambda t: "running" if t == last else "pruned" if t in stopped else "complete"),
    )
    assert running == {last}


def test_a_trial_that_was_let_go_on_is_not_stopped_afterwards():
    """The others' reports are older, but were heard later."""

    def record(number, js, epochs):
        reports = [report(epoch, js, number + epoch) for epoch in epochs]
        return TrialRecord(f"{number:04d}", "running", {}, "", tuple(reports))

    others = [record(number, 0.1, [1, 2, 3]) for number in range(5)]
    assert replay(Halving(RUNGS), [*others, record(9, 0.5, [1, 2, 3])]) == {"0009"}
    assert replay(Halving(RUNGS), [*others, record(9, 0.5, [1, 2, 3, 4])]) == set()


def test_a_trial_that_may_go_on_is_not_stopped_by_the_replay():
    assert replay(Halving(RUNGS), [TrialRecord("0000", "running", {}, "", (report(1, 0.5, 1.0),))]) == set()


@pytest.mark.parametrize("evaluations", [1, 2, 6])
def test_trials_are_compared_at_the_same_epoch_however_often_they_report(evaluations):
    """Where an epoch has fewer steps than evaluations are asked for, a trial reports less often than others (C11)."""
    scheduler = Halving([2.0])
    for number in range(3):
        assert scheduler.keeps(f"{number:04d}", report(2.0, 0.1, 1.0))
    decisions = [
        scheduler.keeps("0009", report(step / evaluations, 0.5, step) | {"report": step})
        for step in range(1, 2 * evaluations + 1)
    ]
    assert decisions == [True] * (2 * evaluations - 1) + [False]


def test_a_confirmation_stops_nothing():
    assert RunToEnd().keeps("0000", report(1, 0.9, 1.0))
    assert replay(RunToEnd(), [TrialRecord("0000", "running", {}, "", (report(1, 0.5, 1.0),))]) == set()


def test_the_copied_reports_of_a_continued_trial_count_once():
    histories = {f"{number:04d}": [report(1, js, number)] for number, js in enumerate((0.2, 0.3, 0.4))}
    copied = {"0003": histories["0000"]}
    for each in (histories, histories | copied):
        scheduler = Halving([1.0])
        replay(scheduler, records_of(each, lambda trial_id: "complete"))
        assert scheduler.keeps("0004", report(1, 0.24, 10))
