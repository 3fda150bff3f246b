"""Make the results table: the best trial of each model with each loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from raytune_emotion.config import RunConfig
from raytune_emotion.tuning.study.records import TrialRecord, best_first

MIXTURE = "mixture"
#: Smallest weight that is shown; a smaller one would appear as 0.00.
_SHOWN_FROM = 0.005


@dataclass(frozen=True)
class Result:
    """The best trial of one model with one loss, or with any mixture of losses."""

    model: str
    loss: str  # or `MIXTURE`
    weights: str  # weights of the losses of that trial
    trials: int
    trial_id: str
    val_mse: float | None
    val_kl: float | None  # nats
    val_tvd: float | None
    val_js: float  # bits
    seconds_per_epoch: float | None


def results_of(records: Sequence[TrialRecord]) -> list[Result]:
    """Return a row for each tried pair of model and loss, the lowest JS first. Failed trials are left out."""
    groups: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in best_first(record for record in records if record.counts):
        groups.setdefault((model_of(record), loss_of(record)), []).append(record)
    return [_result(model, loss, group) for (model, loss), group in groups.items()]


def write_results(results: Sequence[Result]) -> str:
    """Write the table as CSV."""
    return pd.DataFrame(results, columns=list(Result.__annotations__)).to_csv(index=False)


def model_of(record: TrialRecord) -> str:
    return str(record.settings.get("model.backbone", RunConfig().model.backbone))


def loss_weights(record: TrialRecord) -> dict[str, float]:
    """Return the losses of a trial with their weights, without those of weight 0."""
    given = {name.removeprefix("loss."): w for name, w in record.settings.items() if name.startswith("loss.") and w}
    return given or dict(RunConfig().loss.weights)


def loss_of(record: TrialRecord) -> str:
    """Return the name of a trial's single loss, or `MIXTURE` for any mixture."""
    weights = loss_weights(record)
    return next(iter(weights)) if len(weights) == 1 else MIXTURE


def mixture_of(record: TrialRecord) -> str:
    """Write the losses of a trial with their weights, the greatest first; a single loss without its weight."""
    weights = sorted(loss_weights(record).items(), key=lambda item: -item[1])
    if len(weights) == 1:
        return weights[0][0]
    return " ".join(f"{name}\N{NO-BREAK SPACE}{weight:.2f}" for name, weight in weights if weight >= _SHOWN_FROM)


def seconds_per_epoch(report: Mapping[str, Any]) -> float | None:
    seconds, epochs = report.get("seconds"), report.get("epoch")
    return seconds / epochs if seconds is not None and epochs else None


def _result(model: str, loss: str, group: Sequence[TrialRecord]) -> Result:
    best: Mapping[str, Any] = group[0].best or {}
    return Result(
        model,
        loss,
        mixture_of(group[0]),
        len(group),
        group[0].trial_id,
        best.get("val_mse"),
        best.get("val_kl"),
        best.get("val_tvd"),
        best["val_js"],
        seconds_per_epoch(group[0].reports[-1]),
    )
