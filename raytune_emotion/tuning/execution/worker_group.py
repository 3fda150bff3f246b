"""Train trials on several workers together, in one Ray Train run for many trials.

A Ray Train run starts about ten processes and takes half a minute of a core, far more than a short trial. Therefore the
workers stay alive, and train one trial after the other on request. Only a failed trial ends them.
"""

import contextlib
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train.torch import TorchConfig, get_device
from ray.train.v2.api.config import RunConfig, ScalingConfig
from ray.util.queue import Empty, Queue

from raytune_emotion.errors import Breakdown
from raytune_emotion.known_errors import in_one_line
from raytune_emotion.learn.device import reduce_fragmentation
from raytune_emotion.learn.report import Report
from raytune_emotion.storage.atomic import scratch_folder, write_text
from raytune_emotion.terminal import count
from raytune_emotion.tuning.execution.job import (
    DiskFull,
    GpuTaken,
    InvalidForRun,
    Job,
    OutOfMemory,
    TrialFailed,
    WorkersDied,
    train_on,
)
from raytune_emotion.tuning.execution.ray_patches import free_abandoned_groups, remove_group
from raytune_emotion.tuning.execution.ray_train_patches import (
    CONTROLLER,
    PLACE,
    Announcer,
    Controller,
    LoopbackConfig,
    PlainTrainer,
    Preparer,
)
from raytune_emotion.tuning.execution.worker_nodes import label_selector, live_nodes, resources_here
from raytune_emotion.tuning.study.endings import MAX_FAILURES

PLACEMENT_GROUP = "placement_group"
#: Longest wait for the end of the workers, seconds.
_ABORT_S = 5.0
#: Seconds between two searches for places that dead drivers have left, while this one has no place.
_FREE_S = 5.0
#: Longest wait for another worker within a step, seconds. A longer wait, as after a GPU error, ends all workers.
_COLLECTIVE_S = 600
#: Longest wait between two steps: for the next order, as the driver may be busy between two trials, and for the data
#: and the weights of another worker, whose machine may still fetch them. If that worker fails, Ray Train ends all.
_ORDER_WAIT = timedelta(days=7)

_GO_ON, _STOP = "go on", "stop"
#: Kinds of messages about a trial. Their contents: a report; nothing; the name and the arguments of an error.
_REPORT, _DONE, _FAILED = "report", "done", "failed"
_ERRORS = {error.__name__: error for error in (TrialFailed, InvalidForRun, OutOfMemory, GpuTaken, DiskFull, Breakdown)}


