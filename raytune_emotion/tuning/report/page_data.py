"""Gather the data of a study's plots, once for the page and for the PNG files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raytune_emotion.learn.predictions import Bin, ClassError, Predictions, class_errors
from raytune_emotion.tuning.policy.objective import pareto_front
from raytune_emotion.tuning.report.axes import Axis, choice_text, searched_axes, space_of
from raytune_emotion.tuning.report.importance import Importance, importances
from raytune_emotion.tuning.report.results import Result, loss_weights, results_of, seconds_per_epoch
from raytune_emotion.tuning.report.winner import confusion, errors_by_entropy
from raytune_emotion.tuning.space.space import Fixed, Setting, Simplex, Space
from raytune_emotion.tuning.study.records import TrialRecord, best_first, best_js_steps
from raytune_emotion.tuning.study.spec import CHANGEABLE, StudySpec

#: Costs against which the JS is plotted: key in `costs_of`, name, and whether more is better.
COSTS = (
    ("params", "parameters, millions", False),
    ("seconds_per_epoch", "seconds per epoch", False),
    ("images_per_second", "training speed, images/s", True),
)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Statistics of the winner's predictions."""

    classes: tuple[ClassError, ...]
    confusion_KK: tuple[tuple[int, ...], ...]
    entropy: tuple[Bin, ...]


@dataclasses.dataclass(frozen=True)
class StudyData:
    """All data of a study's plots."""

    spec: StudySpec
    records: tuple[TrialRecord, ...]
    space: Space | None
    axes: tuple[Axis, ...]
    winner: TrialRecord | None
    importances: tuple[Importance, ...]
    results: tuple[Result, ...]
    losses: tuple[str, ...]  # losses in the study's mixtures; empty without mixtures
    fronts: Mapping[str, tuple[str, ...]]  # trials of the Pareto front, by cost
    steps: tuple[tuple[float, float, str], ...]  # seconds since the first trial began, best JS so far, its trial
    analysis: Analysis | None


def gather(
    spec: StudySpec, records: Sequence[TrialRecord], leader: TrialRecord | None, predictions: Predictions | None
) -> StudyData:
    """Compute the data of the plots.

    Args:
        spec: spec of the study.
        records: records of its trials.
        leader: the trial that the page calls the winner; None if there is none.
        predictions: predictions of its best weights; None if they are not available.
    """
    space = space_of(spec)
    axes, begin = searched_axes(space, records), began_at(records)
    return StudyData(
        spec,
        tuple(records),
        space,
        tuple(axes),
        leader,
        tuple(importances(records, axes)),
        tuple(results_of(records)),
        _losses(records),
        {key: tuple(_front(records, key, more)) for key, _, more in COSTS},
        tuple((time - begin, js, trial_id) for time, js, trial_id in best_js_steps(records)),
        _analysis(predictions) if predictions is not None else None,
    )


def as_json(data: StudyData) -> dict[str, Any]:
    """Return the data of the page's script as plain values. Numbers that are not finite become null."""
    begin = began_at(data.records)
    value = {
        "baseline": data.spec.baseline["js"],
        "epochs": data.spec.epochs,
        "winner": data.winner.trial_id if data.winner else None,
        "axes": [dataclasses.asdict(axis) for axis in data.axes],
        "importances": [dataclasses.asdict(importance) for importance in data.importances],
        "losses": data.losses,
        "costs": [{"key": key, "name": name} for key, name, _ in COSTS],
        "fronts": dict(data.fronts),
        "steps": [{"t": t, "js": js, "id": trial_id} for t, js, trial_id in data.steps],
        "trials": [_trial(record, data, begin) for record in data.records],
        "analysis": dataclasses.asdict(data.analysis) if data.analysis else None,
    }
    return _finite(value)  # type: ignore[no-any-return]


def began_at(records: Sequence[TrialRecord]) -> float:
    """Return the Unix time at which the first trial began; 0 if none has reported."""
    return min((r["time"] - r["seconds"] for record in records for r in record.reports[:1]), default=0.0)


