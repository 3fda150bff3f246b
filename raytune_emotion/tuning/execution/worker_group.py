"""Several workers that train trials together: one run of Ray Train, which stays from trial to trial.

A run takes some ten processes and half a minute of a core to start, far more than a short trial. So its workers stay,
and train one trial after the other as they are told; only one that fails takes them down.
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
    Controller,
    Introduce,
    PlainTrainer,
    Reserved,
    free_abandoned,
    remove_group,
)
from raytune_emotion.tuning.study.endings import MAX_FAILURES

PLACEMENT_GROUP = "placement_group"
_ABORT_S = 5.0
#: So long workers wait for one of them within a step. Whatever keeps one longer, as an error of its GPU, ends them all.
_COLLECTIVE_S = 600
#: So long they wait for the next order: a driver may be busy between two trials, and a study may pause.
_ORDER_WAIT = timedelta(days=7)

_GO_ON, _STOP, _DONE = "go on", "stop", "done"


@dataclasses.dataclass(frozen=True)
class _Failed:
    """The trial has failed, and how."""

    error: TrialFailed | Breakdown


class Workers:
    """The workers of one driver. `train` runs a trial on them; `close` ends them."""

    def __init__(self, first: Job) -> None:
        self._orders = Queue(actor_options={"num_cpus": 0})
        self._messages = Queue(actor_options={"num_cpus": 0})
        self._scratch = Path(first.folder) / "ray_train"
        self._controller: Controller | None = None
        self._placement_group = ""
        resources = first.resources
        gpu = resources.gpus_per_worker > 0
        # Ray Train takes internal callbacks too, which its annotation does not say.
        callbacks: list[Any] = [Introduce(self._messages)]
        trainer = PlainTrainer(
            train_loop_per_worker=_work,
            train_loop_config={"orders": self._orders, "messages": self._messages},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_COLLECTIVE_S),
            scaling_config=ScalingConfig(
                num_workers=resources.workers, use_gpu=gpu, resources_per_worker=resources.per_worker
            ),
            # It does not restart its workers: whoever runs the trial does, and counts for each trial by itself.
            run_config=RunConfig(name=first.name, storage_path=str(self._scratch), callbacks=callbacks),
        )
        # `fit` blocks until the workers have ended.
        self._run = in_background(trainer.fit)

    def train(self, job: Job) -> Generator[Report, None, None]:
        """Trains a job on the workers and yields its reports; closing the generator stops the trial.

        Raises:
            TrialFailed: where another attempt would end the same.
            ray.train.TrainingFailedError: a worker has died. After either the workers are gone.
        """
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        release_workers(Path(job.folder))  # of an attempt whose driver was killed
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
        """Ends the workers and frees what they hold, at once."""
        deadline = time.monotonic() + _ABORT_S
        while self._controller is None and not self._run.done() and time.monotonic() < deadline:
            with contextlib.suppress(Empty):
                self._note(self._messages.get(timeout=0.1))
        if self._controller is not None and not self._run.done():
            self._controller.abort(_ABORT_S)
        # Its thread must not be within Ray when Ray is left.
        wait([self._run], timeout=_ABORT_S)
        if self._placement_group:
            remove_group(self._placement_group)
        for queue in (self._orders, self._messages):
            queue.shutdown(force=True)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _receive(self, job: Job) -> Any:
        """The next message about a trial."""
        while True:
            try:
                message = self._messages.get(timeout=0.2)
            except Empty:
                if self._run.done():
                    self._run.result()
                    raise RuntimeError("the workers have ended by themselves") from None
                if not self._placement_group:
                    free_abandoned()
                continue
            if isinstance(message, _Failed):
                raise message.error
            if not self._note(message):
                return message
            self._note_placement_group(job)

    def _note(self, message: object) -> bool:
        """Remembers what is said of the workers themselves; False for what is said of a trial."""
        if isinstance(message, Controller):
            self._controller = message
        elif isinstance(message, Reserved):
            self._placement_group = message.placement_group
        else:
            return False
        return True

    def _note_placement_group(self, job: Job) -> None:
        # In the trial's folder: whoever takes the trial up when this process was killed can free the place.
        if self._placement_group:
            write_text(Path(job.folder) / PLACEMENT_GROUP, self._placement_group)


def in_background(action: Callable[[], Any]) -> Future[Any]:
    """Run an action in a thread that does not keep the process alive: Ray Train may never come back from an abort."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return future


def train_together(job: Job, max_failures: int = MAX_FAILURES) -> Generator[Report, None, None]:
    """Trains one job on workers of its own, and goes on from its checkpoint when one of them dies.

    Raises:
        TrialFailed: where another attempt would end the same.
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
    """Frees the workers that a trial's folder tells of, with all they hold; their driver was killed."""
    file = folder / PLACEMENT_GROUP
    if file.exists():
        remove_group(file.read_text(encoding="utf-8"))
        file.unlink(missing_ok=True)


def _work(config: dict[str, Any]) -> None:
    """What each worker does: trains one trial after the other, in step with the others."""
    orders, messages = config["orders"], config["messages"]
    first = train.get_context().get_world_rank() == 0
    # Not by NCCL, which takes a long wait for an order for a hang, and kills the workers.
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
            messages.put(_Failed(error))
            raise
        if first:
            messages.put(_DONE)
