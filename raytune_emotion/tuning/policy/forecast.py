"""What the trials of a study say of configurations that were not tried.

A Gaussian process over settings and the length trained: what a trial had reached when it was stopped tells of what it
would have reached, as far as other trials have shown what the rest of the way brings.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from optuna.distributions import FloatDistribution, IntDistribution
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import norm

from raytune_emotion.tuning.space.space import Space

Floats = npt.NDArray[np.float64]
#: Of M configurations: one after the other, or as a table of one row each.
Configurations = Sequence[Mapping[str, Any]] | pd.DataFrame

#: Points that the kernel's lengths are fitted to, in a time that grows with their cube. All points are predicted from.
_FITTED = 80
#: Steps of that fit.
_STEPS = 25
#: What is believed of a kernel before a trial is seen: of its variance and noise the logarithm, with a spread.
_VARIANCE, _NOISE = (0.0, 1.0), (math.log(0.02), 1.5)
#: Of its lengths, in parts of a setting's range and with the spread of their logarithms: of a setting that nothing is
#: known of, times the root of the dimensions (after Hvarfner et al., 2024, "Vanilla Bayesian optimization performs
#: great in high dimensions"); of the share of the full length that was trained; and the spread of those in `LENGTHS`.
_UNKNOWN, _TRAINED, _SPREAD = (0.5, 1.0), (1.2, 0.4), 0.4
#: How much settings matter to the JS, by how their names begin: the less, the longer. Read off two sets of recorded
#: curves, which agree in it (`benchmarks/curves`).
LENGTHS = {
    "optim.lr": 0.7,
    "train.batch_size": 1.6,
    "model.backbone": 2.0,
    "loss": 3.5,
    "model": 5.0,
    "optim": 5.0,
    "augment": 5.0,
}
#: Spreads from the centre that bound the fit.
_FAR = 6.0
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

    @property
    def names(self) -> list[str]:
        """The setting of every coordinate, [D]."""
        return [*self.ranges, *(key for key, listed in self.choices.items() for _ in listed)]

    def __call__(self, settings: Configurations) -> Floats:
        """The points, [M, D]; coordinates of what is not set lie in the middle."""
        table = pd.DataFrame(settings, columns=[*self.ranges, *self.choices])
        numbers = [
            np.nan_to_num((_scaled(table[key].to_numpy(float), low, log) - low) / (high - low), nan=0.5)
            for key, (low, high, log) in self.ranges.items()
        ]
        words = [(table[key] == word).to_numpy(float) for key, listed in self.choices.items() for word in listed]
        return np.stack([*numbers, *words], axis=1)


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


def _scaled(value_M: Floats, low: float, log: bool) -> Floats:
    if not log:
        return value_M
    # A branch, or another study, may switch off by 0 what is drawn by orders of magnitude elsewhere.
    return np.where(value_M <= 0, low, np.log(np.where(value_M <= 0, 1.0, value_M)))


@dataclass(frozen=True)
class Curve:
    """What is known of a trial."""

    settings: Mapping[str, Any]
    values: Mapping[int, float]  # the best until a report, by the report's number; none of a trial that failed


class Forecast:
    """Of the logarithm of the best value that a configuration will have reached at full length."""

    def __init__(
        self,
        encoding: Encoding,
        curves: Sequence[Curve],
        earlier: Sequence["Forecast"] = (),
        lengths: Mapping[str, float] = LENGTHS,
    ) -> None:
        """Learns from the trials of a study.

        Args:
            encoding: of settings.
            curves: of the study's trials; none of them has to have reported where there are earlier forecasts.
            earlier: forecasts of other studies. This one is then of what they leave open, and they count as far as they
                explain what is known here (after Golovin et al., 2017, "Google Vizier", section 3.3).
            lengths: the parts of their ranges over which settings are believed to make a difference, by how their names
                begin; of other settings nothing is believed.
        """
        self._encoding, self._earlier = encoding, earlier
        points = [*_points(curves)]
        self._x_ND = self._encoded([settings for settings, *_ in points], [length for _, length, _ in points])
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
        some = np.unique(np.linspace(0, len(points) - 1, min(_FITTED, len(points))).astype(int))
        self._kernel = _fit(self._x_ND[some], self._z_N[some], _believed(encoding, lengths))
        self._condition()

    def __call__(self, settings: Configurations) -> tuple[Floats, Floats]:
        """Mean and standard deviation of M configurations, [M] each, without the luck of a single training."""
        similar_MN = self._kernel(self._encoded(settings), self._x_ND)
        explained_NM = solve_triangular(self._root_NN, similar_MN.T, lower=True)
        mean_M = similar_MN @ self._weights_N
        std_M = np.sqrt(np.maximum(self._kernel.variance - (explained_NM**2).sum(axis=0), 1e-12))
        return self._mean + self._slope * self._prior(settings) + self._scale * mean_M, self._scale * std_M

    def believe(self, settings: Configurations) -> None:
        """Takes what is predicted of configurations for true, as of those that run: others then promise more."""
        x_MD = self._encoded(settings)
        z_M = self._kernel(x_MD, self._x_ND) @ self._weights_N
        self._x_ND, self._z_N = np.concatenate([self._x_ND, x_MD]), np.concatenate([self._z_N, z_M])
        self._condition()

    def _condition(self) -> None:
        noise_NN = self._kernel.noise * np.eye(len(self._x_ND))
        self._root_NN = np.linalg.cholesky(self._kernel(self._x_ND, self._x_ND) + noise_NN)
        self._weights_N: Floats = cho_solve((self._root_NN, True), self._z_N)

    def _encoded(self, settings: Configurations, lengths: Sequence[float] | None = None) -> Floats:
        x_MD = self._encoding(settings)
        return np.column_stack([x_MD, np.ones(len(x_MD)) if lengths is None else lengths])

    def _prior(self, settings: Configurations) -> Floats:
        """What earlier studies say of M configurations, [M], in standard deviations of theirs."""
        if not len(settings) or not self._earlier:
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


@dataclass(frozen=True)
class _Kernel:
    """Matérn's of ν = 5/2."""

    variance: float
    length_D: Floats
    noise: float  # variance of a single training

    def __call__(self, x_MD: Floats, y_ND: Floats) -> Floats:
        """Covariance without noise, [M, N]."""
        return self.variance * _matern(math.sqrt(5) * cdist(x_MD / self.length_D, y_ND / self.length_D))


