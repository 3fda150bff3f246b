"""What one trial is, and how it trains in a process: its checkpoints and its events lie in its own folder.

That folder is a trial's memory: `fit` goes on from the checkpoint in it, so whatever ended a trial before, it is simply
run again. Ray keeps no checkpoint of its own. Where a trial is kept at a URI, that is its memory, and each process has
a folder of its own for as long as it trains.
"""

import contextlib
import dataclasses
import gc
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError

from raytune_emotion.config import RunConfig, TrainConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.known_errors import is_disk_full
from raytune_emotion.learn import malloc
from raytune_emotion.learn.checkpoint import BEST, HISTORY, LAST, read_progress
from raytune_emotion.learn.device import is_out_of_memory, limit_memory, reduce_fragmentation
from raytune_emotion.learn.events import EventWriter
from raytune_emotion.learn.loop import Diverged, fit
from raytune_emotion.learn.report import Report
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Location, parse_location
from raytune_emotion.tuning.study.trials import DATA, PARAMS

if TYPE_CHECKING:  # a trial's process needs none of what these import
    from raytune_emotion.tuning.study.open_study import OpenStudy
    from raytune_emotion.tuning.study.optuna_study import Proposal


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one trial takes."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus_per_worker))


@dataclasses.dataclass(frozen=True)
class Job:
    """One trial as it crosses processes: plain values only."""

    name: str  # readable, for the dashboard
    folder: str
    store: str  # folder, or URI from which each machine fetches it
    settings: dict[str, Any]
    resources: Resources
    location: str | None = None  # address of what keeps the trial's files, where that is not the driver's folder
    resident: bool = True  # whether its images may lie on the GPU

    @property
    def kept_at(self) -> Location:
        """The location that has the trial's files, on whatever machine."""
        return parse_location(self.location or self.folder)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        return cls(**{**values, "resources": Resources(**values["resources"])})


class TrialFailed(RuntimeError):
    """A trial that would fail again if it were run again, as when it diverged."""


