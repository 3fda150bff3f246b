"""What a stranger's journal may say of trials."""

import optuna
import pytest
from optuna.distributions import FloatDistribution

from raytune_emotion.tuning.policy.trial_attributes import (
    CONFIRMS,
    CONTINUES,
    COST,
    PAUSED,
    REASON,
    RESUMED_IN,
    SECONDS,
    SETTINGS,
    TAKEN_UP,
)
from raytune_emotion.tuning.study.journal_check import check_trials


def make_trial(attributes=None, params=None, **changes):
    values = {"value": 0.25, "intermediate_values": {1: 0.5, 2: 0.25}, **changes}
    space = {"optim.lr": FloatDistribution(1e-4, 1e-1)}
    own = {SETTINGS: {"optim.lr": 1e-3, "data.classes": ["happy", "sad"]}, **(attributes or {})}
    return optuna.trial.create_trial(params=params or {"optim.lr": 1e-3}, distributions=space, user_attrs=own, **values)


def test_what_a_search_writes_is_taken():
    attributes = {
        COST: 2.5,
        SECONDS: 1.0,
        PAUSED: True,
        TAKEN_UP: 2,
        RESUMED_IN: 0.5,
        REASON: "died",
        CONTINUES: "0000",
        CONFIRMS: "0007",
    }
    check_trials([make_trial(), make_trial(attributes), make_trial({CONTINUES: None})])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (SETTINGS, []),
        (SETTINGS, {"optim.lr": {"nested": 1}}),
        (SETTINGS, {"optim.lr": float("nan")}),
        (SETTINGS, {"loss.kl": "much"}),
        (COST, "much"),
        (SECONDS, float("inf")),
        (SECONDS, True),
        (PAUSED, 1),
        (TAKEN_UP, -1),
        (RESUMED_IN, "long"),
        (REASON, None),
        (CONFIRMS, 7),
        (CONTINUES, "../../0000"),
        (CONTINUES, "0002"),
        (CONTINUES, 0),
    ],
)
def test_an_attribute_of_another_kind_is_refused(name, value):
    with pytest.raises(ValueError, match=f"trial 0: {name}: not in the format of a search"):
        check_trials([make_trial({name: value}), make_trial()])


def test_a_report_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="its reports: not in the format of a search"):
        check_trials([make_trial(intermediate_values={1: float("nan")})])
