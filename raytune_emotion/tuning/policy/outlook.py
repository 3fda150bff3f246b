"""Score what a study could train next, new configurations and known ones, and choose the best of them."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.tuning.policy.acquisition import (
    expected_fall,
    expected_improvement_of_front,
    log_expected_improvement,
)
from raytune_emotion.tuning.policy.candidates import Domain, Params, draw_candidates, first_untried, row_of
from raytune_emotion.tuning.policy.encoding import Configurations
from raytune_emotion.tuning.policy.forecast import Forecast, curves_of
from raytune_emotion.tuning.policy.gaussian_process import Floats, Kernel, Posterior
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective, pareto_front
from raytune_emotion.tuning.policy.trial_attributes import COST, SECONDS, count_reports, is_running

#: Trials that begin before any is modelled.
STARTUP = 4
#: Trials whose neighbourhood is looked at.
_BEST = 5
#: What the standard deviation of a forecast is multiplied by: it turns out too sure (`benchmarks.calibration`).
STD_FACTOR = 1.4
#: Of what a trial costs: the length of the kernel, in parts of a range, times the root of the dimensions; and its
#: noise, as a share of its variance. Costs are all but free of noise, and simple.
_COST_LENGTH, _COST_NOISE = 0.5, 0.01

#: How far a front is looked at beyond the largest cost that was seen, as a logarithm: up to twice that.
_FRONT_MARGIN = math.log(2)

#: Of the parameters, the best trials and a generator: configurations to choose from.
Draw = Callable[[Mapping[str, BaseDistribution], Sequence[FrozenTrial], np.random.Generator], Params]


@dataclass(frozen=True)
class Offer:
    """A configuration that was not tried, and the logarithm of what it promises."""

    params: dict[str, Any]
    merit: float


@dataclass(frozen=True)
class Aim:
    """What a study is after."""

    objective: Objective = JS_ALONE
    maximize: bool = False
    reports: int = 1  # of a trial that is trained to its end, where that is known


class Outlook:
    """What the trials of a study promise."""

    def __init__(
        self, domain: Domain, past: Sequence[FrozenTrial], aim: Aim = Aim(), earlier: Sequence[Forecast] = ()
    ) -> None:
        """Learn from the trials that have begun, and from what other studies say of configurations."""
        self._domain, self._past, self._aim = domain, past, aim
        self.reported = [trial for trial in past if trial.state != TrialState.FAIL and _values(trial)]
        #: What is expected of configurations; None while too little is known, or where the numbers do not allow it.
        self.forecast: Forecast | None = None
        running = [domain.settings(trial) for trial in past if is_running(trial)]
        known = bool(self.reported) and len(past) - len(running) >= STARTUP
        heeded = [each for each in earlier if each.at_once or known]
        if not heeded and not known:
            return
        try:
            curves = curves_of(domain, past, maximize=aim.maximize)
            forecast = Forecast(domain.encoding, curves, heeded, reports=aim.reports)
            if running:
                forecast.believe(running)
            self.forecast = forecast
        except np.linalg.LinAlgError as error:
            warnings.warn(f"forecast: failed ({error}); proposals are drawn at random", RuntimeWarning, stacklevel=2)

    def log_promise(self, settings: Configurations) -> Floats:
        """Return by how much each of M configurations is expected to better what there is, as a logarithm, [M].

        It is divided by the seconds of a report only where the objective is: what is cheap is seldom best, and a study
        that buys many small improvements never comes to the large ones (`benchmarks/README.md`).
        """
        assert self.forecast is not None
        objective = self._aim.objective
        mean_M, std_M = self.forecast(settings)
        std_M = STD_FACTOR * std_M
        best = self.forecast.best if math.isfinite(self.forecast.best) else float(mean_M.min())
        if objective.cost is None or not self.reported:
            return log_expected_improvement(mean_M, std_M, best)
        known = [self._domain.settings(trial) for trial in self.reported]
        logs_N = np.log([float(trial.user_attrs[COST]) for trial in self.reported])
        cost_M = self._regress(known, logs_N, settings)
        if not objective.front:
            # The cost is time already.
            return log_expected_improvement(mean_M, std_M, best) - cost_M
        # The same for new and for paused trials, which are compared.
        most = float(logs_N.max()) + _FRONT_MARGIN
        gain_M = expected_improvement_of_front(mean_M, std_M, cost_M, self.forecast(known)[0], logs_N, most)
        return np.log(np.maximum(gain_M, 1e-300))

    def expect_fall(self, settings: Configurations, left_M: Floats) -> tuple[Floats, Floats]:
        """Return by how many bits each of M configurations is expected to lower the best JS, and in how many seconds.

        Args:
            settings: of the configurations.
            left_M: reports that are left to each until its end.
        """
        assert self.forecast is not None
        mean_M, std_M = self.forecast(settings)
        fall_M = expected_fall(mean_M, STD_FACTOR * std_M, self.forecast.best)
        seconds_M: Floats = left_M * np.exp(self._log_seconds(settings))
        return fall_M, seconds_M

    def offer(self, rng: np.random.Generator, draw: Draw = draw_candidates) -> Offer | None:
        """Return the most promising configuration that was not tried; None where the space has no other."""
        params = draw(self._domain.parameters, self._leaders(), rng)
        merit_M = np.zeros(len(next(iter(params.values()))))
        if self.forecast is not None:
            merit_M = self.log_promise(self._domain.settings_of(params))
        tried = {self._domain.key_of(trial) for trial in self._past}
        for number in np.argsort(-merit_M, kind="stable"):
            chosen = row_of(params, number)
            if self._domain.key(chosen) not in tried:
                return Offer(chosen, float(merit_M[number]))
        left = first_untried(self._domain, tried)
        return None if left is None else Offer(left, float(merit_M.min()))

    def _leaders(self) -> list[FrozenTrial]:
        """Return the trials worth changing: the best, or those of a front that no cheaper one has bettered."""
        sign = -1.0 if self._aim.maximize else 1.0
        ranked = sorted(self.reported, key=lambda trial: min(sign * value for value in _values(trial)))
        if self._aim.objective.front:
            ranked = pareto_front(ranked, lambda trial: float(trial.user_attrs[COST]))
        return ranked[:_BEST]

    def _log_seconds(self, settings: Configurations) -> Floats:
        """Return the logarithm of the seconds that a report of each of M configurations takes, [M]."""
        timed = [trial for trial in self.reported if trial.user_attrs.get(SECONDS)]
        if not timed:
            return np.zeros(len(settings))
        logs_N = np.log([trial.user_attrs[SECONDS] / count_reports(trial) for trial in timed])
        return self._regress([self._domain.settings(trial) for trial in timed], logs_N, settings)

    def _regress(self, known: Configurations, log_N: Floats, settings: Configurations) -> Floats:
        """Return the expected logarithm of what each of M configurations costs, [M], by what N others have cost."""
        variance = float(log_N.var())
        if variance < 1e-6:
            return np.full(len(settings), log_N.mean())
        x_ND = self._domain.encoding(known)
        length_D = np.full(x_ND.shape[1], _COST_LENGTH * math.sqrt(x_ND.shape[1] + 1))
        posterior = Posterior(Kernel(variance, length_D, _COST_NOISE * variance), x_ND, log_N - log_N.mean())
        log_M: Floats = log_N.mean() + posterior.mean(self._domain.encoding(settings))
        return log_M


def _values(trial: FrozenTrial) -> list[float]:
    """Return what a trial has shown that can be compared."""
    shown = [value for value in trial.intermediate_values.values() if math.isfinite(value)]
    if not shown and trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value):
        shown = [trial.value]
    return shown
