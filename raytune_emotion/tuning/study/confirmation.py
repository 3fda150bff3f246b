"""Plan the confirmation of a study, and rank its configurations by their new runs.

A confirmation is a separate study, in the folder of the study that it confirms. All its trials are fixed when it
begins: each of the best configurations with several new seeds.
"""

import contextlib
import dataclasses
import math
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from raytune_emotion.config import ModelConfig, RunConfig
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.learn.backbones import FOLDER, split_source
from raytune_emotion.learn.loop import batch_faults
from raytune_emotion.learn.model import check_weights
from raytune_emotion.learn.origin import AbsentWeightsError
from raytune_emotion.learn.run_folder import HISTORY
from raytune_emotion.storage.atomic import LOCK, write_text
from raytune_emotion.storage.locations import Location, parent_of
from raytune_emotion.terminal import typed_command, typed_options
from raytune_emotion.tuning.policy.trial_attributes import CONFIRMS, SETTINGS
from raytune_emotion.tuning.study.open_study import OpenStudy, make_study, open_existing, open_study, read_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL, load_study, study_lock
from raytune_emotion.tuning.study.records import TrialRecord, best_first
from raytune_emotion.tuning.study.remote_copy import DRIVER, PIECES
from raytune_emotion.tuning.study.request import ConfirmRequest
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, open_stores, spec_of
from raytune_emotion.tuning.study.trials import ALL, entries_of, trial_file

#: Folder of the confirmation in the folder of its study, and the name of its table there.
CONFIRMED = "confirmed"
CONFIRMED_TABLE = "confirmed.csv"
#: Patterns of the files of a study with the record of its confirmation.
RECORD_OF_CONFIRMATION = tuple(f"{CONFIRMED}/{name}" for name in (SPEC, JOURNAL, *PIECES, trial_file(ALL, HISTORY)))

HEADINGS = ("trial", "mean JS, bits", "standard error", "seeds", "failed", "JS in the search")

_SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class ConfirmedConfiguration:
    """One confirmed configuration with its runs, one per seed."""

    trial_id: str  # in the search
    searched_js: float  # best JS in the search, bits
    runs: tuple[TrialRecord, ...]  # the complete ones, best first
    failed: int

    @property
    def mean(self) -> float | None:
        """Return the mean of the runs' best validation JS, bits; None without a run."""
        return statistics.fmean(self._js) if self.runs else None

    @property
    def standard_error(self) -> float | None:
        """Return the standard error of the mean, bits; None with fewer than two runs."""
        n = len(self.runs)
        return statistics.stdev(self._js) / math.sqrt(n) if n > 1 else None

    @property
    def summary(self) -> str:
        if self.standard_error is None:
            return f"{self.mean:.4f} bits (one seed)"
        n = len(self.runs)
        return f"{self.mean:.4f} ± {self.standard_error:.4f} bits (mean and standard error over {n} seeds)"

    @property
    def row(self) -> dict[str, Any]:
        """Return the row of `confirmed.csv`. A table for people has the headings `HEADINGS`."""
        return {
            "trial_id": self.trial_id,
            "mean_js": self.mean,
            "standard_error": self.standard_error,
            "seeds": len(self.runs),
            "failed": self.failed,
            "searched_js": self.searched_js,
        }

    @property
    def cells(self) -> list[str]:
        values = self.row.values()
        return ["" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]

    @property
    def median(self) -> TrialRecord:
        """Return the median run; for an even number, the worse one of the two in the middle."""
        return self.runs[len(self.runs) // 2]

    @property
    def _js(self) -> list[float]:
        return [record.best["val_js"] for record in self.runs if record.best]


def best_configurations(records: Iterable[TrialRecord], count: int) -> list[TrialRecord]:
    """Return the best trial of each of the best configurations. A continued trial has the same configuration."""
    found: list[TrialRecord] = []
    for record in best_first(record for record in records if record.counts):
        if len(found) < count and all(record.settings != other.settings for other in found):
            found.append(record)
    return found


def enqueue(study: optuna.Study, records: Sequence[TrialRecord], seeds: Iterable[int]) -> None:
    """Enqueue each configuration with each seed, except existing runs.

    The order is seed by seed, so an interrupted confirmation has about the same number of runs per configuration.
    """
    known = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    there = {(attributes[CONFIRMS], attributes[SETTINGS][_SEED]) for attributes in known}
    for seed in seeds:
        for record in records:
            if (record.trial_id, seed) not in there:
                settings = {**record.settings, _SEED: seed}
                study.enqueue_trial({}, user_attrs={SETTINGS: settings, CONFIRMS: record.trial_id})


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds that follow the seed of the study."""
    return [(seed + 1 + i) % 2**31 for i in range(count)]


def rank_confirmed(spec: StudySpec, records: Sequence[TrialRecord]) -> list[ConfirmedConfiguration]:
    """Rank the configurations of a confirmation by their mean JS.

    Configurations with failed runs come after the others, those without a complete run last. One with a single run, as
    of an earlier confirmation with fewer seeds, comes after those with several: it may have been lucky.
    """
    found = [
        ConfirmedConfiguration(
            trial_id,
            searched_js,
            # A run whose history was lost has no JS, so it does not count.
            tuple(best_first([r for r in records if r.confirms == trial_id and r.status == "complete" and r.best])),
            sum(r.confirms == trial_id and r.status == "failed" for r in records),
        )
        for trial_id, searched_js in (spec.confirms or {}).items()
    ]
    several = any(len(each.runs) > 1 for each in found)
    return sorted(found, key=lambda s: (not s.runs, s.failed, several and len(s.runs) == 1, s.mean or 0.0))


def write_confirmed(folder: Path, found: Iterable[ConfirmedConfiguration]) -> None:
    """Write `confirmed.csv`."""
    write_text(
        folder / CONFIRMED_TABLE, pd.DataFrame([configuration.row for configuration in found]).to_csv(index=False)
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a confirmation."""

    chosen: tuple[TrialRecord, ...]  # trials of the search whose configurations run again
    spec: StudySpec  # spec of the confirmation
    settings: tuple[dict[str, Any], ...]  # settings of all runs, including unfinished ones of an earlier confirmation


def plan_confirmation(request: ConfirmRequest) -> Plan:
    """Plan a confirmation of the best configurations of a study.

    Raises:
        UserError: there is no such study, it has nothing to confirm, its data or weights are missing, or its batches
            are too small for the number of workers.
    """
    with read_study(request.study, *RECORD_OF_CONFIRMATION) as study:
        return _plan(request, study)


def _plan(request: ConfirmRequest, study: OpenStudy) -> Plan:
    place, searched = request.study, study.spec
    if searched.confirms is not None:
        raise UserError(f"{place}: is a confirmation itself; name the study whose folder contains it")
    # A budget of one second: without it, the command would first train all remaining trials of the study.
    options = typed_options(results=parent_of(place), name=place.typed_name, time_budget="1s")
    resume = f"{typed_command('search')} --resume{options}"
    stores = open_stores(searched, f"name their folder with `{resume} --data DIR`")
    chosen = best_configurations(study.records(), request.top)
    if not chosen:
        raise UserError(f"{place}: no trial of this study has reported yet; search longer")
    faults: list[str] = []
    workers = request.workers_per_trial or searched.workers_per_trial
    before = confirmation_before(place, searched.epochs)
    left = _list_left(study.folder / CONFIRMED) if before else []
    settings = [searched.settings(its) for its in (*(record.settings for record in chosen), *left)]
    for config in map(RunConfig.from_flat, settings):
        with collect_errors(faults):
            faults += batch_faults(config, len(stores[config.data.image_size].train), workers)
        with collect_errors(faults):
            _check_weights(config.model, f"name their folder with `{resume} --weights-dir DIR`")
    if faults:
        raise UserError(dict.fromkeys(faults))
    confirms = {record.trial_id: record.best["val_js"] for record in chosen if record.best}
    given = {name: getattr(request, name) for name in ("concurrency", "workers_per_trial", "gpus_per_worker")}
    spec = dataclasses.replace(
        searched,
        name=f"{searched.name}, confirmed",
        space={key: value for key, value in searched.space.items() if key != "start"},
        confirms={**(before.confirms or {} if before else {}), **confirms},
        storage=None,
        **{name: value for name, value in given.items() if value is not None},
    )
    return Plan(tuple(chosen), spec, tuple(settings))


def _list_left(folder: Path) -> list[dict[str, Any]]:
    """List the settings of the unfinished runs of a confirmation."""
    trials = load_study(folder).get_trials(deepcopy=False)
    return [trial.user_attrs[SETTINGS] for trial in trials if not trial.state.is_finished()]


def confirmation_before(study: Location, epochs: int) -> StudySpec | None:
    """Return the spec of a study's existing confirmation; None if there is none.

    Args:
        study: location of the study.
        epochs: epochs of its trials.

    Raises:
        UserError: the runs of the confirmation have another length, so new ones could not be compared with them.
    """
    place = study / CONFIRMED
    before = spec_of(place) if place.read(SPEC) is not None else None
    if before is not None and before.epochs != epochs:
        raise UserError(
            f"{place}: its runs have {before.epochs} epochs, but trials of the study now have {epochs}; move it away "
            f"to confirm the study again"
        )
    return before


def _check_weights(config: ModelConfig, advice: str) -> None:
    """Check that the pretrained weights of a run, if any, still exist.

    Raises:
        UserError: they do not. For weights that an option named, the sentence ends with the advice.
    """
    try:
        check_weights(config)
    except AbsentWeightsError as error:
        if split_source(config.backbone)[0] == FOLDER:
            raise
        raise UserError(f"{fault.partition(';')[0]}; {advice}" for fault in error.faults) from None


@contextlib.contextmanager
def open_confirmation(place: Location, spec: StudySpec) -> Iterator[OpenStudy]:
    """Load a confirmation to work on it, and make it first if there is none. It is locked until the block ends.

    Args:
        place: location of the confirmation.
        spec: spec of a new one.

    Raises:
        UserError: there are other files, or another process is using it.
    """
    with contextlib.ExitStack() as held:
        if place.read(SPEC) is not None:
            yield open_existing(place, held)
        else:
            folder = place.working_folder()
            _free_name(place, folder)
            make_study(folder, spec)
            yield held.enter_context(open_study(folder, place))


def _free_name(place: Location, folder: Path) -> None:
    """Delete the lock file of a killed process at the location of a new confirmation, and set aside its working copy.

    Raises:
        UserError: there are other files, or another process is using the folder.
    """
    if not place.can_be_built(DRIVER, SPEC):
        if others := sorted(entries_of(place) - {LOCK}):
            raise UserError(f"{place}: holds {', '.join(others[:5])}, but is not a confirmation; move it away")
        if place.is_here(folder):
            with study_lock(folder) as drivers, drivers.turn("files"):
                shutil.rmtree(folder)
    place.free_working_folder()


def enqueue_runs(study: OpenStudy, plan: Plan, seeds: int) -> OpenStudy:
    """Enqueue the missing runs of a confirmation with this number of seeds. Existing runs are kept."""
    with study.drivers.turn("trials"):
        enqueue(study.optuna, plan.chosen, fresh_seeds(plan.spec.seed, seeds))
    return study.with_spec(dataclasses.replace(plan.spec, trials=len(study.optuna.get_trials(deepcopy=False))))
