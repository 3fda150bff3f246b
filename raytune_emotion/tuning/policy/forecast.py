"""Forecast what configurations will have reached at full length, from what trials have shown until now.

A Gaussian process over settings and the length trained: what a trial had reached when it was paused or stopped tells of
what it would have reached, as far as other trials have shown what the rest of the way brings.
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
from raytune_emotion.tuning.policy.gaussian_process import Floats, Posterior, Prior, fit_kernel

Ints = npt.NDArray[np.intp]

#: What is believed of a kernel before a trial is seen: of its variance and noise the logarithm, with a spread.
_VARIANCE, _NOISE = (0.0, 1.0), (math.log(0.02), 1.5)
#: Of its lengths, in parts of a setting's range and with the spread of their logarithms: of a setting that nothing is
#: known of, times the root of the dimensions (after Hvarfner et al., 2024, "Vanilla Bayesian optimization performs
#: great in high dimensions", but shorter: a kernel that starts from long lengths takes differences for noise for too
#: long, `benchmarks/README.md`); of the logarithm of the length trained; and the spread of those in `LENGTHS`.
_UNKNOWN, _TRAINED, _SPREAD = (0.2, 1.0), (1.2, 0.4), 0.4
#: How much settings matter to the JS, by how their names begin: the less, the longer. Read off the recorded curves in
#: `benchmarks/curves`, on which the search is also judged there.
LENGTHS = {
    "optim.lr": 0.7,
    "train.batch_size": 1.6,
    "model.backbone": 2.0,
    "loss": 3.5,
    "model": 5.0,
    "optim": 5.0,
    "augment": 5.0,
}
#: The least value, as whose logarithm that of a perfect prediction counts.
_PERFECT = 1e-9
#: The least standard deviation of log values that is told from none.
_SAME = 1e-3
#: Own values that weigh as much as the belief that an earlier study's ranking holds, and that values differ as there.
_TRUST = 4.0
#: Points that are predicted from, in a time that grows with their cube; and how many of them may be failed trials, the
#: newest.
_POINTS, _FAILED = 400, 100


@dataclass(frozen=True)
class Curve:
    """What is known of a trial."""

    settings: Mapping[str, Any]
    values: Mapping[int, float]  # as reported, by the report's number; none of a trial that failed


class Forecast:
    """Of the best value that a configuration will have reached at full length: its logarithm, if no value is negative.

    Full length is that of the longest trial until now.
    """

    def __init__(
        self,
        encoding: Encoding,
        curves: Sequence[Curve],
        earlier: Sequence["Forecast"] = (),
        lengths: Mapping[str, float] = LENGTHS,
        reports: int = 1,
        at_once: bool = True,
    ) -> None:
        """Learn from the trials of a study.

        Args:
            encoding: of settings.
            curves: of the study's trials; none of them has to have reported where there are earlier forecasts.
            earlier: forecasts of other studies. This one is then of what they leave open, and they count as far as they
                explain what is known here (after Golovin et al., 2017, "Google Vizier", section 3.3).
            lengths: the parts of their ranges over which settings are believed to make a difference, by how their names
                begin; of other settings nothing is believed.
            reports: of a trial that is trained to its end, where that is known.
            at_once: whether a study that starts from this one heeds it from its first trial on. If not, its first
                trials begin as without it, and show what this one is worth.
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
        kernel, failure = fit_kernel(x_ND, z_N, _kernel_prior(encoding, lengths))
        if failure:
            warnings.warn(
                f"forecast: the kernel could not be fitted ({failure}); what is believed beforehand is used",
                RuntimeWarning,
                stacklevel=2,
            )
        self._posterior = Posterior(kernel, x_ND, z_N)

    def __call__(self, settings: Configurations) -> tuple[Floats, Floats]:
        """Mean and standard deviation of M configurations, [M] each, without the luck of a single training."""
        mean_M, std_M = self._posterior(self._encode(settings))
        return self._mean + self._slope * self._prior(settings) + self._scale * mean_M, self._scale * std_M

    def believe(self, settings: Configurations) -> None:
        """Take what is predicted of configurations for true, as of those that run: others then promise more."""
        self._posterior.believe(self._encode(settings))

    def standard_scores(self, settings: Configurations) -> Floats:
        """Return the means of M configurations in standard deviations of this study's values, [M]."""
        standard_M: Floats = (self(settings)[0] - self._mean) / self._scale
        return standard_M

    def _encode(self, settings: Configurations, share_M: Floats | None = None) -> Floats:
        x_MD = self._encoding(settings)
        return np.column_stack([x_MD, np.full(len(x_MD), self._share) if share_M is None else share_M])

    def _prior(self, settings: Configurations) -> Floats:
        """Return what earlier studies say of M configurations, [M], in standard deviations of theirs."""
        if not len(settings) or not self._earlier:
            return np.zeros(len(settings))
        standard_M: Floats = np.mean([f.standard_scores(settings) for f in self._earlier], axis=0)
        return standard_M


