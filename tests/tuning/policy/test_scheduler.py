import random
from types import SimpleNamespace

from raytune_emotion.tuning.policy.scheduler import make_scheduler, replay
from raytune_emotion.tuning.study.records import TrialRecord

REPORTS = 9


def simulate(seed):
    """Trials side by side under a scheduler; what they report, in the order of time, and which were stopped."""
    rng = random.Random(seed)
    scheduler = make_scheduler(REPORTS)
    histories, stopped, time = {}, set(), 0.0
    live = []
    for number in range(30):
        trial = SimpleNamespace(trial_id=f"{number:04d}")
        scheduler.on_trial_add(None, trial)
        histories[trial.trial_id] = []
        live.append((trial, rng.random()))
        while len(live) >= 4 or (number == 29 and live):
            trial, quality = rng.choice(live)
            step = len(histories[trial.trial_id]) + 1
            time += 1
            best = quality + 1 / step
            report = {"report": step, "best_val_js": best, "time": time, "finished": step == REPORTS}
            histories[trial.trial_id].append(report)
            decision = scheduler.on_trial_result(None, trial, report)
            if report["finished"] or decision == "STOP":
                live = [(t, q) for t, q in live if t is not trial]
                if not report["finished"]:
                    stopped.add(trial.trial_id)
    return scheduler, histories, stopped


def rungs(scheduler):
    return [recorded for bracket in scheduler._brackets for _, recorded in bracket._rungs]


def records_of(histories, status):
    return [TrialRecord(t, status(t), {}, "", tuple(reports)) for t, reports in histories.items()]


def test_a_replayed_scheduler_has_the_rungs_of_the_uninterrupted_one():
    for seed in range(5):
        scheduler, histories, stopped = simulate(seed)
        assert len(stopped) > 5
        fresh = make_scheduler(REPORTS)
        replay(fresh, records_of(histories, lambda t, stopped=stopped: "pruned" if t in stopped else "complete"))
        assert rungs(fresh) == rungs(scheduler)


def test_a_trial_that_was_stopped_and_not_told_is_found():
    _, histories, stopped = simulate(1)
    last = max(stopped)
    running = replay(
        make_scheduler(REPORTS),
        records_of(histories, lambda t: "running" if t == last else "pruned" if t in stopped else "complete"),
    )
    assert running == {last}


def test_a_trial_that_was_let_go_on_is_not_stopped_afterwards():
    """The others' reports are older, but were heard later."""

    def record(number, js, steps):
        reports = [{"report": i, "best_val_js": js, "time": number + i, "finished": False} for i in steps]
        return TrialRecord(f"{number:04d}", "running", {}, "", tuple(reports))

    others = [record(number, 0.1, [1, 2, 3]) for number in range(5)]
    assert replay(make_scheduler(REPORTS), [*others, record(9, 0.5, [1, 2, 3])]) == {"0009"}
    assert replay(make_scheduler(REPORTS), [*others, record(9, 0.5, [1, 2, 3, 4])]) == set()


def test_a_trial_that_may_go_on_is_not_stopped_by_the_replay():
    reports = ({"report": 1, "best_val_js": 0.5, "time": 1.0, "finished": False},)
    assert replay(make_scheduler(REPORTS), [TrialRecord("0000", "running", {}, "", reports)]) == set()
