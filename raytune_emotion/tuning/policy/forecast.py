"""Forecast the value of configurations at full length from the reports of trials so far.

The forecast is a Gaussian process over the settings and the trained length. The value of a paused or stopped trial is
extrapolated by the improvement that longer trials have shown after that length.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.tuning.policy.candidates import Domain
from raytune_emotion.tuning.policy.encoding import Configurations, Encoding
from raytune_emotion.tuning.policy.gaussian_process import Floats, Kernel, Posterior, Prior, fit_kernel

Ints = npt.NDArray[np.intp]

#: Log-normal priors of the kernel's variance and noise: mean and standard deviation of the logarithm.
_VARIANCE, _NOISE = (0.0, 1.0), (math.log(0.02), 1.5)
#: Log-normal priors of the length scales, each as a share of a setting's range and a standard deviation of the
#: logarithm. First, the prior of a setting without an entry in `LENGTHS`, times the root of the number of dimensions
#: (after Hvarfner et al., 2024, "Vanilla Bayesian optimization performs great in high dimensions", but shorter: with
#: long initial lengths, the kernel takes differences for noise for too long). Second, the prior of the logarithm of the
#: trained length. Third, the standard deviation for the settings in `LENGTHS`.
_UNKNOWN, _TRAINED, _SPREAD = (0.2, 1.0), (1.2, 0.4), 0.4
#: Prior length scales by the first parts of the settings' names. A longer scale means less influence on the JS. They
#: were read off the recorded curves in `benchmarks/curves`, on which the search is also evaluated.
LENGTHS = {
    "optim.lr": 0.7,
    "train.batch_size": 1.6,
    "model.backbone": 2.0,
    "loss": 3.5,
    "model": 5.0,
    "optim": 5.0,
    "augment": 5.0,
}
#: Lower bound of values before the logarithm is taken.
_PERFECT = 1e-9
#: Lower bound of the standard deviation of log values.
_SAME = 1e-3
#: Weight, in own values, of the prior that an earlier study's ranking and its scale of values hold.
_TRUST = 4.0
#: Largest number of points of the Gaussian process, whose time grows with the cube of it; and largest number of failed
#: trials, the newest, among them.
_POINTS, _FAILED = 400, 100


@dataclass(frozen=True)
class Curve:
    """The settings and the reported values of a trial."""

    settings: Mapping[str, Any]
    values: Mapping[int, float]  # by the report's number; empty for a failed trial


class Forecast:
    """Forecast the best value of a configuration at full length; its logarithm, if no value is negative.

    Full length is the length of the longest trial so far.
    """

    def __init__(
        self,
        encoding: Encoding,
        curves: Sequence[Curve],
        earlier: Sequence["Forecast"] = (),
        lengths: Mapping[str, float] = LENGTHS,
        reports: int = 1,
        at_once: bool = True,
        kernel: Kernel | None = None,
    ) -> None:
        """Learn from the trials of a study.

        Args:
            encoding: encoding of settings.
            curves: curves of the study's trials. They may be empty if there are earlier forecasts.
            earlier: forecasts of other studies. This one then models the residual, and the others count as far as they
                explain the values of this study (after Golovin et al., 2017, "Google Vizier", section 3.3).
            lengths: prior length scales, as shares of the ranges of settings, by the first parts of their names.
            reports: reports of a trial that is trained to its end, if known.
            at_once: whether a study that starts from this forecast uses it from its first trial on. Otherwise its first
                trials begin without it, and show how useful it is.
            kernel: kernel of an earlier forecast of the same study; by default, it is fitted.
        """
        self._encoding, self._earlier, self.at_once = encoding, earlier, at_once
        points = _points(curves, reports)
        self._share, self.best = points.longest, points.best
        prior_N = self._prior(points.settings)
        y_N = points.value_N
        self._scale: float = _scale_of(y_N, [forecast._scale for forecast in earlier])
        centred_N = prior_N - np.mean(prior_N) if len(y_N) else prior_N
        slope = (centred_N @ y_N + _TRUST * self._scale) / (centred_N @ centred_N + _TRUST)
        self._slope = max(0.0, float(slope))
        rest_N = y_N - self._slope * prior_N
        self._mean = float(rest_N.mean()) if len(y_N) else 0.0
        x_ND = self._encode(points.settings, points.share_N)
        z_N = (rest_N - self._mean) / self._scale
        self.kernel = kernel or _fit(x_ND, z_N, _kernel_prior(encoding, lengths))
        self._posterior = Posterior(self.kernel, x_ND, z_N)

    def __call__(self, settings: Configurations) -> tuple[Floats, Floats]:
        """Return mean and standard deviation for M configurations, [M] each, without the noise of a single training."""
        mean_M, std_M = self._posterior(self._encode(settings))
        return self._mean + self._slope * self._prior(settings) + self._scale * mean_M, self._scale * std_M

    def believe(self, settings: Configurations) -> None:
        """Treat the predictions for configurations that run as observed, so that other configurations promise more."""
        self._posterior.believe(self._encode(settings))

    def standard_scores(self, settings: Configurations) -> Floats:
        """Return the standardised means of M configurations, in standard deviations of this study's values, [M]."""
        standard_M: Floats = (self(settings)[0] - self._mean) / self._scale
        return standard_M

    def _encode(self, settings: Configurations, share_M: Floats | None = None) -> Floats:
        x_MD = self._encoding(settings)
        return np.column_stack([x_MD, np.full(len(x_MD), self._share) if share_M is None else share_M])

    def _prior(self, settings: Configurations) -> Floats:
        """Return the mean of the earlier studies' standard scores for M configurations, [M]."""
        if not len(settings) or not self._earlier:
            return np.zeros(len(settings))
        standard_M: Floats = np.mean([f.standard_scores(settings) for f in self._earlier], axis=0)
        return standard_M


