"""What one trial is, and how it trains in a process: its checkpoints and its events lie in its own folder.

That folder is a trial's memory: `fit` goes on from the checkpoint in it, so whatever ended a trial before, it is simply
run again. Ray keeps no checkpoint of its own.
"""

import contextlib
import dataclasses
import gc
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.files import write_text
from raytune_emotion.learn.checkpoint import Report
from raytune_emotion.learn.loop import Diverged, fit

PARAMS = "params.json"


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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        return cls(**{**values, "resources": Resources(**values["resources"])})


class TrialFailed(RuntimeError):
    """A trial that would fail again if it were run again: it diverged, or needs more memory than there is."""


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
        TrialFailed: where another attempt would end the same.
    """
    config = RunConfig.from_flat(job.settings)
    folder = Path(job.folder)
    torch.set_num_threads(job.resources.threads)
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / PARAMS, json.dumps(job.settings, indent=2) + "\n")
        writer = stack.enter_context(SummaryWriter(str(folder))) if first else None
        store = open_store(Path(job.store))
        reports = stack.enter_context(contextlib.closing(fit(config, store, device=device, folder=folder)))
        try:
            for report in reports:
                if writer is not None:
                    _write_events(writer, report)
                yield report
        except Diverged as error:
            raise TrialFailed(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise TrialFailed(f"out of memory on the device: {str(error).splitlines()[0]}") from error


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write_events(writer: SummaryWriter, report: Report) -> None:
    for name, value in report.items():
        if isinstance(value, float) and name != "time":
            group, _, metric = name.partition("_")
            writer.add_scalar(f"{group}/{metric}" if group in ("val", "train") else name, value, report["report"])
    writer.flush()
