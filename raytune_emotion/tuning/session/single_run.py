"""Train one configuration, and print its results."""

import contextlib
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console

from raytune_emotion.config import RunConfig
from raytune_emotion.data.cores import usable_cores
from raytune_emotion.data.store import Store
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.interruption import check_interrupted, finish_block, keep_error
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.evaluation import baseline
from raytune_emotion.learn.export_folder import check_replaceable, publish_export, write_package
from raytune_emotion.learn.report import Report
from raytune_emotion.learn.run_folder import BEST, LAST
from raytune_emotion.storage.atomic import LOCK, FolderLock, exclusive_lock
from raytune_emotion.storage.locations import Location, parent_of
from raytune_emotion.storage.remote import outlast_outages
from raytune_emotion.terminal import count, plain_console, shell_word, typed_command, typed_options, warn
from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost, iterate_watched
from raytune_emotion.tuning.execution.job import (
    InvalidForRun,
    Job,
    TrialFailed,
    WorkersDied,
    train_here,
    train_with_retry,
)
from raytune_emotion.tuning.execution.placement import Demand
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.remote_copy import TAKEN_OVER, RemoteCopy
from raytune_emotion.tuning.study.trials import refuse_taken


@dataclass(frozen=True)
class Workers:
    """The processes that train."""

    count: int
    gpus_per_worker: float | None  # None: 1 if there are GPUs
    address: str | None  # of a cluster; None: this machine


class TrainingFailed(Breakdown):
    """Report that a training failed, and would fail again."""

    def __init__(self, run: Location, reason: str, advice: str = "") -> None:
        super().__init__(f"{run}: the training failed: {reason}{advice}")
        self.reason = reason


def train_single(
    run: Location, config: RunConfig, store: Store, workers: Workers, *, fresh: bool, advise: bool = True
) -> None:
    """Train at a location, export the best weights, and print the next commands.

    Args:
        run: location of the run.
        config: configuration of the run.
        store: training data.
        workers: processes that train.
        fresh: whether the run is new, so that its location is empty, and is emptied if the run has no checkpoint.
        advise: whether to print the command that continues an interrupted run; otherwise the caller does it.

    Raises:
        UserError: the configuration and the data do not fit together, another run has taken the location, or its
            export holds other files.
        TrainingFailed: the training failed, and another attempt would fail, too.
        Breakdown: the training broke off.
        KeyboardInterrupt: it was interrupted; the best weights so far are exported.
    """
    console = plain_console()
    check_replaceable(run / "best")
    images = f"{len(store.train)} training and {count(len(store.val), 'validation image')}"
    console.print(f"run {run}: {images}")
    copy, ended = RemoteCopy(run.working_folder(), run), None
    # The folder is locked until the export is written.
    with _lock_folder(copy) as lock, _new_run(copy, lock) if fresh else contextlib.nullcontext():
        try:
            if workers.count == 1 and workers.address is None:
                gpus = workers.gpus_per_worker
                gpus = float(torch.cuda.is_available()) if gpus is None else gpus
                resources = Resources(1, float(min(usable_cores(), torch.get_num_threads())), gpus)
                _train(console, copy, lock, config, store.address, resources, train_here)
            else:
                _train_on_cluster(console, workers, copy, lock, config, store.address)
        except (KeyboardInterrupt, ClusterLost) as why:
            ended = why
        with keep_error(ended), finish_block():
            _conclude(console, run, store, ended, workers, advise=advise)


@contextlib.contextmanager
def _lock_folder(copy: RemoteCopy) -> Iterator[FolderLock]:
    """Lock the working folder of a run. The lock is claimed only when the training begins."""
    with contextlib.ExitStack() as held:
        try:
            copy.folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(exclusive_lock(copy.folder))
        except OSError as error:
            raise Breakdown(f"{copy}: the training broke off: {error}") from error
        yield lock