class Unfit(TrialFailed):
    """A trial that does not fit its data, its device, its workers or the run in its folder: sentences for the user."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))

    # It is sent from worker to driver, and what caused it is not.
    def __reduce__(self) -> tuple[type["Unfit"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class OutOfMemory(TrialFailed):
    """A trial that needs more memory than its device has."""


class DiskFull(Breakdown):
    """No fault of the trial: it can go on when there is room."""


def train_here(job: Job) -> Generator[Report, None, None]:
    """Trains a job in this process, or goes on with it, and yields its reports; closing the generator stops it.

    Raises:
        TrialFailed: where another attempt would end the same.
    """
    yield from train_on(job, torch.device("cuda" if job.resources.gpus_per_worker else "cpu"))


def train_on(job: Job, device: torch.device, *, first: bool = True) -> Generator[Report, None, None]:
    """Trains a worker's share of a job; the first worker also writes the settings, and events for TensorBoard.

    Nothing of the trial is left in the process when the generator is exhausted or closed.

    Raises:
        TrialFailed: where another attempt would end the same; OutOfMemory of these.
        DiskFull: a checkpoint could not be written.
        Breakdown: the location cannot be read or written.
    """
    location, pushed = job.kept_at, dict[str, tuple[int, int]]()
    # All else follows from the last state. Every worker takes it for itself: none depends on a disk of another's.
    with location.work_here(LAST) as folder:
        try:
            with contextlib.closing(_train_in(folder, job, device, first=first)) as reports:
                for report in reports:
                    if first:
                        _push_changed(folder, location, pushed)
                    yield report
        except TrialFailed:
            if first:
                _push_changed(folder, location, pushed)
            raise
        if first:
            # What was repaired of a run that had ended, but had not pushed all of it.
            _push_changed(folder, location, pushed)


def _train_in(folder: Path, job: Job, device: torch.device, *, first: bool) -> Generator[Report, None, None]:
    """Go on from the state in a folder of this machine."""
    config = RunConfig.from_flat(job.settings)
    torch.set_num_threads(job.resources.threads)
    malloc.keep_freed()
    reduce_fragmentation()
    limit_memory(device, job.resources.gpus_per_worker)
    with contextlib.ExitStack() as stack, _told(folder):
        stack.callback(_forget)
        # Momenta of what no longer learns end as denormal numbers, which are slow. The threads of a pool have this from
        # the one that makes it.
        torch.set_flush_denormal(True)
        stack.callback(torch.set_flush_denormal, False)
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / PARAMS, json.dumps(job.settings, indent=2) + "\n")
            write_text(folder / DATA, job.store + "\n")
        events = stack.enter_context(EventWriter(folder)) if first else None
        if events is not None:
            events.write_settings(job.settings)
        store = open_store(job.store)
        reports = fit(config, store, device=device, folder=folder, resident=job.resident)
        for report in stack.enter_context(contextlib.closing(reports)):
            if events is not None:
                events.write_report(report, report["report"])
            yield report


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Tells what another attempt would end by as well from what is no fault of the trial in the folder."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory on the device: {str(error).splitlines()[0]}") from error
    except Diverged as error:
        raise TrialFailed(str(error)) from error
    except UserError as error:
        # A disk, or a server, may be back at the next attempt.
        if isinstance(error.__cause__, OSError):
            _raise_of_system(folder, error.__cause__)
        raise Unfit(error.faults) from error
    except (OSError, SafetensorError) as error:
        _raise_of_system(folder, error)


def _raise_of_system(folder: Path, error: Exception) -> NoReturn:
    if is_disk_full(error):
        raise DiskFull(f"{folder}: no space left on the disk") from error
    raise error


def _push_changed(folder: Path, location: Location, pushed: dict[str, tuple[int, int]]) -> None:
    """Push what has changed in a trial's folder since it was last pushed, in the order in which a run writes it.

    Whatever is missing when that breaks off, or is of the report before, is mended from `last` by the next attempt.
    """
    stats = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
    states = {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}
    order = [name for name in (LAST, BEST, HISTORY) if name in states]
    changed = [name for name in dict.fromkeys([*order, *states]) if pushed.get(name) != states[name]]
    location.push(folder, changed)
    pushed.update(states)


def newest_report(job: Job) -> Report | None:
    """What a trial that goes on has reported last, whether or not anybody has heard it; None where it has not."""
    with job.kept_at.work_here(LAST) as folder:
        return _reported(folder)


def _reported(folder: Path) -> Report | None:
    try:
        progress = read_progress(folder)
    except UserError:
        return None  # what is wrong with it is said when it is to go on
    return progress.history[-1] if progress is not None and progress.history else None


def with_retry(job: Job, attempt: Callable[[Job], Iterator[Report]]) -> Generator[Report, None, None]:
    """Train; where the device has too little memory for the job, once more with smaller micro-batches.

    Raises:
        OutOfMemory: also that was too much, or the micro-batches are of one row.
    """
    try:
        yield from attempt(job)
        return
    except OutOfMemory:
        smaller = halved(job)
        if smaller is None:
            raise
    # Not within the handler, for as long as that lasts the failed attempt's tensors live: its frames have them.
    yield from attempt(smaller)


def halved(job: Job) -> Job | None:
    """Return the job with micro-batches of half the size and its images in their files; None for batches of one row.

    It takes about half the memory. The effective batch, and so what the optimizer sees, stays the same but for the
    statistics of BatchNorm.
    """
    accumulate = 2 * job.settings.get("train.accumulate", TrainConfig().accumulate)
    if accumulate * job.resources.workers > job.settings.get("train.batch_size", TrainConfig().batch_size):
        return None
    return dataclasses.replace(job, settings={**job.settings, "train.accumulate": accumulate}, resident=False)


def _forget() -> None:
    gc.collect()
    malloc.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def job_of(study: "OpenStudy", resources: Resources, proposal: "Proposal") -> Job:
    """Return what runs a trial of a study."""
    settings = study.spec.settings(proposal.settings)
    config = RunConfig.from_flat(settings)
    return Job(
        name=f"{proposal.trial_id}_{config.model.backbone}_{config.loss.label}",
        folder=str(study.trial_folder(proposal.trial_id).absolute()),
        store=study.spec.stores[config.data.image_size],
        settings=settings,
        resources=resources,
        location=study.copy.of_trial(proposal.trial_id),
    )
