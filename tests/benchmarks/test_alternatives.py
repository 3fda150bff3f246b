"""Other scores than the expected improvement."""

import numpy as np
import pytest
from optuna.distributions import FloatDistribution

from benchmarks.alternatives import OptimizerLengths, RandomGoal
from benchmarks.judge import AS_OPTIM, EQUAL, GOALS, HORIZONS, MIXED, THOMPSON, WITHOUT, Recording, simulate
from benchmarks.taskset import SETTINGS
from raytune_emotion.tuning.space.space import Space


class Forecast:
    """Predict values by the setting x, all equally uncertain."""

    best = 0.0

    def __call__(self, settings):
        return np.array([each["x"] for each in settings]), np.full(len(settings), 0.5)


def test_a_goal_is_the_more_probable_the_better_the_forecast_and_is_the_same_within_a_decision():
    outlook = object.__new__(RandomGoal)
    outlook.forecast, outlook._past = Forecast(), []
    settings = [{"x": x} for x in (-1.0, -0.1, 0.0, 0.5)]
    score_M = outlook.log_promise(settings)
    assert (np.diff(score_M) < 0).all()
    assert score_M.max() < 0
    assert outlook.log_promise(settings[1:2]) == score_M[1]


def recording(setting: str = "x") -> Recording:
    """Make a task whose best configurations have a setting near 0.3."""
    x_N = np.linspace(0, 1, 60)
    value_NR = 0.1 + (x_N[:, None] - 0.3) ** 2 + 0.5 * np.exp(-np.arange(1, 13) / 3)
    space = Space({setting: FloatDistribution(0.0, 1.0)})
    params = [{setting: float(x)} for x in x_N]
    return Recording("task", space, params, value_NR, np.ones_like(value_NR), 250, 0.0, True)


@pytest.mark.parametrize("name", [WITHOUT, THOMPSON, GOALS, MIXED, HORIZONS, EQUAL])
def test_a_study_finds_the_best_configurations_with_each_score_and_again_the_same(name):
    found = simulate(recording(), name, 1, 0)
    assert found.best[-1] < 0.12
    again = simulate(recording(), name, 1, 0)
    assert (again.best.tolist(), again.seconds.tolist()) == (found.best.tolist(), found.seconds.tolist())


def test_thompson_draws_differ_from_the_expected_improvement():
    begun = {name: simulate(recording(), name, 1, 0).begun.tolist() for name in (WITHOUT, THOMPSON)}
    assert begun[WITHOUT] != begun[THOMPSON]


def test_other_priors_of_length_scales_hold_for_settings_that_have_one():
    def results(setting, policy):
        found = simulate(recording(setting), policy, 1, 0)
        return found.best.tolist(), found.seconds.tolist(), found.begun.tolist()

    assert results("x", EQUAL) == results("x", AS_OPTIM) == results("x", WITHOUT)
    assert results("optim.lr", EQUAL) == results("x", WITHOUT) != results("optim.lr", WITHOUT)
    assert results("learning_rate", AS_OPTIM) == results("optim.lr", WITHOUT)
    assert {*OptimizerLengths.lengths} == {*SETTINGS}
