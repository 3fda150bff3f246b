"""Estimate how much each setting matters for the validation JS, and how sure that is."""

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

#: Fewer trials tell nothing of this.
MIN_TRIALS = 10
_RESAMPLES = 20
#: More trials would take seconds, and change less than the uncertainty that is shown.
_MOST_TRIALS = 300


@dataclass(frozen=True)
class Importance:
    """The share of one setting in what all settings explain, over resamples of the trials."""

    name: str
    mean: float
    low: float  # 10th percentile
    high: float  # 90th percentile


def importances(records: Sequence[TrialRecord], axes: Sequence[Axis]) -> list[Importance]:
    """Return the importance of each setting, the greatest first; none where there are too few trials.

    PED-ANOVA (Watanabe et al., IJCAI 2023; for conditional settings arXiv 2601.20800) asks in what the best tenth of
    the trials differs from all. It needs no model of the scores, so a trial that was stopped early counts as what it
    is: not among the best. It is repeated on bootstrap resamples of the trials.
    """
    scored = [record for record in records if record.best and record.status != "failed"]
    if len(scored) < MIN_TRIALS or not axes:
        return []
    distributions = {axis.name: _distribution(axis) for axis in axes}
    trials = [_trial(axes, distributions, record) for record in scored]
    rng = np.random.default_rng(0)
    shares_RA = np.zeros((_RESAMPLES, len(axes)))
    for shares_A in shares_RA:
        drawn = rng.integers(len(trials), size=min(len(trials), _MOST_TRIALS))
        raw = _evaluate([trials[i] for i in drawn], list(distributions))
        total = sum(raw.values())
        shares_A[:] = [raw.get(axis.name, 0.0) / total if total > 0 else 0.0 for axis in axes]
    low_A, high_A = np.quantile(shares_RA, [0.1, 0.9], axis=0)
    found = zip(axes, shares_RA.mean(axis=0), low_A, high_A, strict=True)
    return sorted(
        (Importance(axis.name, float(mean), float(low), float(high)) for axis, mean, low, high in found),
        key=lambda importance: -importance.mean,
    )


def _evaluate(trials: Sequence[FrozenTrial], names: list[str]) -> dict[str, float]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not that a study was created in memory
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is experimental
        # Optuna advises at least five trials among the best.
        evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, min(0.5, 5 / len(trials))))
        # A setting of a branch of the space may be in none of the trials, which Optuna refuses.
        there = [name for name in names if any(name in trial.params for trial in trials)]
        return evaluator.evaluate(study, params=there)


def _trial(axes: Sequence[Axis], distributions: dict[str, BaseDistribution], record: TrialRecord) -> FrozenTrial:
    assert record.best is not None
    positions = {axis.name: axis.position(record.settings.get(axis.name)) for axis in axes}
    params = {name: position for name, position in positions.items() if position is not None}
    return create_trial(
        params=params, distributions={name: distributions[name] for name in params}, value=record.best["val_js"]
    )


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.kind == "choice":
        return CategoricalDistribution(axis.choices)
    return FloatDistribution(axis.low, axis.high, log=axis.kind == "log")
