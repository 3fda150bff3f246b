"""The importance of settings."""

import dataclasses
import math
import random

import pytest

from raytune_emotion.tuning.report.axes import Axis
from raytune_emotion.tuning.report.importance import MIN_TRIALS, importances
from raytune_emotion.tuning.study.records import TrialRecord

AXES = [
    Axis("optim.lr", "log", 1e-4, 1e-1),
    Axis("model.dropout", "linear", 0.0, 0.5),
    Axis("optim.name", "choice", choices=("adam", "sgd")),
]


def made(count):
    rng = random.Random(0)
    records = []
    for i in range(count):
        settings = {"optim.lr": 10 ** rng.uniform(-4, -1), "model.dropout": rng.uniform(0, 0.5)}
        if i % 2:  # a branch in which the setting is absent
            settings["optim.name"] = rng.choice(["adam", "sgd"])
        js = 0.2 + 0.05 * (math.log10(settings["optim.lr"]) + 2) ** 2
        records.append(TrialRecord(f"{i:04d}", "complete", settings, "", ({"epoch": 1.0, "val_js": js},)))
    return records


def test_the_setting_that_decides_comes_first_with_an_interval_around_it():
    found = importances(made(60), AXES)
    assert found[0].name == "optim.lr"
    assert found[0].low > found[1].high
    assert all(importance.low <= importance.mean <= importance.high for importance in found)
    assert sum(importance.mean for importance in found) == 1 or math.isclose(sum(i.mean for i in found), 1)


def test_what_chance_gives_is_beside_it():
    """Without influence, the lines reach the chance level; a setting that decides is far above it."""
    found = {importance.name: importance for importance in importances(made(60), AXES)}
    assert found["optim.lr"].low > 1.5 * found["optim.lr"].chance
    assert sum(importance.chance for importance in found.values()) == pytest.approx(1)
    rng = random.Random(1)
    reports = [({"epoch": 1.0, "val_js": rng.random()},) for _ in range(60)]
    noise = [dataclasses.replace(record, reports=own) for record, own in zip(made(60), reports, strict=True)]
    assert all(importance.low <= importance.chance + 0.1 for importance in importances(noise, AXES))


def test_it_is_the_same_each_time():
    assert importances(made(30), AXES) == importances(made(30), AXES)


def test_a_few_trials_tell_nothing():
    assert importances(made(MIN_TRIALS - 1), AXES) == []
    assert len(importances(made(MIN_TRIALS), AXES)) == len(AXES)


def test_failed_trials_do_not_count():
    records = [TrialRecord(r.trial_id, "failed", r.settings, "", r.reports) for r in made(30)]
    assert importances(records, AXES) == []


@pytest.mark.parametrize("holders", [1, 0])
def test_setting_of_a_branch_that_few_trials_took_or_none_is_no_error(holders):
    records = made(20)
    for record in records[2 * holders :]:
        record.settings.pop("optim.name", None)
    found = {importance.name: importance for importance in importances(records, AXES)}
    assert found.keys() == {axis.name for axis in AXES}
    assert found["optim.name"].low == 0
    assert sum(importance.mean for importance in found.values()) == pytest.approx(1)