class Workers:
    """The workers of one driver: `train` runs a trial on them, `close` ends them."""

    def __init__(self, first: Job, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Start the workers for a first job.

        Args:
            first: the job.
            while_waiting: called continually while the cluster has no room for the workers.
        """
        self._while_waiting = while_waiting
        self._orders = Queue(actor_options={"num_cpus": 0})
        self._messages = Queue(actor_options={"num_cpus": 0})
        self._scratch = Path(first.folder) / "ray_train"
        # Not in the trial's folder, because PyTorch interprets the path as a URL.
        self._ending = contextlib.ExitStack()
        self._meeting = self._ending.enter_context(scratch_folder()) / "meeting"
        self._controller: Controller | None = None
        self._placement_group = ""
        self._free_at = time.monotonic()
        self.nodes: list[str] = []  # ids of the workers' nodes
        resources = first.resources
        gpu = resources.gpus_per_worker > 0
        # Ray Train also accepts internal callbacks, although its annotation does not say so.
        callbacks: list[Any] = [Announcer(self._messages), Preparer(reduce_fragmentation)]
        trainer = PlainTrainer(
            train_loop_per_worker=_work,
            train_loop_config={"orders": self._orders, "messages": self._messages},
            # A single worker does not use NCCL, whose thread would access the GPU while a CUDA graph is captured.
            torch_config=self._torch_config("nccl" if gpu and resources.workers > 1 else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=gpu,
                resources_per_worker=resources.per_worker,
                placement_strategy="PACK",  # on one node, if one has room for all of them
                label_selector=label_selector(live_nodes(), off_gpus=resources.off_gpus) or None,
            ),
            # Ray Train does not restart the workers. The caller does, and counts failures per trial.
            run_config=RunConfig(name=first.name, storage_path=str(self._scratch), callbacks=callbacks),
        )
        # `fit` blocks until the workers have ended.
        self._run = run_in_background(trainer.fit)

    def _torch_config(self, backend: str) -> TorchConfig:
        """Return how the workers connect. If no other machine can join, no other machine can reach them either."""
        if not ip_address(ray.util.get_node_ip_address()).is_loopback:  # type: ignore[no-untyped-call]
            return TorchConfig(backend=backend, timeout_s=_COLLECTIVE_S)
        return LoopbackConfig(backend=backend, timeout_s=_COLLECTIVE_S, meeting=str(self._meeting))

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
            while (report := self._receive(job)) is not None:
                yield report
                self._orders.put(_GO_ON)
        except GeneratorExit:
            self._orders.put(_STOP)
            while self._receive(job) is not None:
                pass
            raise
        finally:
            (Path(job.folder) / PLACEMENT_GROUP).unlink(missing_ok=True)

    def close(self) -> None:
        """End the workers at once, and free their resources."""
        deadline = time.monotonic() + _ABORT_S
        while self._controller is None and not self._run.done() and time.monotonic() < deadline:
            with contextlib.suppress(Empty):
                self._note(*self._messages.get(timeout=0.1))
        if self._controller is not None and not self._run.done():
            self._controller.abort(_ABORT_S)
        # The thread must not be inside Ray when this process leaves Ray.
        wait([self._run], timeout=_ABORT_S)
        if self._placement_group:
            remove_group(self._placement_group)
        for queue in (self._orders, self._messages):
            queue.shutdown(force=True)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._ending.close()

    def _receive(self, job: Job) -> Report | None:
        """Return the next report of a trial; None: it has ended."""
        while True:
            try:
                kind, content = self._messages.get(timeout=0.2)
            except Empty:
                if self._run.done():
                    self._run.result()
                    raise RuntimeError("the workers have ended by themselves") from None
                if not self._placement_group:
                    if time.monotonic() >= self._free_at:
                        free_abandoned_groups()
                        self._free_at = time.monotonic() + _FREE_S
                    self._while_waiting()
                continue
            if kind == _FAILED:
                name, arguments = content
                raise _ERRORS[name](*arguments)
            if kind in (_REPORT, _DONE):
                return cast("Report | None", content)
            self._note(kind, content)
            self._note_placement_group(job)

    def _note(self, kind: str, content: Any) -> None:
        """Remember a message about the workers themselves."""
        if kind == CONTROLLER:
            self._controller = Controller(content)
        elif kind == PLACE:
            self._placement_group, self.nodes = content

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


def train_together(job: Job, while_waiting: Callable[[], None] = lambda: None) -> Generator[Report, None, None]:
    """Train one job on new workers. If a worker dies, continue from the last checkpoint.

    Args:
        job: the job.
        while_waiting: called continually while the cluster has no room for the workers.

    Raises:
        WorkersDied: workers died more often than `MAX_FAILURES` without a new report.
        TrialFailed: another attempt would fail too, for another reason.
    """
    failures = newest = 0
    while True:
        workers = Workers(job, while_waiting)
        try:
            with contextlib.closing(workers.train(job)) as reports:
                for report in reports:
                    if report["report"] > newest:
                        failures, newest = 0, report["report"]
                    yield report
            return
        except train.TrainingFailedError as error:
            failures += 1
            if failures > MAX_FAILURES:
                why = next(iter(getattr(error, "worker_failures", {}).values()), error)
                raise WorkersDied(
                    f"its workers died {count(failures, 'time')} without a new report ({in_one_line(why)})"
                ) from error
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
    ordered = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_ORDER_WAIT))

    def heard() -> Any:
        return _broadcast(orders.get() if first else None, ordered, first=first)

    def wait_for_all() -> None:
        dist.barrier(ordered)

    while True:
        job = Job.from_dict(heard())
        job = dataclasses.replace(job, resources=resources_here(job.resources))
        try:
            training = train_on(job, get_device(), first=first, wait_for_all=wait_for_all)
            with contextlib.closing(training) as reports:
                for report in reports:
                    if first:
                        messages.put((_REPORT, report))
                    if heard() == _STOP:
                        break
        except (TrialFailed, Breakdown) as error:
            kind, arguments = cast("tuple[type, tuple[Any, ...]]", error.__reduce__()[:2])
            messages.put((_FAILED, (kind.__name__, arguments)))
            raise
        if first:
            messages.put((_DONE, None))


def _broadcast(value: Any, group: dist.ProcessGroup, *, first: bool) -> Any:
    """Return the plain value of the first worker on all of them.

    It is sent as JSON: PyTorch would pickle an object, and does not check who is at the other end of its sockets.
    """
    text = json.dumps(value).encode()
    size_1 = torch.tensor([len(text)])
    dist.broadcast(size_1, src=0, group=group)
    text_N = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    text_N = text_N if first else torch.empty(int(size_1), dtype=torch.uint8)
    dist.broadcast(text_N, src=0, group=group)
    return json.loads(text_N.numpy().tobytes())
