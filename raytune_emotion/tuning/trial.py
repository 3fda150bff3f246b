"""How one trial runs: in its own process, or over several workers of Ray Train. Both train the same `fit`.

A trial's folder is its memory: `fit` goes on from the checkpoint that lies in it, so whatever ended a trial before, it
is simply run again. Ray keeps no checkpoint of its own.
"""

import contextlib
import dataclasses
import gc
import json
import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train, tune
from ray._raylet import PlacementGroupID
from ray.actor import ActorHandle
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.queue import Empty, Queue
from torch.utils.tensorboard import SummaryWriter

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.files import write_text
from raytune_emotion.learn.checkpoint import Report, read_history
from raytune_emotion.learn.loop import Diverged, fit
from raytune_emotion.tuning.searcher import OBJECTIVE

PARAMS = "params.json"
PLACEMENT_GROUP = "placement_group"


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
    store: str
    settings: dict[str, Any]
    resources: Resources
    max_failures: int  # of its workers, before the trial fails

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        return cls(**{**values, "resources": Resources(**values["resources"])})


class TrialFailed(RuntimeError):
    """A trial that would fail again if it were run again: it diverged, or needs more memory than there is."""


def run(job: Job) -> Generator[Report, None, None]:
    """Trains a job, or goes on with it, and yields its reports; closing the iterator ends all that it started.

    Raises:
        TrialFailed: where another attempt would end the same.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PARAMS, json.dumps(job.settings, indent=2) + "\n")
    return _run_here(job) if job.resources.workers == 1 else _run_on_workers(job)


def _run_here(job: Job) -> Generator[Report, None, None]:
    torch.set_num_threads(job.resources.threads)
    yield from _fit(job, torch.device("cuda" if job.resources.gpus_per_worker else "cpu"))


def _run_on_workers(job: Job) -> Generator[Report, None, None]:
    release_workers(Path(job.folder))  # of an attempt whose driver was killed
    messages = Queue(actor_options={"num_cpus": 0})
    gpu = job.resources.gpus_per_worker > 0
    trainer = TorchTrainer(
        train_loop_per_worker=_work,
        train_loop_config={"job": job.to_dict(), "messages": messages},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=job.resources.workers, use_gpu=gpu, resources_per_worker=job.resources.per_worker
        ),
        run_config=train.RunConfig(
            name=job.name,
            storage_path=str(Path(job.folder) / "ray_train"),
            failure_config=train.FailureConfig(max_failures=job.max_failures),
            callbacks=[_Introduce(messages, job.folder)],
        ),
    )
    # `fit` blocks until the training is over, and the reports are wanted while it goes on.
    training = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray-train").submit(trainer.fit)
    controller: ActorHandle | None = None
    try:
        while not (training.done() and messages.empty()):
            try:
                message = messages.get(timeout=0.2)
            except Empty:
                continue
            if isinstance(message, ActorHandle):
                controller = message
            elif isinstance(message, str):
                raise TrialFailed(message)
            else:
                yield message
        training.result()
    finally:
        if controller is not None and not training.done():
            # The controller leaves in the call, which is how it says that it is done.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(controller.abort.remote(), timeout=5)
        release_workers(Path(job.folder))
        messages.shutdown(force=True)


class _Introduce(ControllerCallback, WorkerGroupCallback):
    """Makes known, from within Ray Train's controller, what must be ended when a trial is stopped.

    Ray Train frees the workers of a run whose driver is gone by a detached actor that asks the dashboard: seconds late
    where there is one, never where there is none.
    """

    def __init__(self, messages: Queue, folder: str) -> None:
        self._messages = messages
        self._folder = Path(folder)

    def after_controller_start(self, train_run_context: object) -> None:
        self._messages.put(ray.get_runtime_context().current_actor)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        write_text(self._folder / PLACEMENT_GROUP, group.id.hex())


def release_workers(folder: Path) -> None:
    """Frees the workers of a trial, with all they hold, whatever has become of the process that drove them."""
    file = folder / PLACEMENT_GROUP
    if file.exists():
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # of a cluster that is no more
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(file.read_text())))
        file.unlink(missing_ok=True)


def _work(config: dict[str, Any]) -> None:
    """What each worker of a trial does."""
    job = Job.from_dict(config["job"])
    torch.set_num_threads(job.resources.threads)
    first = train.get_context().get_world_rank() == 0
    try:
        for report in _fit(job, get_device(), events=first):
            if first:
                config["messages"].put(report)
    except TrialFailed as error:
        config["messages"].put(str(error))
        raise


def _fit(job: Job, device: torch.device, *, events: bool = True) -> Generator[Report, None, None]:
    """`fit`, with TensorBoard events in the trial's folder, and the failures that are final named as such."""
    config = RunConfig.from_flat(job.settings)
    folder = Path(job.folder)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(SummaryWriter(str(folder))) if events else None
        reports = stack.enter_context(
            contextlib.closing(fit(config, open_store(Path(job.store)), device=device, folder=folder))
        )
        try:
            for report in reports:
                if writer is not None:
                    _write_events(writer, report)
                yield report
        except Diverged as error:
            raise TrialFailed(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise TrialFailed(f"out of memory on the device: {str(error).splitlines()[0]}") from error


def _write_events(writer: SummaryWriter, report: Report) -> None:
    for name, value in report.items():
        if isinstance(value, float) and name != "time":
            group, _, metric = name.partition("_")
            writer.add_scalar(f"{group}/{metric}" if group in ("val", "train") else name, value, report["report"])
    writer.flush()


class TrialActor(tune.Trainable):
    """The process that runs trials for Ray Tune, one after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        self._job = Job.from_dict(config)
        self._reports = run(self._job)

    def step(self) -> dict[str, Any]:
        """Trains until the next report, which is the result; a trial that fails for good ends with the reason."""
        try:
            report = next(self._reports)
        except StopIteration:
            # The folder holds a training that had ended, and whose ending was not heard.
            report = read_history(Path(self._job.folder))[-1]
        except TrialFailed as error:
            return {"failed": str(error), OBJECTIVE: math.inf, "done": True}
        return {**report, "done": report["finished"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._reports.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
