"""Open a study to read it or to work on it: its spec, space and trials are loaded once, as one object."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator
from pathlib import Path

import optuna

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.run_folder import HISTORY, LAST
from raytune_emotion.storage.atomic import atomic_folder, write_text
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.tuning.policy.objective import OBJECTIVES, Objective
from raytune_emotion.tuning.policy.warm_start import EARLIER
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.drivers import Drivers, SingleDriver
from raytune_emotion.tuning.study.optuna_study import (
    JOURNAL,
    count_due,
    create_study,
    delete_study,
    extend,
    has_tried_all,
    list_trials,
    load_study,
    study_lock,
)
from raytune_emotion.tuning.study.records import (
    TrialRecord,
    best_first,
    read_record,
    read_records,
    trials_to_strip,
    winner,
)
from raytune_emotion.tuning.study.remote_copy import CONTINUED, PIECES, RemoteCopy, join_pieces
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, created_at, read_spec, write_spec
from raytune_emotion.tuning.study.trials import ALL, trial_file, trial_folder


@dataclasses.dataclass(frozen=True)
class OpenStudy:
    """A loaded study: its spec and its record."""

    folder: Path
    spec: StudySpec
    optuna: optuna.Study
    copy: RemoteCopy
    drivers: Drivers = dataclasses.field(default_factory=SingleDriver)

    @functools.cached_property
    def space(self) -> Space:
        """Return the search space. It is read late, so a study can be read even if this version cannot read its space.

        Raises:
            UserError: this version cannot read it.
        """
        return parse_space(self.spec.space, str(self.folder / SPEC))

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.spec.objective]

    @property
    def reports(self) -> int:
        """Return the number of reports of a trial that is trained to its end."""
        return self.spec.epochs * int(self.space.fixed_settings.get("train.evals_per_epoch", 1))

    @property
    def mark(self) -> str | None:
        """Return a file that every machine sees that can see the study's folder; None for a study at a URI."""
        return self.copy.mark(SPEC)

    def claim(self) -> None:
        """Become the driver of a study at a URI, and push its record.

        Raises:
            Breakdown: another process has made or continued the study since it was loaded; or all requests failed.
        """
        there = self.copy.location.read(SPEC)
        is_other = created_at(there) != created_at(Folder(self.folder).read(SPEC))
        if there is not None and (is_other or self.copy.is_behind()):
            raise Breakdown(f"{self.copy}: {CONTINUED}")
        # The spec last: it marks a study.
        self.copy.claim([EARLIER, SPEC], journal=JOURNAL, continues=there is not None)

    def trial_folder(self, trial_id: str) -> Path:
        return trial_folder(self.folder, trial_id)

    def records(self, known: Collection[str] = ()) -> list[TrialRecord]:
        """Read the trials in the order of their start, except those in `known`."""
        return read_records(self.folder, self.optuna, known)

    def record(self, trial_id: str) -> TrialRecord:
        return read_record(self.folder, self.optuna, trial_id)

    def is_over(self) -> bool:
        """Tell whether all trials of the spec have ended, or all configurations of the space."""
        trials = list_trials(self.optuna)
        if any(trial.status in ("running", "paused") for trial in trials):
            return False
        return len(trials) >= self.spec.trials or self.has_tried_all()

    def has_tried_all(self) -> bool:
        """Tell whether every configuration of the space has been tried."""
        return self.spec.confirms is None and has_tried_all(self.optuna, self.space)

    def best_trial(self) -> TrialRecord:
        """Return the best trial.

        Raises:
            UserError: no trial has a result.
        """
        best = winner(self.records())
        if best is None:
            raise UserError(
                f"{self.copy}: no trial has a result yet: none has reported, or all that reported have failed"
            )
        return best

    def with_spec(self, spec: StudySpec) -> "OpenStudy":
        """Write another spec, and return the study with it."""
        with self.drivers.turn("files"):
            write_spec(self.folder, spec)
        return dataclasses.replace(self, spec=spec)


def make_study(folder: Path, spec: StudySpec, earlier: str | None = None) -> None:
    """Make a study's folder atomically.

    Args:
        folder: folder of the study, which must not exist.
        spec: spec of the study.
        earlier: results of earlier studies, as `gather_earlier` returns them.

    Raises:
        UserError: the folder exists, or cannot be made.
    """
    try:
        with atomic_folder(folder) as part:
            create_study(part, parse_space(spec.space, SPEC), folder.name, spec.storage)
            if earlier is not None:
                write_text(part / EARLIER, earlier)
            write_spec(part, spec)
    except BaseException:
        delete_study(spec.storage)
        raise