def _conclude(
    console: Console, run: Location, store: Store, ended: BaseException | None, workers: Workers, *, advise: bool
) -> None:
    """Export the best weights so far, and print the next commands."""
    if ended is not None and run.sizes([BEST]) == [None]:
        console.print("the run ended before its first evaluation; nothing is kept")
        return
    with publish_export(run / "best") as package, run.copy_here(BEST) as folder:
        kept = read_best(folder / BEST)
        write_package(package, kept, store=store)
    best, mean = kept.report, baseline(store)
    resume = f"{typed_command('train')} --resume" + typed_options(
        results=parent_of(run),
        name=run.typed_name,
        workers=workers.count if workers.count > 1 else None,
        gpus_per_worker=workers.gpus_per_worker,
        address=workers.address,
    )
    console.print(
        f"""
best JS     {best["val_js"]:.4f} bits (KL {best["val_kl"]:.4f} nats, accuracy {best["val_accuracy"]:.3f})
baseline    {mean["js"]:.4f} bits, predicting the training mean
exported    {run / "best"}

next: {typed_command("predict")} {shell_word(str(run / "best"))} FACE.jpg"""
        + (f"\nto continue: {resume}" if ended is not None and advise else "")
    )


def _train_on_cluster(
    console: Console, workers: Workers, copy: RemoteCopy, lock: FolderLock, config: RunConfig, store: str
) -> None:
    # Imported only if needed, because Ray Train takes a second and 100 MB.
    from raytune_emotion.tuning.execution.capacity import Capacity, Waiting
    from raytune_emotion.tuning.execution.ray_patches import count_waiting_groups
    from raytune_emotion.tuning.execution.worker_group import train_together

    with ray_session(workers.address) as cluster:
        place = fit_to_cluster(Demand(workers.count, workers.gpus_per_worker, concurrency=1))

        def train(job: Job) -> Generator[Report, None, None]:
            with contextlib.closing(Capacity(place, lambda: 1, warn)) as room:
                waiting = Waiting(lambda: warn(room.shortage()))

                def look() -> None:
                    check_interrupted()
                    room()
                    waiting.look(runs=not count_waiting_groups())

                yield from train_together(job, look)

        def together(job: Job) -> Iterator[Report]:
            return iterate_watched(train(job), cluster)

        _train(console, copy, lock, config, store, place.resources, together)


def _train(
    console: Console,
    copy: RemoteCopy,
    lock: FolderLock,
    config: RunConfig,
    store: str,
    resources: Resources,
    train: Callable[[Job], Iterator[Report]],
) -> None:
    # As in a study at a URI, the training itself pushes its files, and this process only watches over them.
    run = copy.location
    try:
        if not lock.claim():
            raise Breakdown(f"{run}: {TAKEN_OVER}")
        copy.claim()
        shared = copy.mark(LOCK), copy.claimed
        job = Job(run.name, str(copy.folder), store, config.to_flat(), resources, run.address, *shared)
        trained = False
        with outlast_outages():
            for report in train_with_retry(job, train):
                trained = True
                copy.check_driver()
                if not lock.is_held():
                    raise Breakdown(f"{run}: {TAKEN_OVER}")
                console.print(
                    f"epoch {report['epoch']:5.2f}  train {report['train_loss']:.4f}  JS {report['val_js']:.4f}  "
                    f"best {report['best_val_js']:.4f}  lr {report['lr']:.2g}  "
                    f"{report['images_per_second']:.0f} images/s"
                )
        if not trained:
            console.print("nothing was trained: the run had used up its epochs or its patience before")
    except InvalidForRun as error:
        raise UserError(error.faults) from None
    except WorkersDied as error:
        advice = "; find out why in Ray's logs, then continue with --resume"
        raise TrainingFailed(run, str(error), advice) from error
    except TrialFailed as error:
        raise TrainingFailed(run, str(error)) from None
    except OSError as error:
        raise Breakdown(f"{run}: the training broke off: {error}") from error


@contextlib.contextmanager
def _new_run(copy: RemoteCopy, lock: FolderLock) -> Iterator[None]:
    """Delete the files of a new run after the block if it has no checkpoint, so that its name is free.

    They are kept if another process has taken over, because they are of that process.

    Raises:
        UserError: another run has taken the name since it was checked.
    """
    run = copy.location
    refuse_taken(run)
    try:
        yield
    finally:
        # If the location does not answer, its files stay, and an error of the block stays the one that is raised.
        with contextlib.suppress(Breakdown):
            if run.sizes([LAST]) == [None] and lock.is_held() and not copy.failure():
                run.delete(run.find("*"))
                shutil.rmtree(copy.folder, ignore_errors=True)
