"""Write the tables of a study, which people read; the record is elsewhere."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from raytune_emotion.errors import UserError
from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.storage.atomic import whole, write_text
from raytune_emotion.tuning.study.records import (
    TrialRecord,
    best_first,
)

TRIALS = "trials.csv"

CURVES = "curves.parquet"

#: Settings that a study may change when it goes on, so that those which a trial was proposed with tell nothing of it.
_MAY_CHANGE = {"train.epochs", "model.weights_dir"}

_FIRST_COLUMNS = (
    "trial_id", "status", "epochs", "best_val_js", "val_js", "val_kl", "val_tvd", "val_mse", "val_emd", "seconds",
    "params_millions",
)  # fmt: skip


def best_trial_id(folder: Path) -> str:
    """The best trial of a study, by its table.

    Raises:
        UserError: where there is no study, or no trial of it has reported.
    """
    try:
        table = pd.read_csv(folder / TRIALS, dtype={"trial_id": str})
    except (FileNotFoundError, pd.errors.EmptyDataError):
        raise UserError(f"{folder}: no {TRIALS} in it; name the folder of a study whose trials have begun") from None
    except OSError as error:
        raise UserError(f"{folder / TRIALS}: cannot be read: {error.strerror}; name the folder of a study") from None
    if table.empty or pd.isna(table[OBJECTIVE].iloc[0]):
        raise UserError(f"{folder}: no trial of this study has reported yet")
    return str(table["trial_id"].iloc[0])


def curves_of(records: Iterable[TrialRecord]) -> pd.DataFrame:
    """A row a report. It takes a tenth of the memory of the reports themselves."""
    return pd.DataFrame([{"trial_id": record.trial_id, **report} for record in records for report in record.reports])


def joined(*frames: pd.DataFrame) -> pd.DataFrame:
    """Rows of several frames. An empty one, which knows no types, would change those of the others."""
    return pd.concat([frame for frame in frames if len(frame)] or [pd.DataFrame()], ignore_index=True)


def thinned(record: TrialRecord) -> TrialRecord:
    """A trial with those of its reports alone that its rank and its row in the table need."""
    kept = [report for report in record.reports if report is record.best or report is record.reports[-1]]
    return dataclasses.replace(record, reports=tuple(kept))


def write_tables(folder: Path, records: list[TrialRecord], curves: pd.DataFrame | None = None) -> None:
    """Writes `trials.csv`, best trial first, and `curves.parquet`.

    Args:
        folder: of the study.
        records: of its trials; they may be thinned where `curves` are given.
        curves: of the same trials.
    """
    rows = [_row(record) for record in best_first(records)]
    table = pd.DataFrame(rows)
    rest = [column for column in table.columns if column not in _FIRST_COLUMNS]
    write_text(folder / TRIALS, table.reindex(columns=[*_FIRST_COLUMNS, *rest]).to_csv(index=False))
    with whole(folder / CURVES) as temporary:
        (curves_of(records) if curves is None else curves).to_parquet(temporary, index=False)


def _row(record: TrialRecord) -> dict[str, Any]:
    # The metrics beside the best JS are those of the same report, the one that the best checkpoint is from.
    best = dict(record.best or {})
    last = record.reports[-1] if record.reports else {}
    return {
        "trial_id": record.trial_id,
        "status": record.status,
        "epochs": last.get("epoch"),
        OBJECTIVE: best.get("val_js"),
        **{name: value for name, value in best.items() if name.startswith("val_")},
        "seconds": last.get("seconds"),
        "params_millions": last.get("params_millions"),
        "best_epoch": best.get("epoch"),
        "accumulate": last.get("accumulate"),
        **{name: value for name, value in record.settings.items() if name not in _MAY_CHANGE},
        "continues": record.continues,
        **({"confirms": record.confirms} if record.confirms else {}),
        "reason": record.reason,
    }
