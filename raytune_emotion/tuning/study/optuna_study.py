"""What Optuna is told, and what it is asked for by way of `sampler`.

Ray's own `OptunaSearch` tells every trial that the scheduler stopped as complete with its last value, so that values of
few epochs mix with full ones in the sampler's model. Here each ending keeps its name: complete, pruned or failed.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.errors import UserError
from raytune_emotion.learn.report import OBJECTIVE, Report
from raytune_emotion.storage.atomic import alone_in
from raytune_emotion.tuning.policy import sampler
from raytune_emotion.tuning.policy.sampler import COST, SETTINGS
from raytune_emotion.tuning.space.space import Space

Status = Literal["complete", "pruned", "failed", "running"]

_STATES: dict[Status, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
_STATUSES: dict[TrialState, Status] = {state: status for status, state in _STATES.items()}

#: Of a space, the past and a seed: Optuna's parameters of a new configuration, or None where there is none.
Propose = Callable[[Space, list[FrozenTrial], int], dict[str, Any] | None]

JOURNAL = "optuna.journal"
#: The attribute of an Optuna trial that repeats a configuration of another study: the trial there that had it first.
CONFIRMS = "confirms"


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A trial to be run."""

    trial_id: str
    settings: dict[str, Any]  # by dotted path; together with the study's own they make a RunConfig
    continues: str | None  # the trial whose checkpoint it goes on from


@dataclasses.dataclass(frozen=True)
class Asked:
    """A trial that Optuna knows of."""

    trial_id: str
    status: Status
    settings: dict[str, Any]
    reason: str  # why it failed, or ""
    continues: str | None
    confirms: str | None  # the trial of another study whose configuration it repeats


class Searcher:
    """An Optuna study, asked for trials and told of their reports and endings.

    A trial's sampler is seeded by the study's seed and the trial's number, so that what is proposed depends on the
    recorded history alone: a study that was interrupted proposes what the uninterrupted one would have.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        *,
        seed: int,
        propose: Propose = sampler.propose,
        cost: Callable[[Report], float] | None = None,
    ) -> None:
        self._study = study
        self._space = space
        self._seed = seed
        self._propose = propose
        self._cost = cost
        self._handles: dict[str, optuna.Trial] = {}

    def ask(self) -> Proposal | None:
        """The next trial: from the space's `start` list first; None where all that the space has was tried."""
        trials = self._study.get_trials(deepcopy=False)
        past = [trial for trial in trials if SETTINGS in trial.user_attrs]
        seed = self._seed_of(len(past))
        if not any(trial.state == TrialState.WAITING for trial in trials):
            params = self._propose(self._space, past, seed)
            if params is None:
                return None
            self._study.enqueue_trial(params)
        return self._settle(self._study.ask(), seed)

    def finish_asking(self) -> None:
        """Settles the trials whose asking was cut short, before anything of them could run."""
        trials = self._study.get_trials(deepcopy=False)
        settled = sum(SETTINGS in trial.user_attrs for trial in trials)
        for torn in [t for t in trials if t.state == TrialState.RUNNING and SETTINGS not in t.user_attrs]:
            self._settle(optuna.Trial(self._study, torn._trial_id), self._seed_of(settled))

    def _settle(self, trial: optuna.Trial, seed: int) -> Proposal:
        # In a confirmation they are there already.
        settings = trial.user_attrs.get(SETTINGS)
        if settings is None:
            # For what a start point leaves out.
            self._study.sampler = RandomSampler(seed=seed)
            settings = self._space.suggest(trial)
            trial.set_user_attr(SETTINGS, settings)
        return self._opened(trial, settings)

    def _seed_of(self, number: int) -> int:
        return zlib.crc32(f"{self._seed}/{number}".encode())

    def extend(self, trial_id: str) -> None:
        """Has a trial that is complete asked for again, to go on from where it ended."""
        ended = self._frozen(trial_id)
        self._study.enqueue_trial(ended.params, user_attrs={"continues": trial_id})

    def resume(self, trial_id: str) -> Proposal:
        """A trial that was asked for in an earlier session and has not ended."""
        frozen = self._frozen(trial_id)
        return self._opened(optuna.Trial(self._study, frozen._trial_id), frozen.user_attrs[SETTINGS])

    def observe(self, trial_id: str, report: Report) -> None:
        """Tells a report of a running trial; one that is known already is passed over."""
        trial = self._handles[trial_id]
        step = int(report["report"])
        if step not in trial.storage.get_trial(trial._trial_id).intermediate_values:
            if self._cost is not None:
                trial.set_user_attr(COST, self._cost(report))
            trial.report(report[OBJECTIVE], step)

    def tell(self, trial_id: str, status: Status, *, reason: str = "") -> None:
        """Tells a trial's ending; its value is the best of what was observed."""
        trial = self._handles.pop(trial_id)
        if reason:
            trial.set_user_attr("reason", reason)
        values = trial.storage.get_trial(trial._trial_id).intermediate_values
        value = min(values.values()) if status == "complete" else None
        self._study.tell(trial, value, state=_STATES[status])

    def _opened(self, trial: optuna.Trial, settings: dict[str, Any]) -> Proposal:
        proposal = Proposal(trial_id_of(trial.number), settings, trial.user_attrs.get("continues"))
        self._handles[proposal.trial_id] = trial
        return proposal

    def _frozen(self, trial_id: str) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[int(trial_id)]