def _scale_of(y_N: Floats, earlier: Sequence[float]) -> float:
    """Return the standard deviation that is expected of values like these, by those of earlier studies as well."""
    if not earlier:
        return max(float(y_N.std()), _SAME) if len(y_N) > 1 else 1.0
    squares = float(((y_N - y_N.mean()) ** 2).sum()) if len(y_N) else 0.0
    variance = (squares + _TRUST * float(np.mean(earlier)) ** 2) / (len(y_N) + _TRUST)
    return max(math.sqrt(variance), _SAME)


def curves_of(domain: Domain, trials: Sequence[FrozenTrial], *, maximize: bool = False) -> list[Curve]:
    """Return what trials have shown until now, by the number of the report; those that failed have shown nothing.

    A trial without reports has shown its value alone, as at full length.
    """
    reported = [trial for trial in trials if trial.intermediate_values]
    steps = sorted({step for trial in reported for step in trial.intermediate_values})
    number_of = {step: number for number, step in enumerate(steps, start=1)}
    last, sign = max(len(steps), 1), -1.0 if maximize else 1.0
    curves = []
    for trial in trials:
        values = {number_of[step]: sign * value for step, value in trial.intermediate_values.items()}
        if trial.state == TrialState.COMPLETE and not values and trial.value is not None:
            values[last] = sign * trial.value
        finite = {number: value for number, value in values.items() if math.isfinite(value)}
        if trial.state == TrialState.FAIL or (values and not finite):
            curves.append(Curve(domain.settings(trial), {}))
        elif finite:
            curves.append(Curve(domain.settings(trial), finite))
    return curves


@dataclass(frozen=True)
class _Points:
    """What a forecast learns from: N points."""

    settings: list[Mapping[str, Any]]
    share_N: Floats  # of the full length, on a logarithmic scale
    value_N: Floats  # as at the length of the longest trial
    longest: float  # the share of the longest trial
    best: float  # the lowest value that was reported


def _points(curves: Sequence[Curve], reports: int) -> _Points:
    """Take a few reports of every trial, as if the rest of the way brought all trials the same.

    The last report, and those at 2, 4, 8, … before it, as far as there is room. A trial that failed is as bad as the
    worst.
    """
    seen = [curve for curve in curves if curve.values]
    if not seen:
        return _Points([], np.zeros(0), np.zeros(0), 1.0, math.inf)
    last_N = np.array([max(curve.values) for curve in seen])
    most = int(last_N.max())
    value_NR = np.full((len(seen), most), np.nan)
    for row_R, curve in zip(value_NR, seen, strict=True):
        row_R[np.array([*curve.values]) - 1] = [*curve.values.values()]
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
        float(np.nanmin(value_NR)),
    )


def _choose_reports(value_NR: Floats, last_N: Ints, most: int) -> tuple[Ints, Ints]:
    """Return which reports of which trials are learned from: the last ones, and others as far as there is room."""
    lasts = [(number, int(last)) for number, last in enumerate(last_N)]
    if len(lasts) > most:
        # The best, between which the next decisions are, and as many of the others.
        ranked = np.argsort(np.nanmin(value_NR, axis=1), kind="stable")
        best, others = ranked[: most // 2], ranked[most // 2 :]
        kept = {*best, *others[np.linspace(0, len(others) - 1, most // 2).astype(int)]}
        lasts = [(number, last) for number, last in lasts if number in kept]
    doublings = [2**power for power in range(1, int(last_N.max()).bit_length())]
    earlier = [
        (number, report)
        for number, last in lasts
        for report in doublings
        if report < last and not np.isnan(value_NR[number, report - 1])
    ]
    room = min(most - len(lasts), len(earlier))
    some: list[int] = np.linspace(0, len(earlier) - 1, room).astype(int).tolist() if room else []
    row_N, at_N = np.array(sorted([*lasts, *(earlier[each] for each in some)])).T
    return row_N, at_N


def _remaining_change(value_NR: Floats) -> Floats:
    """Return what is left to come after each report, [R], in the mean over the trials that have shown each step."""
    step_NR = np.diff(value_NR, axis=1)
    known_NR = ~np.isnan(step_NR)
    mean_R = np.where(known_NR, step_NR, 0.0).sum(axis=0) / np.maximum(known_NR.sum(axis=0), 1)
    rest_R: Floats = np.concatenate([np.cumsum(mean_R[::-1])[::-1], [0.0]])
    return rest_R


def _kernel_prior(encoding: Encoding, lengths: Mapping[str, float]) -> Prior:
    """Return what is believed of the kernel; the share trained is the last coordinate."""
    unknown = _UNKNOWN[0] * math.sqrt(len(encoding.names) + 1), _UNKNOWN[1]
    believed = [*(length_prior(name, lengths) or unknown for name in encoding.names), _TRAINED]
    return Prior(_VARIANCE, tuple((math.log(length), spread) for length, spread in believed), _NOISE)


def length_prior(name: str, lengths: Mapping[str, float]) -> tuple[float, float] | None:
    """Return what is believed of the length of a setting, and with what spread; None where nothing is."""
    found = max((key for key in lengths if f"{name}.".startswith(f"{key}.")), key=len, default=None)
    return (lengths[found], _SPREAD) if found else None
