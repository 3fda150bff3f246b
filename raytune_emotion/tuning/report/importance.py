"""Estimate the importance of each setting for the validation JS, with its uncertainty."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, create_trial

from raytune_emotion.tuning.report.axes import Axis
from raytune_emotion.tuning.study.records import TrialRecord

#: Smallest number of trials for an estimate.
MIN_TRIALS = 10
#: Number of bootstrap resamples.
_RESAMPLES = 20
#: Largest size of a resample. More trials would take seconds, and change less than the displayed uncertainty.
_MOST_TRIALS = 300


@dataclass(frozen=True)
class Importance:
    """The share of one setting in the variation that all settings explain, over resamples of the trials."""

    name: str
    mean: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    chance: float  # mean with the JS shuffled among the trials: what a setting without influence would have


def importances(records: Sequence[TrialRecord], axes: Sequence[Axis]) -> list[Importance]:
    """Return the importance of each setting, the greatest first; an empty list for too few trials.

    PED-ANOVA (Watanabe et al., IJCAI 2023; for conditional settings arXiv 2601.20800) measures how the best tenth of
    the trials differs from all trials. It needs no model of the scores: a trial that was stopped early simply counts as
    not among the best. It is repeated on bootstrap resamples of the trials.

    Shares are positive and have the sum 1 even where no setting matters, and a continuous setting then has more than a
    choice. So the same is estimated from trials whose JS were shuffled among them.
    """
    scored = [record for record in records if record.counts]
    if len(scored) < MIN_TRIALS or not axes:
        return []
    distributions = {axis.name: _distribution(axis) for axis in axes}
    js_N = [record.best["val_js"] for record in scored if record.best]
    rng = np.random.default_rng(0)
    shares_RA, chance_RA = (np.zeros((_RESAMPLES, len(axes))) for _ in range(2))
    for shares_A, chance_A in zip(shares_RA, chance_RA, strict=True):
        drawn = rng.integers(len(scored), size=min(len(scored), _MOST_TRIALS))
        for to_fill_A, values_N in ((shares_A, js_N), (chance_A, rng.permutation(js_N).tolist())):
            trials = [_trial(axes, distributions, scored[i], values_N[i]) for i in drawn]
            to_fill_A[:] = _shares(trials, axes)
    low_A, high_A = np.quantile(shares_RA, [0.1, 0.9], axis=0)
    columns = (shares_RA.mean(axis=0), low_A, high_A, chance_RA.mean(axis=0))
    found = [Importance(axis.name, *map(float, values)) for axis, *values in zip(axes, *columns, strict=True)]
    return sorted(found, key=lambda importance: -importance.mean)


def _shares(trials: Sequence[FrozenTrial], axes: Sequence[Axis]) -> list[float]:
    """Return the share of each setting, with the sum 1; zeros if nothing explains anything."""
    raw = _evaluate(trials, [axis.name for axis in axes])
    total = sum(raw.values())
    return [raw.get(axis.name, 0.0) / total if total > 0 else 0.0 for axis in axes]


def _evaluate(trials: Sequence[FrozenTrial], names: list[str]) -> dict[str, float]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # hide the message that a study was created
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is experimental
        # Optuna recommends at least five trials among the best.
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, min(0.5, 5 / len(trials))))
        # Leave out settings that are in none of the trials, as in a branch of the space: Optuna refuses them.
        there = [name for name in names if any(name in trial.params for trial in trials)]
        return evaluator.evaluate(study, params=there)


def _trial(
    axes: Sequence[Axis], distributions: dict[str, BaseDistribution], record: TrialRecord, value: float
) -> FrozenTrial:
    positions = {axis.name: axis.position(record.settings.get(axis.name)) for axis in axes}
    params = {name: position for name, position in positions.items() if position is not None}
    return create_trial(params=params, distributions={name: distributions[name] for name in params}, value=value)


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.kind == "choice":
        return CategoricalDistribution(axis.choices)
    return FloatDistribution(axis.low, axis.high, log=axis.kind == "log")