def _fit(x_ND: Floats, z_N: Floats, prior: Prior) -> Kernel:
    """Fit the kernel; warn if that fails."""
    kernel, failure = fit_kernel(x_ND, z_N, prior)
    if failure:
        warnings.warn(
            f"forecast: the kernel could not be fitted ({failure}); the prior is used", RuntimeWarning, stacklevel=2
        )
    return kernel


def _scale_of(y_N: Floats, earlier: Sequence[float]) -> float:
    """Estimate the standard deviation of the values, with those of earlier studies as a prior."""
    if not earlier:
        return max(float(y_N.std()), _SAME) if len(y_N) > 1 else 1.0
    squares = float(((y_N - y_N.mean()) ** 2).sum()) if len(y_N) else 0.0
    variance = (squares + _TRUST * float(np.mean(earlier)) ** 2) / (len(y_N) + _TRUST)
    return max(math.sqrt(variance), _SAME)


def curves_of(domain: Domain, trials: Sequence[FrozenTrial], *, maximize: bool = False) -> list[Curve]:
    """Return the curves of trials, by the number of the report. The curve of a failed trial is empty.

    The value of a complete trial counts as its last report; without reports, as a value at full length. Optuna's users
    also prune a trial without a report, if its configuration is of no use: it counts as failed.
    """
    reported = [trial for trial in trials if trial.intermediate_values]
    steps = sorted({step for trial in reported for step in trial.intermediate_values})
    number_of = {step: number for number, step in enumerate(steps or [1], start=1)}
    sign = -1.0 if maximize else 1.0
    as_shown = not maximize and all(step == number for step, number in number_of.items())
    curves = []
    for trial in trials:
        shown: Mapping[int, float] = trial.intermediate_values
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            last = max(shown, default=max(number_of))
            if shown.get(last) != trial.value:
                shown = {**shown, last: trial.value}
        if as_shown and math.isfinite(sum(shown.values())):  # the usual case, without a copy
            finite = shown
        else:
            finite = {number_of[step]: sign * value for step, value in shown.items() if math.isfinite(value)}
        pruned = trial.state == TrialState.PRUNED and not shown
        if trial.state == TrialState.FAIL or pruned or (shown and not finite):
            curves.append(Curve(domain.settings(trial), {}))
        elif finite:
            curves.append(Curve(domain.settings(trial), finite))
    return curves


@dataclass(frozen=True)
class _Points:
    """The N points from which a forecast learns."""

    settings: list[Mapping[str, Any]]
    share_N: Floats  # trained share of the full length, on a logarithmic scale
    value_N: Floats  # values, extrapolated to the length of the longest trial
    longest: float  # share of the longest trial
    best: float  # lowest last value of a trial