def load(folder: Path, location: Location | None = None, drivers: Drivers | None = None) -> OpenStudy:
    """Load a study, to read it, or as one of its drivers.

    Raises:
        UserError: there is no study in the folder, or it is damaged.
    """
    copy = RemoteCopy(folder, location or Folder(folder))
    return OpenStudy(folder, read_spec(folder), load_study(folder), copy, drivers or SingleDriver())


@contextlib.contextmanager
def read_study(place: Location, *patterns: str) -> Iterator[OpenStudy]:
    """Load a study to read it, also while it runs. It is not locked, and nothing is written.

    Args:
        place: location of the study.
        patterns: patterns of files that are read in addition to its spec, its trials and their histories.

    Raises:
        UserError: there is no study, or it is damaged; or an error of the block, which then names the location.
    """
    with place.copy_here(SPEC, JOURNAL, *PIECES, trial_file(ALL, HISTORY), *patterns) as folder:
        # At the location itself, only its driver may write.
        for journal in (JOURNAL, *(pattern for pattern in patterns if pattern.endswith(JOURNAL))):
            if not place.is_here(folder):
                join_pieces(folder, journal)
        yield load(folder, place)


@contextlib.contextmanager
def open_study(folder: Path, location: Location | None = None) -> Iterator[OpenStudy]:
    """Load a study to work on it. Unless it is in a database, its folder is locked until the block ends.

    Args:
        folder: folder to work in, with the study's record.
        location: location of the study, if it is not the folder.

    Raises:
        UserError: there is no study, it is damaged, or another process is working on it.
    """
    read_spec(folder)  # raises an error before a lock file is made in a folder without a study
    with study_lock(folder) as drivers:
        yield load(folder, location, drivers)


def open_existing(place: Location, held: contextlib.ExitStack) -> OpenStudy:
    """Load a study to resume it, and be its driver until `held` ends; see `study_lock`.

    The working folder of a URI is first brought up to date, because another machine may have continued the study. Files
    of another study of the same name are set aside.
    """
    folder = place.working_folder()
    folder.mkdir(parents=True, exist_ok=True)
    drivers = held.enter_context(study_lock(folder))
    if not place.is_here(folder):
        with drivers.turn("files"):
            if created_at(place.read(SPEC)) != created_at(Folder(folder).read(SPEC)):
                place.set_aside_copy()
            place.check_out(SPEC, JOURNAL, *PIECES, EARLIER, trial_file(ALL, HISTORY))
    join_pieces(folder, JOURNAL)
    return load(folder, place, drivers)


def go_on(study: OpenStudy, spec: StudySpec) -> OpenStudy:
    """Give a resumed study its new spec.

    Trials that wait to be trained to a later end are run, whatever number of trials the spec has. Thus the command that
    raised the epochs can be repeated with the same number of trials.

    Raises:
        UserError: other drivers are working with other epochs.
    """
    with study.drivers.turn("trials"):
        # Another driver may have raised them since the study was loaded.
        epochs = read_spec(study.folder).epochs
        running = {trial.driver for trial in list_trials(study.optuna) if trial.status == "running"}
        others = running & study.drivers.others()
        if epochs not in (study.spec.epochs, spec.epochs) or (spec.epochs > epochs and others):
            raise UserError(
                f"{study.folder}: another driver works with {epochs} epochs; use the same number with --epochs, or "
                f"wait until it ends"
            )
        if spec.epochs > epochs:
            return raise_epochs(study, spec)
        return study.with_spec(dataclasses.replace(spec, trials=max(spec.trials, count_due(study.optuna))))


def raise_epochs(study: OpenStudy, spec: StudySpec) -> OpenStudy:
    """Continue the best complete trials to a later end, as new trials.

    A second call changes nothing, because a process may be killed during the first one.

    Args:
        study: the study with its old spec.
        spec: the spec with more epochs.
    """
    records = study.records()
    lost = {*trials_to_strip(records, study.objective)}
    # Trials whose weights are kept, and that have run to the old end without early stopping.
    can = [
        record.trial_id
        for record in best_first(records)
        if record.status == "complete"
        and record.is_whole
        and record.trial_id not in lost
        and record.reports[-1]["epoch"] >= study.spec.epochs
        and study.copy.has(trial_file(record.trial_id, LAST))
    ]
    extend(study.optuna, can)
    trials = max(max(spec.trials, len(list_trials(study.optuna))) + len(can), count_due(study.optuna))
    return study.with_spec(dataclasses.replace(spec, trials=trials))
