"""Score the configurations that a study could train next, new and known ones, and choose the best of them."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.special import logsumexp

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
from raytune_emotion.tuning.policy.trial_attributes import COST, SECONDS, count_reports, is_running, result_of

#: Number of paused or ended trials from which a forecast is made.
STARTUP = 4
#: Number of best trials that are mutated.
_BEST = 5
#: Number of the most promising candidates that an offer carries.
_SHORTLIST = 64
#: Factor on the standard deviation of a forecast, which is overconfident (`benchmarks.calibration`).
STD_FACTOR = 1.4
#: Kernel of the cost of a trial: length scale, as a share of a range, times the root of the number of dimensions; and
#: noise, as a share of the variance. Costs have almost no noise and a simple form.
_COST_LENGTH, _COST_NOISE = 0.5, 0.01

#: Margin of a front beyond the largest observed cost, as a logarithm: up to twice that cost.
_FRONT_MARGIN = math.log(2)

#: Function from the parameters, the best trials and a generator to candidates.
Draw = Callable[[Mapping[str, BaseDistribution], Sequence[FrozenTrial], np.random.Generator], Params]


@dataclass(frozen=True)
class Offer:
    """An untried configuration with its log merit."""

    params: dict[str, Any]
    merit: float
    average: float  # logarithm of the mean merit of the candidates
    shortlist: Params  # the most promising candidates, for the next offers


@dataclass(frozen=True)
class Aim:
    """The objective, the direction and the length of trials of a study."""

    objective: Objective = JS_ALONE
    maximize: bool = False
    reports: int = 1  # reports of a trial that is trained to its end, if known


class Outlook:
    """Forecasts for the configurations of a study, given its past."""

    def __init__(
        self,
        domain: Domain,
        past: Sequence[FrozenTrial],
        aim: Aim = Aim(),
        earlier: Sequence[Forecast] = (),
        kernel: Kernel | None = None,
    ) -> None:
        """Learn from the trials that have begun, and from forecasts of other studies.

        Args:
            domain: parameters of the study.
            past: every trial that has begun.
            aim: objective and length of the trials.
            earlier: forecasts of other studies.
            kernel: kernel of an earlier outlook of this study; by default, it is fitted.
        """
        self._domain, self._past, self._aim = domain, past, aim
        self.reported = [trial for trial in past if trial.state != TrialState.FAIL and not math.isnan(result_of(trial))]
        #: Forecast of configurations; None while too little is known, or after a numerical failure.
        self.forecast: Forecast | None = None
        running = [domain.settings(trial) for trial in past if is_running(trial)]
        known = bool(self.reported) and len(past) - len(running) >= STARTUP
        heeded = [each for each in earlier if each.at_once or known]
        if not heeded and not known:
            return
        try:
            curves = curves_of(domain, past, maximize=aim.maximize)
            forecast = Forecast(domain.encoding, curves, heeded, reports=aim.reports, kernel=kernel)
            if running:
                forecast.believe(running)
            self.forecast = forecast
        except np.linalg.LinAlgError as error:
            warnings.warn(f"forecast: failed ({error}); proposals are drawn at random", RuntimeWarning, stacklevel=2)

    def log_promise(self, settings: Configurations) -> Floats:
        """Return the logarithm of the expected improvement of M configurations, [M].

        It is divided by the seconds of a report only if the objective is per hour. Cheap configurations are seldom the
        best, and a study that collects many small improvements never reaches the large ones (`benchmarks/README.md`).
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
            # The cost is a time.
            return log_expected_improvement(mean_M, std_M, best) - cost_M
        # Use the same bound for new and for paused trials, because they are compared.
        most = float(logs_N.max()) + _FRONT_MARGIN
        gain_M = expected_improvement_of_front(mean_M, std_M, cost_M, self.forecast(known)[0], logs_N, most)
        return np.log(np.maximum(gain_M, 1e-300))

    def expect_fall(self, settings: Configurations, left_M: Floats) -> tuple[Floats, Floats]:
        """Return the expected decrease of the best JS by each of M configurations, bits, and the seconds for it.

        Args:
            settings: settings of the configurations.
            left_M: number of remaining reports of each.
        """
        assert self.forecast is not None
        mean_M, std_M = self.forecast(settings)
        fall_M = expected_fall(mean_M, STD_FACTOR * std_M, self.forecast.best)
        seconds_M: Floats = left_M * np.exp(self._log_seconds(settings))
        return fall_M, seconds_M

    def candidates(self, rng: np.random.Generator, draw: Draw = draw_candidates) -> Params:
        """Draw candidates for a new trial."""
        return draw(self._domain.parameters, self._leaders(), rng)

    def offer(self, params: Params, *, or_other: bool = True) -> Offer | None:
        """Return the most promising untried configuration among candidates; None if there is none.

        Args:
            params: candidates.
            or_other: whether another configuration of a small space is returned if all candidates were tried.
        """
        merit_M = np.zeros(len(next(iter(params.values()))))
        if self.forecast is not None:
            merit_M = self.log_promise(self._domain.settings_of(params))
        average = float(logsumexp(merit_M)) - math.log(len(merit_M))
        tried = self._domain.tried(self._past)
        order_M = np.argsort(-merit_M, kind="stable")
        shortlist = {name: column_M[order_M[:_SHORTLIST]] for name, column_M in params.items()}
        for number in order_M:
            chosen = row_of(params, number)
            if tried.isdisjoint(self._domain.keys(chosen)):
                return Offer(chosen, float(merit_M[number]), average, shortlist)
        left = first_untried(self._domain, tried) if or_other else None
        return None if left is None else Offer(left, float(merit_M.min()), average, shortlist)

    def _leaders(self) -> list[FrozenTrial]:
        """Return the trials to mutate: the best ones, or the best ones of the Pareto front."""
        sign = -1.0 if self._aim.maximize else 1.0
        ranked = sorted(self.reported, key=lambda trial: sign * result_of(trial))
        if self._aim.objective.front:
            ranked = pareto_front(ranked, lambda trial: float(trial.user_attrs[COST]))
        return ranked[:_BEST]

    def _log_seconds(self, settings: Configurations) -> Floats:
        """Return the logarithm of the seconds per report of M configurations, [M]."""
        timed = [trial for trial in self.reported if trial.user_attrs.get(SECONDS)]
        if not timed:
            return np.zeros(len(settings))
        logs_N = np.log([trial.user_attrs[SECONDS] / count_reports(trial) for trial in timed])
        return self._regress([self._domain.settings(trial) for trial in timed], logs_N, settings)

    def _regress(self, known: Configurations, log_N: Floats, settings: Configurations) -> Floats:
        """Predict the logarithm of the costs of M configurations, [M], from those of N known ones."""
        variance = float(log_N.var())
        if variance < 1e-6:
            return np.full(len(settings), log_N.mean())
        x_ND = self._domain.encoding(known)
        length_D = np.full(x_ND.shape[1], _COST_LENGTH * math.sqrt(x_ND.shape[1] + 1))
        posterior = Posterior(Kernel(variance, length_D, _COST_NOISE * variance), x_ND, log_N - log_N.mean())
        log_M: Floats = log_N.mean() + posterior.mean(self._domain.encoding(settings))
        return log_M