def trial_id_of(number: int) -> str:
    return f"{number:04d}"


def asked(study: optuna.Study) -> list[Asked]:
    """Every trial that was ever asked for, in order."""
    return [
        Asked(
            trial_id_of(trial.number),
            _STATUSES[trial.state],
            # Without settings is one whose asking was cut short.
            trial.user_attrs.get(SETTINGS, {}),
            trial.user_attrs.get("reason", ""),
            trial.user_attrs.get("continues"),
            trial.user_attrs.get(CONFIRMS),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING
    ]


def continued(study: optuna.Study) -> set[str]:
    """The trials that others go on from which have not ended, or not begun."""
    open_ones = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return {trial.user_attrs["continues"] for trial in open_ones if "continues" in trial.user_attrs}


def create_study(folder: Path, space: Space) -> optuna.Study:
    """A new Optuna study in a study's folder, with the space's `start` list enqueued."""
    study = optuna.create_study(storage=_storage(folder), study_name=folder.name, direction="minimize")
    for point in space.start_points():
        study.enqueue_trial(point)
    return study


def load_study(folder: Path) -> optuna.Study:
    """The Optuna study of a study's folder.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    if not (folder / JOURNAL).is_file():
        raise UserError(f"{folder}: no {JOURNAL} in it, so it is no study; name a folder that a search has made")
    try:
        storage = _storage(folder)
        # By what is in it, not by the folder's name: people rename folders.
        (name,) = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=name, storage=storage)
    except OSError:
        raise
    except Exception as error:  # what Optuna happens to meet in lines that are not as it wrote them
        raise UserError(
            f"{folder / JOURNAL}: is damaged ({type(error).__name__}: {error}); put back a copy of it, or begin a new "
            f"study with the same options: what trials have reached is in {folder / 'trials'}"
        ) from error


@contextlib.contextmanager
def sole_driver(folder: Path) -> Iterator[None]:
    """Keeps a study's folder to this process: two that run its trials would write over each other.

    Raises:
        UserError: another process has it.
    """
    with alone_in(folder):
        # One that was killed while it wrote has left Optuna's lock, which would be waited for.
        with contextlib.suppress(RuntimeError):
            JournalFileSymlinkLock(str(folder / JOURNAL)).release()
        # And a full disk, or a power cut, a torn line: with what is written behind it, Optuna could read neither.
        with contextlib.suppress(FileNotFoundError), (folder / JOURNAL).open("rb+") as journal:
            journal.truncate(journal.read().rfind(b"\n") + 1)
        yield


def _storage(folder: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(folder.absolute() / JOURNAL)))
