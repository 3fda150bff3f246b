"""Train trials in an actor of Ray Tune, one after the other: each call trains until the next report.

This module, and what it imports, is all that such a process needs: neither Ray Tune nor Optuna, pandas or scipy.
"""

import os
import platform
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
    train_here,
    train_with_retry,
    with_smaller_micro_batches,
)
from raytune_emotion.tuning.study.endings import Broken, Failed

if TYPE_CHECKING:
    from raytune_emotion.tuning.execution.worker_group import Workers

#: The key of a result that has no report, but says how the trial ended.
ENDING = "ending"
#: The key of the id of the node that the process runs on.
NODE = "node"


class TrialActor:
    """Train in this process, or drive workers that train together. Imports, maps and devices are kept.

    Ray Tune calls `train`, `reset`, `stop` and `get_auto_filled_metrics`, as of its own `Trainable`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._workers: Workers | None = None
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._job = Job.from_dict(config)
        self._written: Report | None = None  # the newest report of those who ran the trial before
        self._reports = self._train()
        print(f"trial {self._job.name}", flush=True)  # in this process's log, which the dashboard shows

    def __repr__(self) -> str:
        # The dashboard asks once, when the process starts, and many trials run in it: it is named for what stays.
        return f"trials of {Path(self._job.folder).parent.parent.name}"

    def train(self) -> dict[str, Any]:
        """Train until the next report, which is the result; what ends a trial for good is a result too."""
        try:
            report = next(self._reports)
        except TrialFailed as error:
            return {ENDING: Failed(str(error)), NODE: self._node}
        except Breakdown as error:
            return {ENDING: Broken(str(error)), NODE: self._node}
        heard = {name: value for name, value in report.items() if name in DRIVER_KEYS}
        return {"pid": os.getpid(), "host": platform.node(), NODE: self._node, **heard}

    def reset(self, config: dict[str, Any]) -> bool:
        """Leave the trial, and begin with another."""
        self._reports.close()
        self._begin(config)
        return True

    def stop(self) -> None:
        self._reports.close()
        self._close_workers()

    def get_auto_filled_metrics(self, debug_metrics_only: bool) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def _train(self) -> Generator[Report, None, None]:
        # A process may have died after it wrote a report and before that was heard; to hear it twice does no harm.
        self._written = written = newest_report(self._job)
        if written is not None and not written["finished"]:
            yield written
        yield from train_with_retry(self._job_that_fits(), self._attempt)
        # Nothing was left to train: that the trial had ended was not heard.
        if written is not None:
            yield written

    def _job_that_fits(self) -> Job:
        """Return the job with micro-batches as small as those of its newest report, where memory has run out before it.

        A job begins with those of its configuration, whoever ran it before. With more workers they may be small enough.
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
            # A configuration that has trained is valid, so the machine is at fault. But where memory has run out, its
            # micro-batches may have become too small.
            if self._written is None or job.accumulate > self._job_that_fits().accumulate:
                raise
            raise Breakdown(
                f"trial {job.name} has trained before, and {platform.node()} refuses it now: {'; '.join(error.faults)}"
            ) from error

    def _train_together(self, job: Job) -> Generator[Report, None, None]:
        if self._workers is None:
            # Imported for several workers alone: Ray Train takes a second and 100 MB.
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