def _points(curves: Sequence[Curve], reports: int) -> _Points:
    """Choose a few reports of every trial, and extrapolate them by the mean remaining change of all trials.

    These are the last report and, as far as there is room, reports 2, 4, 8, … before it. A failed trial counts as the
    worst value.
    """
    seen = [curve for curve in curves if curve.values]
    if not seen:
        return _Points([], np.zeros(0), np.zeros(0), 1.0, math.inf)
    count_N = np.array([len(curve.values) for curve in seen])
    numbers = np.array([number for curve in seen for number in curve.values])
    last_N = np.maximum.reduceat(numbers, np.cumsum(count_N) - count_N)
    most = int(last_N.max())
    value_NR = np.full((len(seen), most), np.nan)
    rows = np.repeat(np.arange(len(seen)), count_N)
    value_NR[rows, numbers - 1] = [value for curve in seen for value in curve.values.values()]
    if np.nanmin(value_NR) >= 0:
        value_NR = np.log(np.maximum(value_NR, _PERFECT))
    rest_R = _remaining_change(value_NR)
    failed = [curve.settings for curve in curves if not curve.values][-_FAILED:]
    row_N, at_N = _choose_reports(value_NR, last_N, _POINTS - len(failed))
    value_N = value_NR[row_N, at_N - 1] + rest_R[at_N - 1]
    length = math.log(max(reports, most, 2))
    longest = math.log(most) / length
    return _Points(
        [*(seen[row].settings for row in row_N), *failed],
        np.concatenate([np.log(at_N) / length, np.full(len(failed), longest)]),
        np.concatenate([value_N, np.full(len(failed), value_N.max())]),
        longest,
        float(value_NR[np.arange(len(seen)), last_N - 1].min()),
    )


def _choose_reports(value_NR: Floats, last_N: Ints, most: int) -> tuple[Ints, Ints]:
    """Choose the trials and reports to learn from: the last reports, and others as far as there is room."""
    kept_N = np.arange(len(last_N))
    if len(last_N) > most:
        # Keep the best trials, on which the next decisions depend, and equally many of the others.
        ranked = np.argsort(np.nanmin(value_NR, axis=1), kind="stable")
        best, others = ranked[: most // 2], ranked[most // 2 :]
        kept_N = np.union1d(best, others[np.linspace(0, len(others) - 1, most // 2).astype(int)])
    doubling_D = 2 ** np.arange(1, int(last_N.max()).bit_length())
    earlier_ND = (doubling_D < last_N[kept_N, None]) & ~np.isnan(value_NR[kept_N][:, doubling_D - 1])
    row_E, at_E = np.nonzero(earlier_ND)
    room = min(most - len(kept_N), len(row_E))
    some = np.linspace(0, len(row_E) - 1, room).astype(int) if room else np.zeros(0, int)
    row_N = np.concatenate([kept_N, kept_N[row_E[some]]])
    at_N = np.concatenate([last_N[kept_N], doubling_D[at_E[some]]])
    order = np.lexsort((at_N, row_N))
    return row_N[order], at_N[order]


def _remaining_change(value_NR: Floats) -> Floats:
    """Return the mean remaining change after each report, [R]. Each step is averaged over the trials that made it."""
    step_NR = np.diff(value_NR, axis=1)
    known_NR = ~np.isnan(step_NR)
    mean_R = np.where(known_NR, step_NR, 0.0).sum(axis=0) / np.maximum(known_NR.sum(axis=0), 1)
    rest_R: Floats = np.concatenate([np.cumsum(mean_R[::-1])[::-1], [0.0]])
    return rest_R


def _kernel_prior(encoding: Encoding, lengths: Mapping[str, float]) -> Prior:
    """Return the prior of the kernel. The trained share is the last coordinate."""
    unknown = _UNKNOWN[0] * math.sqrt(len(encoding.names) + 1), _UNKNOWN[1]
    believed = [*(length_prior(name, lengths) or unknown for name in encoding.names), _TRAINED]
    return Prior(_VARIANCE, tuple((math.log(length), spread) for length, spread in believed), _NOISE)


def length_prior(name: str, lengths: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the prior length scale of a setting and the standard deviation of its logarithm; None if unknown."""
    found = max((key for key in lengths if f"{name}.".startswith(f"{key}.")), key=len, default=None)
    return (lengths[found], _SPREAD) if found else None
