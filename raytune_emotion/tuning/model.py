"""What the trials of a study say of configurations that were not tried.

A Gaussian process over settings and the length trained: what a trial had reached when it was stopped tells of what it
would have reached, as far as other trials have shown what the rest of the way brings.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import FloatDistribution, IntDistribution
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from raytune_emotion.tuning.space import Space

Floats = npt.NDArray[np.float64]

#: Points that the kernel's lengths are fitted to, in a time that grows with their cube. All points are predicted from.
_FITTED = 80
#: Steps of that fit.
_STEPS = 25
#: Of a kernel in D dimensions, as logarithms: variance, D lengths and noise, each with a spread (see `_fit`).
_VARIANCE, _LENGTH, _NOISE = (0.0, 1.0), (math.log(0.5), 1.0), (math.log(0.02), 1.5)
#: The least value, as whose logarithm that of a perfect prediction counts.
_PERFECT = 1e-9
#: The least standard deviation of log values that is told from none.
_SAME = 1e-3
#: Own trials that weigh as much as the belief that an earlier study's ranking holds.
_TRUST = 4.0


@dataclass(frozen=True)
class Encoding:
    """Settings as points of the unit cube: logarithms where they are drawn so, and an axis for every word."""

    ranges: Mapping[str, tuple[float, float, bool]]  # least, most, logarithmic
    choices: Mapping[str, tuple[Any, ...]]

    def __call__(self, settings: Mapping[str, Any]) -> list[float]:
        """Of D coordinates; those of what is not set lie in the middle."""
        numbers = [
            (_scaled(settings[key], low, log) - low) / (high - low) if key in settings else 0.5
            for key, (low, high, log) in self.ranges.items()
        ]
        return numbers + [float(settings.get(key) == word) for key, words in self.choices.items() for word in words]


def encoding_of(space: Space) -> Encoding:
    """The encoding of all that a space can suggest."""
    ranges: dict[str, tuple[float, float, bool]] = {}
    choices: dict[str, tuple[Any, ...]] = {}
    for key in space.columns():
        listed = (0.0, 1.0) if key.startswith("loss.") else space.possible(key)
        if any(isinstance(value, str | bool) for value in listed):
            choices[key] = listed
            continue
        drawn = [d for name, d in space.parameters.items() if name.partition(" ")[0] == key]
        spans = [d for d in drawn if isinstance(d, FloatDistribution | IntDistribution)]
        ends = [*listed, *(d.low for d in spans), *(d.high for d in spans)]
        # Listed numbers, as batch sizes, are steps of a ladder.
        log = any(d.log for d in spans) if spans else min(ends) > 0
        if log:
            ends = [math.log(end) for end in ends if end > 0]
        low, high = min(ends), max(ends)
        if high > low:
            ranges[key] = (low, high, log)
    return Encoding(ranges, choices)


def _scaled(value: float, low: float, log: bool) -> float:
    if not log:
        return value
    # A branch, or another study, may switch off by 0 what is drawn by orders of magnitude elsewhere.
    return math.log(value) if value > 0 else low


@dataclass(frozen=True)
class Curve:
    """What is known of a trial."""

    settings: Mapping[str, Any]
    values: Mapping[int, float]  # the best until a report, by the report's number; none of a trial that failed


class Forecast:
    """Of the logarithm of the best value that a configuration will have reached at full length."""

    def __init__(self, encoding: Encoding, curves: Sequence[Curve], earlier: Sequence["Forecast"] = ()) -> None:
        """Learns from the trials of a study.

        Args:
            encoding: of settings.
            curves: of the study's trials; none of them has to have reported where there are earlier forecasts.
            earlier: forecasts of other studies. This one is then of what they leave open, and they count as far as they
                explain what is known here (after Golovin et al., 2017, "Google Vizier", section 3.3).
        """
        self._encoding, self._earlier = encoding, earlier
        points = [*_points(curves)]
        self._x_ND = np.array([[*encoding(settings), length] for settings, length, _ in points])
        y_N = np.array([value for *_, value in points])
        prior_N = self._prior([settings for settings, *_ in points])
        self._scale: float = (
            max(float(y_N.std()), _SAME) if len(points) > 1 else float(np.mean([f._scale for f in earlier]))
        )
        centred_N = prior_N - np.mean(prior_N) if points else prior_N
        slope = (centred_N @ y_N + _TRUST * self._scale) / (centred_N @ centred_N + _TRUST)
        self._slope = max(0.0, float(slope))
        rest_N = y_N - self._slope * prior_N
        self._mean = float(rest_N.mean()) if points else 0.0
        self._z_N = (rest_N - self._mean) / self._scale
        dims = len(encoding({})) + 1
        self._kernel = ConstantKernel(1.0) * Matern(np.ones(dims), (1e-3, 1e4), nu=2.5) + WhiteKernel(0.02, (1e-6, 1e2))
        if points:
            some = np.unique(np.linspace(0, len(points) - 1, min(_FITTED, len(points))).astype(int))
            with warnings.catch_warnings():
                # Of lengths at their bound: those of settings without consequence.
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted = GaussianProcessRegressor(self._kernel, optimizer=_fit).fit(self._x_ND[some], self._z_N[some])
            self._kernel = fitted.kernel_
        self._condition()

    def __call__(self, settings: Sequence[Mapping[str, Any]]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of M configurations, [M] each, without the luck of a single training."""
        mean_M, std_M = self._process.predict(self._encoded(settings), return_std=True)
        noise = math.exp(self._kernel.theta[-1])
        std_M = np.sqrt(np.maximum(std_M**2 - noise, 1e-12))
        return self._mean + self._slope * self._prior(settings) + self._scale * mean_M, self._scale * std_M

    def believe(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Takes what is predicted of configurations for true, as of those that run: others then promise more."""
        x_MD = self._encoded(settings)
        z_M = self._process.predict(x_MD).reshape(-1)  # of one point, a process without data gives a scalar
        self._z_N = np.concatenate([self._z_N, z_M])
        self._x_ND = np.concatenate([self._x_ND.reshape(-1, x_MD.shape[1]), x_MD])
        self._condition()

    def _condition(self) -> None:
        self._process = GaussianProcessRegressor(self._kernel, optimizer=None)
        if len(self._z_N):
            self._process.fit(self._x_ND, self._z_N)

    def _encoded(self, settings: Sequence[Mapping[str, Any]]) -> Floats:
        return np.array([[*self._encoding(each), 1.0] for each in settings])

    def _prior(self, settings: Sequence[Mapping[str, Any]]) -> Floats:
        """What earlier studies say of M configurations, [M], in standard deviations of theirs."""
        if not settings or not self._earlier:
            return np.zeros(len(settings))
        standard: Floats = np.mean([(f(settings)[0] - f._mean) / f._scale for f in self._earlier], axis=0)
        return standard


def expected_improvement(mean_M: Floats, std_M: Floats, best: float) -> Floats:
    """By how much a normal variable falls below the best in the mean, [M] (Jones et al., 1998)."""
    z_M = (best - mean_M) / std_M
    gain_M: Floats = std_M * (z_M * norm.cdf(z_M) + norm.pdf(z_M))
    return gain_M


def expected_improvement_of_front(
    mean_M: Floats, std_M: Floats, cost_M: Floats, seen_N: Floats, cost_N: Floats
) -> Floats:
    """By how much the area above a front of value and cost grows in the mean, [M].

    The expected hypervolume improvement (Emmerich et al., 2006) where the cost is known: at every cost from the
    candidate's own on it can better what was seen of as much cost.

    Args:
        mean_M: of the candidates' values, normal variables, [M].
        std_M: their standard deviations, [M].
        cost_M: of the candidates, [M].
        seen_N: values until now, [N], N > 0; below the least of their costs, the worst of them counts.
        cost_N: of those, [N].
    """
    order = np.argsort(cost_N, kind="stable")
    least_N = np.minimum.accumulate(seen_N[order])
    step = np.flatnonzero(np.diff(least_N, prepend=np.inf))
    starts = [-np.inf, *cost_N[order][step]]
    ends = [*starts[1:], max(cost_M.max(), cost_N.max())]
    gain_M = np.zeros_like(mean_M)
    for value, start, end in zip([seen_N.max(), *least_N[step]], starts, ends, strict=True):
        width_M = np.maximum(0.0, end - np.maximum(start, cost_M))
        gain_M += width_M * expected_improvement(mean_M, std_M, float(value))
    return gain_M


def _points(curves: Sequence[Curve]) -> Iterator[tuple[Mapping[str, Any], float, float]]:
    """Settings, share of the full length, and log value there, as if the rest of the way brought all trials the same.

    Of every trial its last report and the one at a third, where the stopping rule compares; a trial that failed is as
    bad as the worst.
    """
    failed = [curve.settings for curve in curves if not curve.values]
    reported = [
        (curve.settings, {report: math.log(max(value, _PERFECT)) for report, value in curve.values.items()})
        for curve in curves
        if curve.values
    ]
    most = max((max(logs) for _, logs in reported), default=1)
    steps = [
        [logs[report + 1] - logs[report] for _, logs in reported if {report, report + 1} <= {*logs}]
        for report in range(1, most)
    ]
    # What is left to come after each report, in the mean.
    rest = np.cumsum([0.0, *(float(np.mean(step)) if step else 0.0 for step in reversed(steps))])[::-1]
    worst = -math.inf
    for settings, logs in reported:
        for report in sorted({math.ceil(most / 3), max(logs)} & {*logs}):
            value = logs[report] + float(rest[report - 1])
            worst = max(worst, value)
            yield settings, report / most, value
    if reported:
        yield from ((settings, 1.0, worst) for settings in failed)


def _fit(negative_likelihood: Any, start: Floats, bounds: Floats) -> tuple[Floats, float]:
    """Maximises the likelihood times a prior in which lengths grow with the root of the dimensions.

    After Hvarfner et al., 2024, "Vanilla Bayesian optimization performs great in high dimensions".
    """
    dims = len(start) - 2
    length = (_LENGTH[0] + 0.5 * math.log(dims), _LENGTH[1])
    centre, spread = np.array([_VARIANCE, *[length] * dims, _NOISE]).T

    def loss(theta: Floats) -> tuple[float, Floats]:
        value, slope = negative_likelihood(theta, eval_gradient=True)
        off = (theta - centre) / spread
        return value + 0.5 * float(off @ off), slope + off / spread

    found = minimize(loss, centre, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": _STEPS})
    return found.x, float(found.fun)
