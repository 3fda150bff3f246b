"""Make and load the Optuna study with a study's trials, count them, and ask the policy for the next one.

Ray's own `OptunaSearch` records each stopped trial as complete, with its last value. The sampler's model then mixes
values after a few epochs with those of full trials. Here every ending keeps its name: complete, pruned or failed.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line
from raytune_emotion.learn.report import OBJECTIVE, DriverReport
from raytune_emotion.storage.atomic import exclusive_lock
from raytune_emotion.tuning.policy.candidates import domain_of, is_exhausted
from raytune_emotion.tuning.policy.decisions import (
    NO_LIMITS,
    Begin,
    Decision,
    Gain,
    Limits,
    Policy,
    Prune,
    Recorded,
    TakeUp,
)
from raytune_emotion.tuning.policy.trial_attributes import (
    CONFIRMS,
    CONTINUES,
    COST,
    DRIVER,
    GAIN,
    PAUSED,
    RAISED,
    REASON,
    RESUMED_IN,
    SECONDS,
    SETTINGS,
    START,
    TAKEN_UP,
    best_js,
    count_reports,
    is_paused,
)
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.database import connect, connection_options, split_address
from raytune_emotion.tuning.study.drivers import Drivers, SingleDriver, join_study, one_at_a_time
from raytune_emotion.tuning.study.journal_check import check_trials
from raytune_emotion.tuning.study.optuna_patches import check_end, close_when_unused, mend_journal, reopen, stored_trial
from raytune_emotion.tuning.study.spec import SPEC, read_spec
from raytune_emotion.tuning.study.trials import trial_id_of

Status = Literal["complete", "pruned", "failed", "running", "paused"]
#: Statuses of ended trials.
ENDED: tuple[Status, ...] = ("complete", "pruned", "failed")

_STATES: dict[Status, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
_STATUSES: dict[TrialState, Status] = {state: status for status, state in _STATES.items()}

JOURNAL = "optuna.journal"
#: Name of a trial's value in Optuna's dashboard.
_METRIC = "best validation JS, bits"


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A trial to run."""

    trial_id: str
    settings: dict[str, Any]  # by dotted path; with the study's own settings, they make a RunConfig
    continues: str | None  # id of the trial from whose checkpoint it continues


@dataclasses.dataclass(frozen=True)
class StudyTrial:
    """A trial as recorded by Optuna."""

    trial_id: str
    status: Status
    settings: dict[str, Any]
    reason: str  # why it failed, or ""
    continues: str | None
    confirms: str | None  # id of the trial of another study whose configuration it repeats
    driver: int | None  # driver that runs it, or ran it last, if a study has several
    observed: int  # number of its reports that Optuna has


