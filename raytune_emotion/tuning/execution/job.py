"""Describe a trial as a plain dict that can be sent to any process, and train it there, without Ray.

Checkpoints and events of a trial are in its own folder. `fit` continues from the checkpoint there, so an interrupted
trial is simply run again. Ray keeps no checkpoints. If a trial is kept at a URI, each process works in a temporary
folder, and pushes changed files.
"""

import contextlib
import dataclasses
import gc
import json
import platform
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError

from raytune_emotion.config import RunConfig, TrainConfig
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.known_errors import is_disk_full
from raytune_emotion.learn import malloc
from raytune_emotion.learn.backbones import short_name
from raytune_emotion.learn.checkpoint import DamagedCheckpointError, Progress, read_progress, repair_from_last
from raytune_emotion.learn.device import is_of_host, is_out_of_memory, limit_memory, reduce_fragmentation, withheld_part
from raytune_emotion.learn.events import EventWriter
from raytune_emotion.learn.loop import Divergence, fit
from raytune_emotion.learn.origin import AbsentWeightsError
from raytune_emotion.learn.report import Report
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, read_history
from raytune_emotion.learn.samples import write_samples
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Location, parse_location
from raytune_emotion.storage.remote import outlast_outages
from raytune_emotion.tuning.execution.gpu_presence import code_fault, gpu_fault
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.remote_copy import why_lost
from raytune_emotion.tuning.study.trials import DATA, PARAMS

if TYPE_CHECKING:  # a trial's process does not need these imports
    from raytune_emotion.tuning.study.open_study import OpenStudy
    from raytune_emotion.tuning.study.optuna_study import Proposal


#: Part of a trial's share of a GPU's memory that others may hold before they are at fault for its lack of memory. If
#: one row per micro-batch does not fit into the rest, the trial itself is too large.
_WITHHELD = 0.5


