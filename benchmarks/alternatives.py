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
from raytune_emotion.tuning.policy.decisions import Limits
from raytune_emotion.tuning.policy.encoding import Configurations
from raytune_emotion.tuning.policy.forecast import LENGTHS, Forecast
from raytune_emotion.tuning.policy.freeze_thaw import FreezeThaw
from raytune_emotion.tuning.policy.gaussian_process import Floats, _cholesky
from raytune_emotion.tuning.policy.outlook import STD_FACTOR, Outlook

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
    """Score by the probability to reach a goal that is drawn for each decision (Rakotoarison et al., 2024, "ifBO").

    Their random horizon is left out: the forecast knows values at full length alone.
    """

    def log_promise(self, settings: Configurations) -> Floats:
        assert self.forecast is not None
        mean_M, std_M = self.forecast(settings)
        # The same for new and known trials. Values are logarithms.
        goal = _best(self, mean_M) + math.log1p(-(10 ** _rng(self).uniform(*_GOALS)))
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


def _rng(outlook: Outlook) -> np.random.Generator:
    """Return a generator for the present decision: its numbers depend on the reports of the study so far."""
    return np.random.default_rng([sum(len(trial.intermediate_values) for trial in outlook._past), len(outlook._past)])


class OtherScores(FreezeThaw):
    """Decide as the project does, with other scores."""

    def __init__(self, *args: Any, scores: type[Outlook], **options: Any) -> None:
        super().__init__(*args, **options)
        self._scores = scores

    def _make_plan(self, past: Sequence[FrozenTrial], limits: Limits) -> Any:
        with patch.object(freeze_thaw, "Outlook", self._scores):
            return super()._make_plan(past, limits)
