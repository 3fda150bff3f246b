import random

import pytest

from raytune_emotion.tuning.policy.scheduler import Halving, Hyperband, Median, replay, rungs_of
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


def test_the_copied_reports_of_a_continued_trial_count_once():
    histories = {f"{number:04d}": [report(1, js, number)] for number, js in enumerate((0.2, 0.3, 0.4))}
    copied = {"0003": histories["0000"]}
    for each in (histories, histories | copied):
        scheduler = Halving([1.0])
        replay(scheduler, records_of(each, lambda trial_id: "complete"))
        assert scheduler.keeps("0004", report(1, 0.24, 10))


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(27, [3.0, 9.0]), (9, [1.0, 3.0]), (3, [1.0]), (100, [100 / 9, 100 / 3]), (1, []), (0.5, [])]
)
def test_rungs_begin_at_a_ninth_of_the_epochs_and_not_before_the_first(epochs, rungs):
    assert rungs_of(epochs) == pytest.approx(rungs)


def ends_of(scheduler, trial_ids):
    """Run trials of 27 epochs, each worse than all before; return the epochs at which they end."""
    return {
        trial_id: next((n for n in range(1, 27) if not scheduler.keeps(trial_id, report(n, js, float(n)))), 27)
        for js, trial_id in enumerate(trial_ids)
    }


def test_a_bracket_of_hyperband_begins_at_each_rung_and_one_stops_no_trial():
    trial_ids = [f"{number:04d}" for number in range(600)]
    ends = ends_of(Hyperband([3.0, 9.0]), trial_ids)
    assert set(ends.values()) == {3, 9, 27}
    # All brackets cost about the same: one that stops two thirds of its trials earlier gets more trials.
    shares = [sum(end == rung for end in ends.values()) / len(ends) for rung in (3, 9, 27)]
    assert shares == pytest.approx([3 / 5.5, 1.5 / 5.5, 1 / 5.5], abs=0.05)


def test_the_id_of_a_trial_determines_its_bracket_of_hyperband():
    """A study that is resumed, or has another order of reports, has the same brackets."""
    trial_ids = [f"{number:04d}" for number in range(100)]
    first = ["a", "b", "c", "d", "e", "f", "g", "h"]  # the first trial of a bracket passes its rungs
    forwards, backwards = (ends_of(Hyperband([3.0, 9.0]), [*first, *order]) for order in (trial_ids, trial_ids[::-1]))
    assert {*map(forwards.get, trial_ids)} == {3, 9, 27}
    assert forwards == backwards


def median_of(peers, *, first=2.0):
    """Make the median rule with trials that have reached epoch 2 with a JS of 0.1, 0.2 and so on."""
    scheduler = Median(first)
    for number in range(peers):
        assert scheduler.keeps(f"{number:04d}", report(2, (number + 1) / 10, 1.0))
    return scheduler


@pytest.mark.parametrize(("js", "keeps"), [(0.31, False), (0.3, True), (0.29, True)])
def test_a_trial_worse_than_the_median_of_five_others_at_the_same_epoch_is_stopped(js, keeps):
    assert median_of(5).keeps("0009", report(2, js, 2.0)) is keeps


def test_the_median_rule_stops_no_trial_early_and_none_with_few_others():
    assert median_of(4).keeps("0009", report(2, 0.9, 2.0)), "four others are too few"
    assert median_of(5).keeps("0009", report(3, 0.9, 2.0)), "no other trial has reached this epoch"
    assert median_of(5, first=2.5).keeps("0009", report(2, 0.9, 2.0)), "it is too early"
    scheduler = median_of(4)
    assert [scheduler.keeps("0009", report(2, js, 2.0)) for js in (0.9, 0.9)] == [True, True], "it is no other trial"
