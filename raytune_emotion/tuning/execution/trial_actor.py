"""Train trials in a Ray Tune actor, one after the other: each call trains until the next report.

Such a process needs only this module and its imports: not Ray Tune, Optuna, pandas or scipy.
"""

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.report import DRIVER_KEYS, Report
from raytune_emotion.tuning.execution.job import (
    InvalidForRun,
    Job,
    TrialFailed,
    newest_report,
    refuse_unseen,
    train_here,
    train_with_retry,
    with_smaller_micro_batches,
)
from raytune_emotion.tuning.execution.worker_nodes import resources_here
from raytune_emotion.tuning.study.endings import Broken, Failed

if TYPE_CHECKING:
    from raytune_emotion.tuning.execution.worker_group import Workers

#: Key of the trial's ending in a result that has no report.
ENDING = "ending"
#: Key of the ids of the nodes on which the trial trains.
NODES = "nodes"


class TrialActor:
    """Train in this process, or drive workers that train together. Imports, mapped files and devices are kept.

    Ray Tune calls `train`, `reset`, `stop` and `get_auto_filled_metrics`, as for its own `Trainable`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._workers: Workers | None = None
        self._answered: float | None = None  # unix time of the newest answer
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        job = Job.from_dict(config)
        alone = job.resources.workers == 1
        self._job = dataclasses.replace(job, resources=resources_here(job.resources)) if alone else job
        self._written: Report | None = None  # newest report of earlier attempts at the trial
        self._free_since = self._answered  # until the first new report of the trial; None: the process has just started
        self._reports = self._train()
        with contextlib.suppress(OSError):  # the disk of the log may be full
            print(f"trial {self._job.name}", flush=True)  # in this process's log, which the dashboard shows

    def __repr__(self) -> str:
        # The dashboard asks only once, when the process starts, but many trials run in it. So the name is the study's.
        return f"trials of {Path(self._job.folder).parent.parent.name}"

    def train(self) -> dict[str, Any]:
        """Train until the next report, and return it as the result. An error that ends the trial is also a result."""
        try:
            return self._next()
        finally:
            self._answered = time.time()

    def _next(self) -> dict[str, Any]:
        try:
            report = next(self._reports)
        except TrialFailed as error:
            return {ENDING: Failed(str(error)), NODES: self._nodes}
        except Breakdown as error:
            return {ENDING: Broken(str(error)), NODES: self._nodes}
        heard = {name: value for name, value in report.items() if name in DRIVER_KEYS}
        if (resumed_in := self._resumed_in(report)) is not None:
            heard["resumed_in"] = resumed_in
        return {"pid": os.getpid(), "host": platform.node(), NODES: self._nodes, **heard}

    def _resumed_in(self, report: Report) -> float | None:
        """Return how long this process trained nothing before it resumed the trial: it waited, and read a checkpoint.

        None if it has just started, or if this is not the first new report since the trial was resumed.
        """
        written, since = self._written, self._free_since
        if report is written:
            return None
        self._free_since = None
        if written is None or since is None or report["report"] != written["report"] + 1:
            return None
        # The clocks of machines may differ. With several workers, the cost contains the write of a checkpoint.
        at = report["time"] if self._workers is None else time.time()
        began = at - (report["seconds"] - written["seconds"])
        return max(0.0, began - since)

    @property
    def _nodes(self) -> list[str]:
        return [self._node] if self._workers is None else self._workers.nodes

    def reset(self, config: dict[str, Any]) -> bool:
        """Leave the trial, and begin another one."""
        self._reports.close()
        self._begin(config)
        return True

    def stop(self) -> None:
        self._reports.close()
        self._close_workers()

    def get_auto_filled_metrics(self, debug_metrics_only: bool) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def _train(self) -> Generator[Report, None, None]:
        if self._job.resources.workers > 1:
            from raytune_emotion.tuning.execution.worker_group import release_workers

            release_workers(Path(self._job.folder))  # they may still write, though their driver was killed
        # A process may have died after it wrote a report and before the driver received it. A repeated report does no
        # harm.
        self._written = written = newest_report(self._job)
        if written is not None and not written["finished"]:
            yield written
        yield from train_with_retry(self._job_that_fits(), self._attempt)
        # The trial had already ended, but the driver had not received its last report.
        if written is not None:
            yield written

    def _job_that_fits(self) -> Job:
        """Return the job with micro-batches as small as in its newest report, if memory ran out before that report.

        A new attempt begins with the micro-batches of the configuration. With more workers they may be small enough.
        """
        job, written = self._job, self._written
        if written is None or written["accumulate"] <= job.accumulate:
            return job
        while job.micro_batches < written["workers"] * written["accumulate"]:
            smaller = with_smaller_micro_batches(job)
            if smaller is None:
                break
            job = smaller
        return job

    def _attempt(self, job: Job) -> Generator[Report, None, None]:
        try:
            yield from train_here(job) if job.resources.workers == 1 else self._train_together(job)
        except InvalidForRun as error:
            # A configuration that has trained before is valid, so the machine is at fault. But after memory ran out,
            # its micro-batches may have become too small.
            if self._written is None or job.accumulate > self._job_that_fits().accumulate:
                raise
            raise Breakdown(
                f"trial {job.name} has trained before, but {platform.node()} refuses it now: {'; '.join(error.faults)}"
            ) from error

    def _train_together(self, job: Job) -> Generator[Report, None, None]:
        refuse_unseen(job)  # each worker does so too, but this process makes folders before
        if self._workers is None:
            # Imported only for several workers, because Ray Train takes a second and 100 MB.
            from raytune_emotion.tuning.execution.worker_group import Workers

            self._workers = Workers(job)
        try:
            yield from self._workers.train(job)
        except TrialFailed:
            self._close_workers()
            raise

    def _close_workers(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None