def _matern(r: Floats) -> Floats:
    return (1 + r + r * r / 3) * np.exp(-r)


def _believed(encoding: Encoding, lengths: Mapping[str, float]) -> Floats:
    """Centre and spread of the logarithm of every coordinate's length, [D, 2]; the share trained is the last."""
    unknown = _UNKNOWN[0] * math.sqrt(len(encoding.names) + 1), _UNKNOWN[1]
    believed = [*(_known(name, lengths) or unknown for name in encoding.names), _TRAINED]
    return np.array([(math.log(length), spread) for length, spread in believed])


def _known(name: str, lengths: Mapping[str, float]) -> tuple[float, float] | None:
    found = max((key for key in lengths if f"{name}.".startswith(f"{key}.")), key=len, default=None)
    return (lengths[found], _SPREAD) if found else None


def _fit(x_ND: Floats, z_N: Floats, lengths_D2: Floats) -> _Kernel:
    """Maximises the likelihood times what is believed before."""
    count = len(x_ND)
    centre, spread = np.array([_VARIANCE, *lengths_D2, _NOISE]).T
    squares_NND = (x_ND[:, None] - x_ND) ** 2

    def loss(theta: Floats) -> tuple[float, Floats]:
        variance, inverse_D, noise = math.exp(theta[0]), np.exp(-2 * theta[1:-1]), math.exp(theta[-1])
        r_NN = np.sqrt(5 * (squares_NND @ inverse_D))
        k_NN = variance * _matern(r_NN)
        root = cho_factor(k_NN + noise * np.eye(count), lower=True)
        weights_N = cho_solve(root, z_N)
        # Half of it is the slope of the likelihood by the covariance (Rasmussen & Williams, 2006, equation 5.9).
        slope_NN = cho_solve(root, np.eye(count)) - np.outer(weights_N, weights_N)
        by_square_NN = slope_NN * variance * (1 + r_NN) * np.exp(-r_NN)
        slope = np.array([
            0.5 * (slope_NN * k_NN).sum(),
            *(5 / 6 * inverse_D * np.tensordot(by_square_NN, squares_NND)),
            0.5 * noise * np.trace(slope_NN),
        ])  # fmt: skip
        off = (theta - centre) / spread
        value = 0.5 * z_N @ weights_N + np.log(np.diag(root[0])).sum() + 0.5 * off @ off
        return float(value), slope + off / spread

    bounds = [(mean - _FAR * std, mean + _FAR * std) for mean, std in zip(centre, spread, strict=True)]
    found = minimize(loss, centre, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": _STEPS})
    return _Kernel(math.exp(found.x[0]), np.exp(found.x[1:-1]), math.exp(found.x[-1]))
