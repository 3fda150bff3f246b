"""Several searches on one study through PostgreSQL, as on machines that share a folder."""

import json
import signal
import time

import pandas as pd
import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.study.drivers import join_study
from raytune_emotion.tuning.study.optuna_study import list_trials, load_study
from raytune_emotion.tuning.study.spec import read_spec

pytestmark = pytest.mark.timeout(700)

TRIALS = 6


def running_trials(study):
    """List the running trials with their drivers."""
    try:
        trials = list_trials(load_study(study))
    except UserError:
        return {}  # nobody has made it yet
    return {trial.trial_id: trial.driver for trial in trials if trial.status == "running"}


def kill_while_both_run(study, dead, alive):
    """Kill a search while both run a trial; return the driver that is left, and the trials that the other one ran."""
    while True:
        assert (dead.process.poll(), alive.process.poll()) == (None, None)
        if len({*running_trials(study).values()} - {None}) == 2:
            dead.process.send_signal(signal.SIGSTOP)
            running = running_trials(study)
            if len({*running.values()} - {None}) == 2:
                break
            dead.process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
    dead.process.kill()
    dead.process.wait()
    with join_study(read_spec(study).storage) as watcher:
        while len(left := watcher.others()) == 2:
            time.sleep(0.1)
    (survivor,) = left
    return survivor, [trial_id for trial_id, driver in running.items() if driver != survivor]


def test_two_searches_that_start_at_once_share_a_study_and_one_finishes_what_the_other_leaves(folder, start, postgres):
    url, study = postgres.new_database(), folder / "r" / "s"
    asked = ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s", "--trials", TRIALS]
    asked += ["--epochs", 200, "--concurrency", 1, "--storage", url]
    dead, alive = (start("search", *asked) for _ in range(2))
    survivor, abandoned = kill_while_both_run(study, dead, alive)

    for verb, option in (("status", ["--json"]), ("report", [])):
        assert alive.process.poll() is None
        code, out = start(verb, "r/s", *option).ended()
        assert code == 0, out
        assert verb != "status" or json.loads(out)["trials"]["running"] >= 1

    code, out = alive.ended(400)
    assert code == 0, out
    assert "Traceback" not in out
    trials = {trial.trial_id: trial for trial in list_trials(load_study(study))}
    assert [*trials] == [f"{i:04d}" for i in range(TRIALS)]
    statuses = {trial_id: trial.status for trial_id, trial in trials.items()}
    assert {*statuses.values()} <= {"complete", "pruned"}
    assert abandoned
    assert {trials[trial_id].driver for trial_id in abandoned} == {survivor}, "they were taken over"
    table = pd.read_csv(study / "trials.csv", dtype={"trial_id": str})
    assert dict(zip(table["trial_id"], table["status"], strict=True)) == statuses
    assert not pd.read_parquet(study / "curves.parquet").duplicated(["trial_id", "report"]).any()
    best = json.loads((study / "best" / "metrics.json").read_text())
    assert best["best_val_js"] == table["best_val_js"].min()

    code, out = start("search", *asked).ended()
    assert code == 0, out
    assert "every trial has ended" in out
