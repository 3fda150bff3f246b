"""Read the record of a study: its trials, their reports and their endings.

The record consists of the Optuna journal (the trials and their endings) and each trial's history (its reports). Tables
and pages are made from it, and can be made again at any time.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import optuna

from raytune_emotion.learn.report import Report
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, PREDICTIONS, read_history
from raytune_emotion.storage.atomic import atomic_write
from raytune_emotion.storage.json_text import load_json
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.objective import Objective, pareto_front
from raytune_emotion.tuning.study.optuna_study import ENDED, Status, StudyTrial, list_trials, read_trial
from raytune_emotion.tuning.study.trials import PARAMS, trial_file, trial_folder

#: Number of ended trials whose weights are kept.
KEPT = 3


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One trial of a study, as recorded."""

    trial_id: str
    status: Status
    settings: dict[str, Any]  # settings that the space chose; see `trained_settings`
    reason: str
    reports: tuple[Report, ...]
    continues: str | None = None  # id of the trial that it continues, whose reports are its first ones
    confirms: str | None = None  # id of the trial of another study whose configuration it repeats
    observed: int = 0  # number of reports that the driver has received

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def counts(self) -> bool:
        """Tell whether the trial has reported and has not failed, so that it can be the best."""
        return bool(self.reports) and self.status != "failed"

    @property
    def is_whole(self) -> bool:
        """Tell whether the record has all reports that the driver has received. Those of a failed trial do not count.

        A file system may show late what another machine has written, and a user may have deleted a damaged history.
        """
        return self.status == "failed" or (self.reports[-1]["report"] if self.reports else 0) >= self.observed

    @functools.cached_property
    def best(self) -> Report | None:
        """Return the report with the lowest validation JS; None before the first."""
        return min(self.reports, key=lambda report: report["val_js"], default=None)


def read_records(folder: Path, study: optuna.Study, known: Collection[str] = ()) -> list[TrialRecord]:
    """Read the trials of a study with their reports, in the order of their start. Skip those in `known`."""
    return [_read_record(folder, trial) for trial in list_trials(study) if trial.trial_id not in known]


def read_record(folder: Path, study: optuna.Study, trial_id: str) -> TrialRecord:
    """Read one trial of a study with its reports."""
    return _read_record(folder, read_trial(study, trial_id))


def _read_record(folder: Path, trial: StudyTrial) -> TrialRecord:
    """Read the reports of a trial, also those that another machine has just written."""
    own = trial_folder(folder, trial.trial_id)
    record = TrialRecord(
        trial.trial_id,
        trial.status,
        trial.settings,
        trial.reason,
        tuple(read_history(own)),
        trial.continues,
        trial.confirms,
        trial.observed,
    )
    if record.is_whole:
        return record
    # NFS asks the server about a folder that is opened. Otherwise it may miss new files for a minute.
    for opened in (own.parent, own):
        with contextlib.suppress(OSError):
            os.scandir(opened).close()
    return dataclasses.replace(record, reports=tuple(read_history(own)))


def trained_settings(study: Location, record: TrialRecord) -> dict[str, Any]:
    """Return the settings that the space chose for a trial, with the values of its latest training.

    They may have changed since the proposal, because a study was resumed with more epochs, or memory ran out.
    """
    text = study.read(trial_file(record.trial_id, PARAMS))
    try:
        trained = load_json(text) if text is not None else {}
        return {name: trained.get(name, value) for name, value in record.settings.items()}
    except (ValueError, AttributeError):
        return record.settings


def copy_checkpoint(source: Path, target: Path) -> list[str]:
    """Copy the checkpoint of one trial to another, which then continues from it. An interrupted copy is replaced.

    Returns:
        The names of the files. The newest state is the last one: a trial without it has not begun.
    """
    target.mkdir(parents=True, exist_ok=True)
    predictions = [PREDICTIONS] if (source / PREDICTIONS).exists() else []  # a trial does not need them
    names = [HISTORY, *predictions, BEST, LAST]
    for name in names:
        with atomic_write(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return names


def best_first(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Sort trials by their best validation JS. Failed ones come after the others, those without a report last."""
    return sorted(
        records, key=lambda r: (r.best is None, r.status == "failed", r.best["val_js"] if r.best else 0.0, r.trial_id)
    )


def winner(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the best trial of a study; None if no trial except failed ones has reported."""
    return next(iter(best_first(record for record in records if record.counts)), None)


def best_js_steps(records: Iterable[TrialRecord]) -> list[tuple[float, float, str]]:
    """Return the lowest JS so far at every evaluation that lowered it, and at the last one. Failed trials do not count.

    Returns:
        For each such evaluation its time (seconds since 1970), the JS (bits), and the id of the trial with this JS.
    """
    reports = sorted(
        (report["time"], report["val_js"], record.trial_id)
        for record in records
        if record.counts
        for report in record.reports
    )
    steps: list[tuple[float, float, str]] = []
    for step in reports:
        if not steps or step[1] < steps[-1][1]:
            steps.append(step)
    return [*steps, (reports[-1][0], *steps[-1][1:])] if steps else []


def frontier(records: list[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """Return the Pareto front of JS and an objective's cost, the best JS first. Failed trials are not on it."""
    cost = objective.cost or (lambda report: math.inf)
    ranked = best_first(record for record in records if record.counts)
    return pareto_front(ranked, lambda record: cost(record.best) if record.best else math.inf)


def trials_to_strip(records: list[TrialRecord], objective: Objective, spared: Collection[str] = ()) -> list[str]:
    """List the ended trials whose weights can be deleted to save space.

    Weights are kept for the best trials, for those on the Pareto front of the objective, and for those in `spared`. A
    trial whose record is not whole keeps its weights, because it may be one of the best.
    """
    ended = [record for record in best_first(records) if record.ended and record.is_whole]
    front = {record.trial_id for record in frontier(ended, objective)} if objective.front else set()
    return [record.trial_id for record in ended[KEPT:] if record.trial_id not in {*front, *spared}]


def delete_weights(folder: Path, trial_ids: Iterable[str]) -> None:
    """Delete the weights of trials."""
    for trial_id in trial_ids:
        for file in trial_folder(folder, trial_id).glob("*.safetensors"):
            file.unlink(missing_ok=True)  # another driver of the study may be faster