class Searcher:
    """Ask an Optuna study for trials, and record their reports and endings.

    The sampler of a trial is made from the trial's number. Proposals depend only on the recorded history, so an
    interrupted study makes the same proposals as an uninterrupted one (`FreezeThaw` describes an exception).
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        policy: Policy,
        *,
        sampler: Callable[[int], BaseSampler],
        cost: Callable[[DriverReport], float] | None = None,
        driver: int | None = None,
    ) -> None:
        """Connect to a study.

        Args:
            study: the Optuna study.
            space: search space of the study.
            policy: decides which trials run.
            sampler: makes the Optuna sampler for a trial number; it draws parameters that neither policy nor start
                point sets.
            cost: computes the cost of a trial from its latest report, if the objective has one.
            driver: mark of this driver's trials, if the study has several; it then asks and resumes only in its turn.
        """
        self._study = study
        self._space = space
        self._policy = policy
        self._sampler = sampler
        self._cost = cost
        self._driver = driver
        self._handles: dict[str, optuna.Trial] = {}

    def ask(self, limits: Limits = NO_LIMITS) -> Proposal | Prune | None:
        """Answer for a free place: first come waiting trials, such as those of the space's `start` list.

        Returns:
            A trial to run; a paused one to prune; None if there is nothing to run for now.
        """
        waits = any(trial.state == TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))
        if not (limits.new and waits):
            answer = self._policy.next(self._past(), limits)
            if isinstance(answer, TakeUp):
                return self.resume(trial_id_of(answer.number))
            if not isinstance(answer, Begin):
                return answer
            if answer.params:
                self._study.enqueue_trial(dict(answer.params))
        return self._sample_settings(self._study.ask())

    def decide(self, trial_id: str, report: DriverReport, limits: Limits) -> Decision:
        """Decide about a trial after an observed report."""
        return self._policy.decide(trial_id, report, self._past(), limits)

    def decide_again(self, trial_id: str, report: DriverReport, limits: Limits) -> Decision:
        """Decide about a trial that ran at an interruption, after its last report."""
        return self._policy.decide_again(trial_id, report, self._past(), limits)

    def replay(self, trials: Sequence[Recorded]) -> None:
        """Let the policy learn from earlier reports; see `decisions.Policy`."""
        self._policy.replay(trials)

    def note_gain(self, gain: Callable[[Sequence[FrozenTrial]], Gain | None]) -> Gain | None:
        """Compute the expected further gain from the trials that have begun, and keep it in the study."""
        found = gain(self._past())
        if found != expected_gain(self._study):
            self._study.set_user_attr(GAIN, None if found is None else [found.bits, found.seconds])
        return found

    def _past(self) -> list[FrozenTrial]:
        """Return every trial that has begun."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if SETTINGS in trial.user_attrs and trial.state != TrialState.WAITING]

    def finish_asking(self) -> None:
        """Complete the proposals of trials that were interrupted before they had settings."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and SETTINGS not in trial.user_attrs:
                self._sample_settings(reopen(self._study, trial))

    def _sample_settings(self, trial: optuna.Trial) -> Proposal:
        # In a confirmation, the trial already has its settings.
        settings = trial.user_attrs.get(SETTINGS)
        if settings is None:
            self._study.sampler = self._sampler(trial.number)
            settings = self._space.suggest(trial)
            for name in settings:
                # The raw parameters of a mixture are not its weights. Optuna's dashboard shows the weights, too.
                if any(parameter.startswith(f"{name}~") for parameter in trial.params):
                    trial.set_user_attr(name, settings[name])
            trial.set_user_attr(SETTINGS, settings)
        return self._proposal_of(trial, settings)

    def resume(self, trial_id: str, *, to_train: bool = True) -> Proposal:
        """Resume an unfinished trial: to train it, or only to record its ending."""
        frozen = self._study.get_trials(deepcopy=False)[int(trial_id)]
        trial = reopen(self._study, frozen)
        # The driver is marked first: if this process is killed in between, the trial is paused, or belongs to it.
        proposal = self._proposal_of(trial, frozen.user_attrs[SETTINGS])
        # A trial that is only ended stays paused: if this process is killed before the ending, it does not train again.
        if to_train and frozen.user_attrs.get(PAUSED):
            trial.set_user_attr(TAKEN_UP, frozen.user_attrs.get(TAKEN_UP, 0) + 1)
            trial.set_user_attr(PAUSED, False)
        return proposal

    def observe(self, trial_id: str, report: DriverReport) -> bool:
        """Record a report of a running trial, and return whether it was new."""
        trial = self._handles[trial_id]
        step = int(report["report"])
        if step in stored_trial(trial).intermediate_values:
            return False
        if "resumed_in" in report:
            trial.set_user_attr(RESUMED_IN, report["resumed_in"])
        if self._cost is not None:
            trial.set_user_attr(COST, self._cost(report))
        trial.report(report[OBJECTIVE], step)
        return True

    def last_report(self, trial_id: str) -> int:
        """Return the number of the last report of a running trial; 0 before the first."""
        return count_reports(stored_trial(self._handles[trial_id]))

    def pause(self, trial_id: str, seconds: float) -> None:
        """Record that a trial has paused after these seconds of training."""
        trial = self._handles[trial_id]
        trial.set_user_attr(SECONDS, seconds)
        trial.set_user_attr(PAUSED, True)
        del self._handles[trial_id]

    def tell(self, trial_id: str, status: Status, *, reason: str = "", seconds: float | None = None) -> None:
        """Record how a trial ended. Its value is the best observed one."""
        trial = self._handles[trial_id]
        if reason:
            trial.set_user_attr(REASON, reason)
        if seconds is not None:
            trial.set_user_attr(SECONDS, seconds)
        value = best_js(stored_trial(trial)) if status == "complete" else None
        self._study.tell(trial, value, state=_STATES[status])
        del self._handles[trial_id]

    def _proposal_of(self, trial: optuna.Trial, settings: dict[str, Any]) -> Proposal:
        if self._driver is not None:
            trial.set_user_attr(DRIVER, self._driver)
        proposal = Proposal(trial_id_of(trial.number), settings, trial.user_attrs.get(CONTINUES))
        self._handles[proposal.trial_id] = trial
        return proposal


def extend(study: optuna.Study, trial_ids: Iterable[str]) -> None:
    """Note which trials completed at the old end, and enqueue continuations from the last epoch of these complete ones.

    Trials that already have a continuation are skipped.
    """
    trials = study.get_trials(deepcopy=False)
    complete = (trial.number for trial in trials if trial.state == TrialState.COMPLETE)
    study.set_user_attr(RAISED, max(complete, default=-1) + 1)
    waiting = trials_to_continue(study)
    for trial_id in trial_ids:
        if trial_id not in waiting:
            study.enqueue_trial(trials[int(trial_id)].params, user_attrs={CONTINUES: trial_id})


def raised_before(study: optuna.Study) -> int:
    """Return the number of the first trial that completes at the present epochs; 0 if they were never raised."""
    number = study.user_attrs.get(RAISED)
    return number if isinstance(number, int) else 0


def expected_gain(study: optuna.Study) -> Gain | None:
    """Return the expected further gain that was recorded last; None if it is unknown."""
    noted: list[float] | None = study.user_attrs.get(GAIN)
    return None if noted is None else Gain(*noted)


def list_trials(study: optuna.Study) -> list[StudyTrial]:
    """Return every trial that was asked for, in order."""
    trials = study.get_trials(deepcopy=False)
    return [_study_trial(trial) for trial in trials if trial.state != TrialState.WAITING]


def read_trial(study: optuna.Study, trial_id: str) -> StudyTrial:
    """Return one trial that was asked for."""
    return _study_trial(study.get_trials(deepcopy=False)[int(trial_id)])


def _study_trial(trial: FrozenTrial) -> StudyTrial:
    return StudyTrial(
        trial_id_of(trial.number),
        "paused" if is_paused(trial) else _STATUSES[trial.state],
        # The proposal of a trial without settings was interrupted.
        trial.user_attrs.get(SETTINGS, {}),
        trial.user_attrs.get(REASON, ""),
        trial.user_attrs.get(CONTINUES),
        trial.user_attrs.get(CONFIRMS),
        trial.user_attrs.get(DRIVER),
        len(trial.intermediate_values),
    )


def has_tried_all(study: optuna.Study, space: Space) -> bool:
    """Tell whether a space is small, and a trial of each configuration has begun."""
    domain, trials = domain_of(space), study.get_trials(deepcopy=False)
    tried = domain.tried(trial for trial in trials if SETTINGS in trial.user_attrs)
    return all(trial.state != TrialState.WAITING for trial in trials) and is_exhausted(domain, tried)


def count_due(study: optuna.Study) -> int:
    """Return the number of trials after all continuations have begun.

    Optuna takes waiting trials in the order of their numbers: start points before continuations.
    """
    trials = study.get_trials(deepcopy=False)
    due = [trial for trial in trials if trial.state != TrialState.WAITING or CONTINUES in trial.user_attrs]
    return max((trial.number + 1 for trial in due), default=0)


def trials_to_continue(study: optuna.Study) -> set[str]:
    """Return the ids of the trials that waiting or running trials continue."""
    open_ones = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return {trial.user_attrs[CONTINUES] for trial in open_ones if CONTINUES in trial.user_attrs}


def create_study(folder: Path, space: Space, name: str | None = None, address: str | None = None) -> optuna.Study:
    """Make an Optuna study, with the space's `start` list enqueued.

    Args:
        folder: folder of the study.
        space: search space of the study.
        name: name of the study; default: the folder's name.
        address: address of the study in a database; None: its trials are in a journal in the folder.
    """
    storage = _journal_in(folder) if address is None else _make_tables(address)
    name = split_address(address)[1] if address is not None else name or folder.name
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # hide the message that a study was created
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
    optuna.logging.set_verbosity(verbosity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # since 2023
        study.set_metric_names([_METRIC])
    for point in space.start_points():
        study.enqueue_trial(point, user_attrs={START: True})
    return study


def delete_study(address: str | None) -> None:
    """Delete a study from its database. A journal is deleted with its folder."""
    if address is not None:
        with contextlib.suppress(Exception):  # any error: a study without a folder does no harm
            optuna.delete_study(study_name=split_address(address)[1], storage=_database(address))


def load_study(folder: Path) -> optuna.Study:
    """Load the Optuna study of a study's folder.

    Raises:
        UserError: there is none, it is damaged, or its database cannot be opened.
    """
    address = _address_of(folder)
    if address is None and not (folder / JOURNAL).is_file():
        raise UserError(f"{folder}: not a study, because it has no {JOURNAL}; name a folder that a search has made")
    if address is not None:
        connect(split_address(address)[0]).close()  # raises an error in one sentence if it fails
    try:
        if address is None:
            check_end(folder / JOURNAL)
            storage = _journal_in(folder)
            # The name of the folder is not used, because people rename folders.
            (name,) = optuna.get_all_study_names(storage)
        else:
            storage, name = _database(address), split_address(address)[1]
        study = optuna.load_study(study_name=name, storage=storage)
        check_trials(study.get_trials(deepcopy=False))
        return study
    except (OSError, UserError):
        raise
    except Exception as error:  # Optuna raises errors of all kinds for a damaged line
        raise UserError(
            f"{folder / JOURNAL if address is None else address}: damaged ({type(error).__name__}: {error}); restore "
            f"it from a copy, or begin a new study with the same options; the results of the trials are in "
            f"{folder / 'trials'}"
        ) from error


@contextlib.contextmanager
def study_lock(folder: Path) -> Iterator[Drivers]:
    """Lock a study's folder for this process, because two processes would overwrite each other's files.

    A study in a database is not locked. This process becomes one of its drivers. A journal is mended at the first turn.

    Raises:
        UserError: another process has the lock, or the database cannot be opened.
    """
    address = _address_of(folder)
    if address is not None:
        with join_study(address) as drivers:
            yield drivers
        return
    with exclusive_lock(folder) as lock:
        yield SingleDriver(lock, partial(mend_journal, folder / JOURNAL))


def _address_of(folder: Path) -> str | None:
    """Return the address of a study's trials in a database; None if they are in a journal in its folder."""
    if (folder / JOURNAL).is_file() or not (folder / SPEC).exists():
        return None
    return read_spec(folder).storage


def _journal_in(folder: Path) -> BaseStorage:
    # Optuna's default lock is a symbolic link, which not every file system supports. Both locks respect each other.
    file = str(folder.absolute() / JOURNAL)
    return JournalStorage(JournalFileBackend(file, lock_obj=JournalFileOpenLock(file)))


def _database(address: str, *, tables: bool = False) -> BaseStorage:
    url = split_address(address)[0].replace("postgresql:", "postgresql+psycopg:", 1)
    options = {"connect_args": connection_options()}
    try:
        return close_when_unused(RDBStorage(url, engine_kwargs=options, skip_table_creation=not tables))
    except RuntimeError as error:  # tables of another version of Optuna
        raise UserError(f"{address}: {first_line(error)}") from error


def _make_tables(address: str) -> BaseStorage:
    """Make Optuna's tables in a database if it has none."""
    with one_at_a_time(split_address(address)[0], "tables"):
        return _database(address, tables=True)