@dataclasses.dataclass(frozen=True)
class Job:
    """One trial, as plain values that can be sent to another process."""

    name: str  # readable, for the dashboard
    folder: str
    store: str  # folder, or URI from which each machine fetches it
    settings: dict[str, Any]
    resources: Resources
    location: str | None = None  # address of the trial's files, if they are not kept in `folder`
    mark: str | None = None  # file of the sender; a machine that cannot see this file cannot see `folder`
    claim: tuple[str, str] | None = None  # where the driver has claimed the study, and its name there; None: a folder
    resident: bool = True  # whether its images may be kept on the GPU
    may_start_anew: bool = False  # whether a damaged checkpoint is deleted; otherwise it is an error

    @property
    def kept_at(self) -> Location:
        """Return the location of the trial's files, which is the same on every machine."""
        return parse_location(self.location or self.folder)

    @property
    def accumulate(self) -> int:
        """Return the number of micro-batches of each worker per step."""
        return int(self.settings.get("train.accumulate", TrainConfig().accumulate))

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches of a step, over all workers: the more, the smaller they are."""
        return self.resources.workers * self.accumulate

    def check_claim(self) -> None:
        """Check that the driver still has the study: another one may be training this trial.

        Raises:
            Breakdown: another driver has claimed it, or its files no longer exist.
        """
        if self.claim is not None:
            address, driver = self.claim
            if why := why_lost(parse_location(address), driver):
                raise Breakdown(f"{address}: {why}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        return cls(**{**values, "resources": Resources(**values["resources"])})


class TrialFailed(RuntimeError):
    """Report a trial that would fail again if it were run again, for example because it diverged."""


class InvalidForRun(TrialFailed):
    """Report a configuration that does not fit the data, the device, the workers or the run in the folder."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))

    # It is sent from worker to driver without its cause.
    def __reduce__(self) -> tuple[type["InvalidForRun"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class OutOfMemory(TrialFailed):
    """Report a trial that needs more memory than its device has."""


class GpuTaken(OutOfMemory):
    """Report a trial that lacks memory because other processes hold a part of its share of the GPU."""


class WorkersDied(TrialFailed):
    """Report a trial whose workers died again and again."""


class DiskFull(Breakdown):
    """Report a full disk. The trial can continue once there is room."""


def train_here(job: Job) -> Generator[Report, None, None]:
    """Train or resume a job in this process, and yield its reports. Close the generator to stop it.

    Raises:
        TrialFailed: another attempt would fail too.
    """
    yield from train_on(job, torch.device("cuda" if job.resources.gpus_per_worker else "cpu"))


def train_on(
    job: Job, device: torch.device, *, first: bool = True, wait_for_all: Callable[[], None] = lambda: None
) -> Generator[Report, None, None]:
    """Train a worker's share of a job. The first worker also writes the settings, and events for TensorBoard.

    When the generator is exhausted or closed, the process has freed all memory of the trial.

    Args:
        job: the job.
        device: device of this worker.
        first: whether this is the first worker.
        wait_for_all: waits for all workers. It is called once they have opened their data, and once they have their
            weights, since no step waits as long as a machine may take to fetch either.

    Raises:
        TrialFailed: another attempt would fail too; OutOfMemory is a subclass.
        DiskFull: a checkpoint could not be written.
        Breakdown: the location cannot be read or written, or this machine cannot access it, the data or the weights.
    """
    refuse_unseen(job)
    pushed = dict[str, tuple[int, int]]()
    # All other files follow from the last state. Each worker reads its own copy, so machines need not share a disk.
    with outlast_outages(), _disk_errors(), job.kept_at.work_here(LAST) as folder:
        try:
            with contextlib.closing(_train_in(folder, job, device, wait_for_all, first=first)) as reports:
                for report in reports:
                    if first:
                        _push_changed(folder, job, pushed)
                    yield report
        except TrialFailed:
            if first:
                _push_changed(folder, job, pushed)
            raise
        except GeneratorExit:
            # The trial was stopped. The last files are only for TensorBoard.
            if first:
                with contextlib.suppress(Breakdown):
                    _push_changed(folder, job, pushed)
            raise
        if first:
            # Push repaired files of a run that ended before it had pushed all of them.
            _push_changed(folder, job, pushed)


def _train_in(
    folder: Path, job: Job, device: torch.device, wait_for_all: Callable[[], None], *, first: bool
) -> Generator[Report, None, None]:
    """Train from the state in a folder of this machine."""
    config = RunConfig.from_flat(job.settings)
    torch.set_num_threads(job.resources.threads)
    malloc.keep_freed_memory()
    reduce_fragmentation()
    _refuse_broken_gpu(device)
    share = job.resources.gpus_per_worker
    with contextlib.ExitStack() as stack, _training_errors(folder, device, share):
        limit_memory(device, share)
        stack.callback(_free_memory)
        # Momenta of parameters that no longer change decay to denormal numbers, which are slow. Threads of a pool
        # inherit this flag from the thread that creates the pool.
        torch.set_flush_denormal(True)
        stack.callback(torch.set_flush_denormal, False)
        if first:
            folder.mkdir(parents=True, exist_ok=True)
        described = first and not (folder / LAST).exists()
        if described:
            _describe(folder, job)
        events = stack.enter_context(EventWriter(folder)) if first else None
        if events is not None:
            events.write_settings(job.settings)
        store = _open_data(job.store)
        wait_for_all()
        if events is not None:
            # This runs once per trial, when it leaves its process, so no training waits for it.
            stack.callback(write_samples, events, folder, store)
        for report in stack.enter_context(contextlib.closing(_fit(job, config, store, device, folder, wait_for_all))):
            if events is not None:
                if not described:
                    # This comes after the first report, because `fit` may refuse these settings and data.
                    _describe(folder, job)
                    described = True
                events.write_report(report, report["report"])
            yield report


def _refuse_broken_gpu(device: torch.device) -> None:
    """Refuse a machine whose GPU cannot be used: every trial there would fail, and it would soon be free for the next.

    Raises:
        Breakdown: PyTorch cannot use the GPU.
    """
    if device.type != "cuda":
        return
    if why := gpu_fault() or (code_fault(device.index or 0) if torch.cuda.is_available() else "it finds none"):
        raise Breakdown(
            f"{platform.node()}: PyTorch cannot use the GPU of a trial ({why}); repair it, hide it with "
            f"CUDA_VISIBLE_DEVICES, or leave this machine out"
        )


def _describe(folder: Path, job: Job) -> None:
    write_text(folder / PARAMS, json.dumps(job.settings, indent=2) + "\n")
    write_text(folder / DATA, job.store + "\n")


def _fit(
    job: Job, config: RunConfig, store: Store, device: torch.device, folder: Path, wait_for_all: Callable[[], None]
) -> Generator[Report, None, None]:
    """Train as `fit` does. If the checkpoint is damaged and the job may start anew, its reports are repeated."""

    def reports() -> Generator[Report, None, None]:
        return fit(config, store, device=device, folder=folder, resident=job.resident, wait_for_all=wait_for_all)

    try:
        yield from reports()
        return
    except DamagedCheckpointError:
        if not job.may_start_anew:
            raise
        # All workers delete the unreadable files; the first one succeeds.
        for name in (LAST, BEST):
            (folder / name).unlink(missing_ok=True)
    yield from reports()


def _open_data(address: str) -> Store:
    """Open the packed data of a study, which existed when it began.

    Raises:
        Breakdown: this machine cannot access them, so it can train no trial.
    """
    try:
        return open_store(address)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise  # a disk or a server may work again at the next attempt
        raise _not_seen("data", error) from error


def refuse_unseen(job: Job) -> None:
    """Refuse a machine that cannot see the trial's folder: files that are written there would be lost.

    Raises:
        Breakdown: the machine cannot see the mark.
    """
    if job.mark is not None and not (mark := Path(job.mark)).exists():
        raise _not_seen("results", UserError(f"{mark.parent}: there is no {mark.name} in it"))


def _not_seen(what: str, error: UserError) -> Breakdown:
    """Return the error of a machine that cannot access data, weights or results. Every trial there would fail."""
    faults = "; ".join(error.faults)
    return Breakdown(f"{faults}; put the {what} where {platform.node()} can read them, such as a shared folder")


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise DiskFull if a disk is full, such as that of the temporary folders: it is no fault of the trial."""
    try:
        yield
    except OSError as error:
        _raise_of_system(f"{platform.node()}, {error.filename}" if error.filename else platform.node(), error)


@contextlib.contextmanager
def _training_errors(folder: Path, device: torch.device | None = None, share: float = 0.0) -> Iterator[None]:
    """Translate errors of the training into those after which another attempt would fail, and others.

    Args:
        folder: folder of the run.
        device: device of this worker, if it trains.
        share: share of the GPU that it may use.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lack = f"out of memory on the device: {str(error).splitlines()[0]}"
        withheld = 0.0 if device is None or is_of_host(error) else withheld_part(device, share)
        if withheld <= _WITHHELD:
            raise OutOfMemory(lack) from error
        raise GpuTaken(
            f"{platform.node()}: {lack}; other processes hold {withheld:.0%} of what a trial may use of this GPU; end "
            f"them, or leave this machine out"
        ) from error
    except Divergence as error:
        raise TrialFailed(str(error)) from error
    except AbsentWeightsError as error:
        raise _not_seen("weights", error) from error
    except UserError as error:
        # A disk or a server may work again at the next attempt.
        if isinstance(error.__cause__, OSError):
            _raise_of_system(folder, error.__cause__)
        raise InvalidForRun(error.faults) from error
    except (OSError, SafetensorError) as error:
        _raise_of_system(folder, error)


def _raise_of_system(where: object, error: Exception) -> NoReturn:
    if is_disk_full(error):
        raise DiskFull(f"{where}: no space left on the disk") from error
    raise error


def _push_changed(folder: Path, job: Job, pushed: dict[str, tuple[int, int]]) -> None:
    """Push files of a trial's folder that have changed since the last push, in the order in which a run writes them.

    After an interruption, the next attempt repairs missing or older files from `last`.
    """
    stats = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
    states = {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}
    order = [name for name in (PARAMS, DATA, LAST, BEST, HISTORY) if name in states]
    changed = [name for name in dict.fromkeys([*order, *states]) if pushed.get(name) != states[name]]
    job.check_claim()
    job.kept_at.push(folder, changed)
    pushed.update(states)


def newest_report(job: Job) -> Report | None:
    """Return the last report that a trial has written, even if the driver did not receive it; None without one.

    A process that died may have left older files beside its last state. They are repaired first: the driver may end the
    trial at this report, and then reads its history. What it had uploaded in part is deleted.
    """
    with outlast_outages(), _disk_errors(), job.kept_at.work_here(LAST, HISTORY) as folder:
        job.kept_at.delete_parts()
        try:
            progress = read_progress(folder)
        except UserError:
            return None  # the error is raised when the trial continues
        if progress is None or not progress.history:
            return None
        if not _is_complete(folder, progress):
            # An error of `last` is raised when the trial continues.
            with contextlib.suppress(InvalidForRun), _training_errors(folder):
                repair_from_last(folder, progress)
                _push_changed(folder, job, {})
        return progress.history[-1]


def _is_complete(folder: Path, progress: Progress) -> bool:
    """Tell whether the history, which is written after all other files of a report, has the last report."""
    try:
        return len(read_history(folder)) == len(progress.history)
    except UserError:
        return False


def train_with_retry(job: Job, attempt: Callable[[Job], Iterator[Report]]) -> Generator[Report, None, None]:
    """Train. While the device has too little memory, try again with micro-batches of half the size.

    Raises:
        OutOfMemory: the smallest micro-batches also need too much memory.
        Breakdown: so they do, but other processes hold a part of the GPU's memory.
    """
    lack, taken = "", False  # no error, because it keeps the tensors of the failed attempt alive
    while True:
        try:
            yield from attempt(job)
            return
        except OutOfMemory as error:
            smaller, lack, taken = with_smaller_micro_batches(job), str(error), isinstance(error, GpuTaken)
            if smaller is None:
                raise _lack_of_memory(lack, taken=taken) from error
        except InvalidForRun as error:
            # BatchNorm refuses a micro-batch of one row.
            if not lack:
                raise
            raise _lack_of_memory(lack, taken=taken) from error
        job = smaller


def _lack_of_memory(lack: str, *, taken: bool) -> Exception:
    """Return the error of a trial that lacks memory. If others hold it, the trial can continue later."""
    return Breakdown(lack) if taken else OutOfMemory(lack)


def with_smaller_micro_batches(job: Job) -> Job | None:
    """Return the job with micro-batches of half the size, and without images on the GPU; None for one row.

    It needs about half the memory. The effective batch is unchanged, so the optimizer gets the same gradients, except
    for the statistics of BatchNorm.
    """
    if 2 * job.micro_batches > job.settings.get("train.batch_size", TrainConfig().batch_size):
        return None
    settings = {**job.settings, "train.accumulate": 2 * job.accumulate}
    return dataclasses.replace(job, settings=settings, resident=False)


def _free_memory() -> None:
    gc.collect()
    malloc.return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def job_of(study: "OpenStudy", resources: Resources, proposal: "Proposal") -> Job:
    """Make the job of a trial of a study."""
    settings = study.spec.settings(proposal.settings)
    config = RunConfig.from_flat(settings)
    return Job(
        name=f"{proposal.trial_id}_{short_name(config.model.backbone)}_{config.loss.label}",
        folder=str(study.trial_folder(proposal.trial_id).absolute()),
        store=study.spec.stores[config.data.image_size],
        settings=settings,
        resources=resources,
        location=study.copy.of_trial(proposal.trial_id),
        mark=study.mark,
        claim=study.copy.claimed,
        may_start_anew=True,
    )
