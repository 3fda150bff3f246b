"""The process that runs trials for Ray Tune, one after the other."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ray import tune

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.report import HEARD, OBJECTIVE, Report
from raytune_emotion.tuning.execution.job import Job, OutOfMemory, TrialFailed, halved, newest_report, train_here
from raytune_emotion.tuning.execution.worker_group import Workers

# Tune wants the metric of the schedulers in every result.
_ENDED = {OBJECTIVE: math.inf, "done": True}


class TrialActor(tune.Trainable):
    """Trains in its own process, or drives workers that train together. Imports, maps and devices stay warm."""

    _workers: Workers | None = None

    def setup(self, config: dict[str, Any]) -> None:
        self._job = Job.from_dict(config)
        self._reports = self._train()
        print(f"trial {self._job.name}", flush=True)  # in this process's log, which the dashboard shows

    def __repr__(self) -> str:
        # The dashboard asks once, when the process starts, and many trials run in it: it is named for what stays.
        return f"trials of {Path(self._job.folder).parent.parent.name}"

    def step(self) -> dict[str, Any]:
        """Trains until the next report, which is the result; what ends a trial for good is a result too."""
        try:
            report = next(self._reports)
        except TrialFailed as error:
            return {"failed": str(error), **_ENDED}
        except Breakdown as error:
            return {"breakdown": str(error), **_ENDED}
        return {name: report[name] for name in HEARD} | {"done": report["finished"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._reports.close()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._reports.close()
        self._close_workers()

    def _train(self) -> Generator[Report, None, None]:
        # A process may have died after it wrote a report and before that was heard; to hear it twice does no harm.
        written = newest_report(self._job)
        if written is not None and not written["finished"]:
            yield written
        yield from self._attempts()
        # Nothing was left to train: that the trial had ended was not heard.
        if written is not None:
            yield written

    def _attempts(self) -> Generator[Report, None, None]:
        try:
            yield from self._attempt(self._job)
            return
        except OutOfMemory:
            smaller = halved(self._job)
            if smaller is None:
                raise
        # Not within the handler, for as long as that lasts the failed attempt's tensors live: its frames have them.
        yield from self._attempt(smaller)

    def _attempt(self, job: Job) -> Generator[Report, None, None]:
        if job.resources.workers == 1:
            yield from train_here(job)
            return
        if self._workers is None:
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
