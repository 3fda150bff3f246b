"""Score what a study could train next in other ways, or with other beliefs, than the project does, to compare them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
from optuna.trial import FrozenTrial
from scipy.special import log_ndtr

from raytune_emotion.tuning.policy import freeze_thaw
from raytune_emotion.tuning.policy.candidates import settings_key
from raytune_emotion.tuning.policy.decisions import Limits
from raytune_emotion.tuning.policy.encoding import Columns, Configurations
from raytune_emotion.tuning.policy.forecast import (
    _PERFECT,
    LENGTHS,
    Curve,
    Forecast,
    _remaining_change,
    curves_of,
)
from raytune_emotion.tuning.policy.freeze_thaw import FreezeThaw
from raytune_emotion.tuning.policy.gaussian_process import Floats, _cholesky
from raytune_emotion.tuning.policy.outlook import STD_FACTOR, Outlook
from raytune_emotion.tuning.policy.trial_attributes import count_reports

#: Range of the goals of `RandomGoal`: logarithms to base 10 of the improvement, as a share of the best value.
_GOALS = (-4.0, -1.0)
#: Log merit of a draw that is no improvement, apart from the draw itself.
_NONE = -1e3


class ThompsonDraw(Outlook):
    """Score by the improvement in one draw of the values (Thompson, 1933): one for new and one for known trials."""

    def log_promise(self, settings: Configurations) -> Floats:
        forecast = self.forecast
        assert forecast is not None
        mean_M, _ = forecast(settings)
        posterior = forecast._posterior
        x_MD = forecast._encode(settings)
        explained_NM = posterior._explain(posterior.kernel(x_MD, posterior._x_ND))
        covariance_MM = posterior.kernel(x_MD, x_MD) - explained_NM.T @ explained_NM
        root_MM = _cholesky(covariance_MM, posterior.kernel.variance)
        draw_M = mean_M + STD_FACTOR * forecast._scale * root_MM @ _rng(self).standard_normal(len(mean_M))
        gain_M = _best(self, mean_M) - draw_M
        log_M: Floats = np.where(gain_M > 0, np.log(np.maximum(gain_M, 1e-300)), _NONE + gain_M)
        return log_M


class RandomGoal(Outlook):
    """Score by the probability per remaining report to reach a goal at full length, drawn for each decision.

    The goals are those of Rakotoarison et al., 2024, "ifBO"; for their horizons see `RandomHorizon`.
    """

    def log_promise(self, settings: Configurations) -> Floats:
        assert self.forecast is not None
        mean_M, std_M = self.forecast(settings)
        return _log_probability(_goal(self, mean_M, _rng(self)), mean_M, std_M)


class Mixed(RandomGoal):
    """Score half of the decisions, drawn at random, by the expected improvement, and the others by a random goal."""

    def log_promise(self, settings: Configurations) -> Floats:
        # The number differs from the one that draws the goal.
        return Outlook.log_promise(self, settings) if _rng(self, 1).random() < 0.5 else super().log_promise(settings)


class RandomHorizon(Outlook):
    """Score by the probability to reach a goal within a number of reports; both are drawn for each decision (ifBO).

    The value at a length is the forecast at that length without the change that is expected after it.
    """

    def log_promise(self, settings: Configurations) -> Floats:
        forecast, reports = self.forecast, self._aim.reports
        assert forecast is not None
        had_of = {settings_key(self._domain.settings(trial)): count_reports(trial) for trial in self._past}
        had_M = np.zeros(len(settings), int)
        if not isinstance(settings, Columns):  # new trials come in columns
            had_M = np.array([had_of[settings_key(each)] for each in settings])
        rng = _rng(self)
        at_M = np.minimum(had_M + rng.integers(1, reports + 1), reports)
        mean_M, std_M = forecast._posterior(forecast._encode(settings, np.log(at_M) / math.log(max(reports, 2))))
        rest_R = _rest(curves_of(self._domain, self._past))
        mean_M = forecast._mean + forecast._scale * mean_M - rest_R[np.minimum(at_M, len(rest_R)) - 1]
        # The caller divides the score by the remaining reports; ifBO does not.
        score_M: Floats = _log_probability(_goal(self, mean_M, rng), mean_M, forecast._scale * std_M)
        score_M += np.log(reports - had_M)
        return score_M


def _rest(curves: Sequence[Curve]) -> Floats:
    """Return the mean remaining change after each report of the logarithm of the values, [R]."""
    value_NR = np.full((len(curves), max(max(curve.values, default=0) for curve in curves)), np.nan)
    for number, curve in enumerate(curves):
        for report, value in curve.values.items():
            value_NR[number, report - 1] = math.log(max(value, _PERFECT))
    return _remaining_change(value_NR)


def _goal(outlook: Outlook, mean_M: Floats, rng: np.random.Generator) -> float:
    """Draw a goal, the same for new and known trials. Values are logarithms."""
    return _best(outlook, mean_M) + math.log1p(-(10 ** rng.uniform(*_GOALS)))


def _log_probability(goal: float, mean_M: Floats, std_M: Floats) -> Floats:
    """Return the logarithm of the probability that values are below a goal, [M]."""
    log_M: Floats = log_ndtr((goal - mean_M) / (STD_FACTOR * std_M))
    return log_M


class EqualLengths(Outlook):
    """Forecast with the same prior of the length scale for every setting: that of a setting without an entry."""

    lengths: ClassVar[Mapping[str, float]] = {}

    def __init__(self, *args: Any, **options: Any) -> None:
        forecast = functools.partial(Forecast, lengths=self.lengths)
        with patch("raytune_emotion.tuning.policy.outlook.Forecast", forecast):
            super().__init__(*args, **options)


class OptimizerLengths(EqualLengths):
    """Forecast with the priors of this project's optimizers for the settings of Taskset, which have other names."""

    lengths: ClassVar[Mapping[str, float]] = {
        "learning_rate": LENGTHS["optim.lr"],
        **dict.fromkeys(
            ("beta1", "beta2", "epsilon", "l1", "l2", "linear_decay", "exponential_decay"), LENGTHS["optim"]
        ),
    }


def _best(outlook: Outlook, mean_M: Floats) -> float:
    assert outlook.forecast is not None
    return outlook.forecast.best if math.isfinite(outlook.forecast.best) else float(mean_M.min())


def _rng(outlook: Outlook, *more: int) -> np.random.Generator:
    """Return a generator for the present decision: its numbers depend on the reports of the study so far."""
    reports = sum(len(trial.intermediate_values) for trial in outlook._past)
    return np.random.default_rng([reports, len(outlook._past), *more])


class OtherScores(FreezeThaw):
    """Decide as the project does, with other scores."""

    def __init__(self, *args: Any, scores: type[Outlook], **options: Any) -> None:
        super().__init__(*args, **options)
        self._scores = scores

    def _make_plan(self, past: Sequence[FrozenTrial], limits: Limits) -> Any:
        with patch.object(freeze_thaw, "Outlook", self._scores):
            return super()._make_plan(past, limits)
