"""Train trials on several workers together, in one Ray Train run for many trials.

A Ray Train run starts about ten processes and takes half a minute of a core, far more than a short trial. Therefore the
workers stay alive, and train one trial after the other on request. Only a failed trial ends them.
"""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from ray import train
from ray.train.torch import TorchConfig, get_device
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.util.queue import Empty, Queue

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.report import Report
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.execution.job import Job, TrialFailed, train_on
from raytune_emotion.tuning.execution.ray_train_patches import (
    Announcer,
    Controller,
    PlainTrainer,
    ReservedPlaces,
    free_abandoned_groups,
    remove_group,
)
from raytune_emotion.tuning.study.endings import MAX_FAILURES

PLACEMENT_GROUP = "placement_group"
#: Longest wait for the end of the workers, seconds.
_ABORT_S = 5.0
#: Longest wait for another worker within a step, seconds. A longer wait, as after a GPU error, ends all workers.
_COLLECTIVE_S = 600
#: Longest wait for the next order. The driver may be busy between two trials.
_ORDER_WAIT = timedelta(days=7)

_GO_ON, _STOP, _DONE = "go on", "stop", "done"


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Message: the trial has failed with this error."""

    error: TrialFailed | Breakdown


class Workers:
    """The workers of one driver: `train` runs a trial on them, `close` ends them."""

    def __init__(self, first: Job) -> None:
        self._orders = Queue(actor_options={"num_cpus": 0})
        self._messages = Queue(actor_options={"num_cpus": 0})
        self._scratch = Path(first.folder) / "ray_train"
        self._controller: Controller | None = None
        self._placement_group = ""
        resources = first.resources
        gpu = resources.gpus_per_worker > 0
        # Ray Train also accepts internal callbacks, although its annotation does not say so.
        callbacks: list[Any] = [Announcer(self._messages)]
        trainer = PlainTrainer(
            train_loop_per_worker=_work,
            train_loop_config={"orders": self._orders, "messages": self._messages},
            # A single worker does not use NCCL, whose thread would access the GPU while a CUDA graph is captured.
            torch_config=TorchConfig(
                backend="nccl" if gpu and resources.workers > 1 else "gloo", timeout_s=_COLLECTIVE_S
            ),
            scaling_config=ScalingConfig(
                num_workers=resources.workers, use_gpu=gpu, resources_per_worker=resources.per_worker
            ),
            # Ray Train does not restart the workers. The caller does, and counts failures per trial.
            run_config=RunConfig(name=first.name, storage_path=str(self._scratch), callbacks=callbacks),
        )
        # `fit` blocks until the workers have ended.
        self._run = run_in_background(trainer.fit)

    def train(self, job: Job) -> Generator[Report, None, None]:
        """Train a job on the workers and yield its reports. Close the generator to stop the trial.

        Raises:
            TrialFailed: another attempt would fail too.
            ray.train.TrainingFailedError: a worker has died. After either error the workers are gone.
        """
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        release_workers(Path(job.folder))  # workers of an attempt whose driver was killed
        self._note_placement_group(job)
        self._orders.put(job.to_dict())
        try:
            while (message := self._receive(job)) != _DONE:
                yield message
                self._orders.put(_GO_ON)
        except GeneratorExit:
            self._orders.put(_STOP)
            while self._receive(job) != _DONE:
                pass
            raise
        finally:
            (Path(job.folder) / PLACEMENT_GROUP).unlink(missing_ok=True)

    def close(self) -> None:
        """End the workers at once, and free their resources."""
        deadline = time.monotonic() + _ABORT_S
        while self._controller is None and not self._run.done() and time.monotonic() < deadline:
            with contextlib.suppress(Empty):
                self._note(self._messages.get(timeout=0.1))
        if self._controller is not None and not self._run.done():
            self._controller.abort(_ABORT_S)
        # The thread must not be inside Ray when this process leaves Ray.
        wait([self._run], timeout=_ABORT_S)
        if self._placement_group:
            remove_group(self._placement_group)
        for queue in (self._orders, self._messages):
            queue.shutdown(force=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _receive(self, job: Job) -> Any:
        """Return the next message about a trial."""
        while True:
            try:
                message = self._messages.get(timeout=0.2)
            except Empty:
                if self._run.done():
                    self._run.result()
                    raise RuntimeError("the workers have ended by themselves") from None
                if not self._placement_group:
                    free_abandoned_groups()
                continue
            if isinstance(message, _Failure):
                raise message.error
            if not self._note(message):
                return message
            self._note_placement_group(job)

    def _note(self, message: object) -> bool:
        """Remember a message about the workers themselves. Return False for a message about a trial."""
        if isinstance(message, Controller):
            self._controller = message
        elif isinstance(message, ReservedPlaces):
            self._placement_group = message.placement_group
        else:
            return False
        return True

    def _note_placement_group(self, job: Job) -> None:
        # The note is in the trial's folder: if this process is killed, the process that resumes the trial can free the
        # resources.
        if self._placement_group:
            write_text(Path(job.folder) / PLACEMENT_GROUP, self._placement_group)


def run_in_background(action: Callable[[], Any]) -> Future[Any]:
    """Run an action in a thread that does not keep the process alive, because Ray Train may hang after an abort."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return future


def train_together(job: Job, max_failures: int = MAX_FAILURES) -> Generator[Report, None, None]:
    """Train one job on new workers. If a worker dies, continue from the last checkpoint.

    Raises:
        TrialFailed: another attempt would fail too.
        ray.train.TrainingFailedError: workers died more often than `max_failures`.
    """
    for failures in range(max_failures + 1):
        workers = Workers(job)
        try:
            yield from workers.train(job)
        except train.TrainingFailedError:
            if failures == max_failures:
                raise
        else:
            return
        finally:
            workers.close()


def release_workers(folder: Path) -> None:
    """End workers whose driver was killed, by the placement group noted in a trial's folder."""
    file = folder / PLACEMENT_GROUP
    if file.exists():
        remove_group(file.read_text(encoding="utf-8"))
        file.unlink(missing_ok=True)


def _work(config: dict[str, Any]) -> None:
    """Run in each worker: train one trial after the other, in step with the other workers."""
    orders, messages = config["orders"], config["messages"]
    first = train.get_context().get_world_rank() == 0
    # Orders do not use NCCL, which takes a long wait for a hang, and kills the workers.
    ordered = dist.new_group(backend="gloo", timeout=_ORDER_WAIT)

    def heard() -> Any:
        order = [orders.get() if first else None]
        dist.broadcast_object_list(order, group=cast("dist.ProcessGroup", ordered))
        return order[0]

    while True:
        job = Job.from_dict(heard())
        try:
            with contextlib.closing(train_on(job, get_device(), first=first)) as reports:
                for report in reports:
                    if first:
                        messages.put(report)
                    if heard() == _STOP:
                        break
        except (TrialFailed, Breakdown) as error:
            messages.put(_Failure(error))
            raise
        if first:
            messages.put(_DONE)
