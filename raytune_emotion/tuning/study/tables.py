"""Write the tables of a study for people; the record is separate."""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.learn.run_folder import HISTORY
from raytune_emotion.storage.atomic import atomic_write, write_text
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import list_trials
from raytune_emotion.tuning.study.records import TrialRecord, best_first
from raytune_emotion.tuning.study.spec import CHANGEABLE
from raytune_emotion.tuning.study.trials import trial_file

TRIALS, CURVES = "trials.csv", "curves.parquet"

#: Pause between two writes of the tables, as a multiple of the duration of the last write.
_REST = 20
#: Growth of the number of ended trials after which the tables are pushed again, so that the pushed bytes of a study are
#: proportional to its length.
_GROWTH = 1.05

_FIRST_COLUMNS = (
    "trial_id", "status", "epochs", "best_val_js", "val_js", "val_kl", "val_tvd", "val_mse", "val_emd", "seconds",
    "params_millions",
)  # fmt: skip


class Tables:
    """Keep the tables of a running study up to date with its record.

    For an ended trial, the driver keeps only the curve and two reports, so that its memory hardly grows with reports. A
    record that is not whole is read again for each write.
    """

    def __init__(self, study: OpenStudy) -> None:
        self._study = study
        self._ended: dict[str, TrialRecord] = {}  # with two reports each
        self._curves = [curves_of(())]  # curves of ended trials; concatenated only for a write, because a copy is slow
        self._stale = False  # whether an ending is missing in the tables
        self._due = 0.0
        self._pushed = 0  # number of ended trials in the tables at the study's location

    @property
    def ended(self) -> list[TrialRecord]:
        return [*self._ended.values()]

    @property
    def _whole(self) -> dict[str, TrialRecord]:
        return {trial_id: record for trial_id, record in self._ended.items() if record.is_whole}

    def read(self) -> list[TrialRecord]:
        """Read the trials that are not kept whole yet. Trials of other drivers may have ended meanwhile."""
        # Pull the reports of trials on this and other machines.
        whole = self._whole
        unknown = [t.trial_id for t in list_trials(self._study.optuna) if t.trial_id not in whole]
        self._study.copy.pull(trial_file(trial_id, HISTORY) for trial_id in unknown)
        records = self._study.records(whole)
        self.keep([record for record in records if record.trial_id in self._ended])
        whole = self._whole
        return [record for record in records if record.trial_id not in whole]

    def add(self, trial_id: str) -> TrialRecord:
        """Read, keep and return a trial that has just ended."""
        self._study.copy.pull([trial_file(trial_id, HISTORY)])
        record = self._study.record(trial_id)
        self.keep([record])
        self._stale = True
        return record

    def write_in_time(self) -> None:
        """Write the tables if an ending is missing in them, unless they were written just before."""
        if self._stale and time.monotonic() >= self._due:
            self.write(push=len(self._ended) >= _GROWTH * self._pushed)

    def write(self, *, push: bool = True) -> None:
        """Bring the tables of the study, and with `push` their remote copy, up to date."""
        began = time.monotonic()
        # Read and write in the same turn, so that no driver overwrites newer tables.
        with self._study.drivers.turn("files"):
            others = self.read()
            self._curves = [concatenate(*self._curves)]
            records = [*self._whole.values(), *others]
            write_tables(self._study.folder, records, concatenate(*self._curves, curves_of(others)))
        if push:
            self._study.copy.push(TRIALS, CURVES)
            self._pushed = len(self._ended)
        self._stale = False
        self._due = time.monotonic() + _REST * (time.monotonic() - began)

    def keep(self, records: list[TrialRecord]) -> None:
        """Keep trials that have ended."""
        self._curves.append(curves_of(record for record in records if record.is_whole))
        self._ended |= {record.trial_id: keep_two_reports(record) for record in records}


def curves_of(records: Iterable[TrialRecord]) -> pd.DataFrame:
    """Make the table of all reports, one row each. It needs a tenth of the memory of the reports themselves."""
    return pd.DataFrame([{"trial_id": record.trial_id, **report} for record in records for report in record.reports])


def trials_of(records: Iterable[TrialRecord]) -> pd.DataFrame:
    """Make the table `trials.csv`: one row per trial, the best first."""
    table = pd.DataFrame([_row(record) for record in best_first(records)])
    rest = [column for column in table.columns if column not in _FIRST_COLUMNS]
    return table.reindex(columns=[*_FIRST_COLUMNS, *rest])


def concatenate(*frames: pd.DataFrame) -> pd.DataFrame:
    """Concatenate frames. Empty frames are left out, because their missing types would change those of the others."""
    return pd.concat([frame for frame in frames if len(frame)] or [pd.DataFrame()], ignore_index=True)


def keep_two_reports(record: TrialRecord) -> TrialRecord:
    """Keep only the two reports of a trial that its rank and its table row need."""
    kept = [report for report in record.reports if report is record.best or report is record.reports[-1]]
    return dataclasses.replace(record, reports=tuple(kept))


def write_tables(folder: Path, records: list[TrialRecord], curves: pd.DataFrame | None = None) -> None:
    """Write `trials.csv`, best trial first, and `curves.parquet`.

    Args:
        folder: folder of the study.
        records: records of its trials; two reports of each are sufficient if `curves` are given.
        curves: curves of the same trials.
    """
    write_text(folder / TRIALS, trials_of(records).to_csv(index=False))
    with atomic_write(folder / CURVES) as temporary:
        (curves_of(records) if curves is None else curves).to_parquet(temporary, index=False)


def _row(record: TrialRecord) -> dict[str, Any]:
    # All metrics are from the report with the best JS, as is the best checkpoint.
    best: Mapping[str, Any] = record.best or {}
    last: Mapping[str, Any] = record.reports[-1] if record.reports else {}
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
        **{name: value for name, value in record.settings.items() if name not in CHANGEABLE},
        "continues": record.continues,
        **({"confirms": record.confirms} if record.confirms else {}),
        "reason": record.reason,
    }