def costs_of(record: TrialRecord) -> dict[str, float | None]:
    """Return the costs of a trial, by the keys of `COSTS`."""
    last: Mapping[str, Any] = record.reports[-1] if record.reports else {}
    return {
        "params": last.get("params_millions"),
        "seconds_per_epoch": seconds_per_epoch(last),
        "images_per_second": last.get("images_per_second"),
    }


def searched_rows(space: Space | None) -> list[tuple[str, str, str]]:
    """Describe a space in rows: setting, searched values, and conditions."""
    if space is None:
        return []
    rows = [(key, describe(setting), "") for key, setting in space.settings.items() if not isinstance(setting, Fixed)]
    for branch in space.when:
        conditions = ", ".join(f"{k} is {' or '.join(map(choice_text, vs))}" for k, vs in branch.conditions.items())
        rows += [(key, describe(setting), conditions) for key, setting in branch.settings.items()]
    names = list(dict.fromkeys(name for name, _, _ in rows))
    return sorted(rows, key=lambda row: names.index(row[0]))


def fixed_rows(space: Space | None) -> list[tuple[str, str]]:
    """Return the settings that are equal in every trial, also after the study was resumed."""
    fixed = space.fixed_settings if space else {}
    return [(key, choice_text(value)) for key, value in fixed.items() if key not in CHANGEABLE]


def describe(setting: Setting) -> str:
    """Describe the possible values of a setting."""
    if isinstance(setting, Fixed):
        return choice_text(setting.value)
    if isinstance(setting, Simplex):
        return f"mixture of {', '.join(setting.losses)}"
    if isinstance(setting, CategoricalDistribution):
        return ", ".join(map(choice_text, setting.choices))
    assert isinstance(setting, FloatDistribution | IntDistribution)
    step = f", steps of {setting.step:g}" if setting.step and setting.step != 1 else ""
    whole = "whole numbers, " if isinstance(setting, IntDistribution) else ""
    return f"{setting.low:g} to {setting.high:g} ({whole}{'log' if setting.log else 'linear'} scale{step})"


def _trial(record: TrialRecord, data: StudyData, begin: float) -> dict[str, Any]:
    best: Mapping[str, Any] = record.best or {}
    return {
        "id": record.trial_id,
        "status": record.status,
        "js": best.get("val_js"),
        "kl": best.get("val_kl"),
        "accuracy": best.get("val_accuracy"),
        "epochs": record.reports[-1]["epoch"] if record.reports else None,
        "seconds": record.reports[-1]["seconds"] if record.reports else None,
        "t": best["time"] - begin if best else None,
        "curve": [[report["epoch"], report["val_js"]] for report in record.reports],
        "settings": {axis.name: axis.position(record.settings.get(axis.name)) for axis in data.axes},
        "loss": {name: weight for name, weight in loss_weights(record).items() if name in data.losses},
        **costs_of(record),
    }


def _losses(records: Sequence[TrialRecord]) -> tuple[str, ...]:
    """Return the losses in mixtures; an empty tuple if each trial has a single loss."""
    weights = [loss_weights(record) for record in records]
    if not any(len(some) > 1 for some in weights):
        return ()
    return tuple(dict.fromkeys(name for some in weights for name in some))


def _front(records: Sequence[TrialRecord], key: str, more: bool) -> list[str]:
    ranked = best_first(record for record in records if record.counts)

    def cost(record: TrialRecord) -> float:
        value = costs_of(record)[key]
        return math.inf if value is None else -value if more else value

    return [record.trial_id for record in pareto_front(ranked, cost)]


def _analysis(predictions: Predictions) -> Analysis:
    return Analysis(
        tuple(class_errors(predictions)),
        tuple(map(tuple, confusion(predictions).tolist())),
        tuple(errors_by_entropy(predictions)),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
