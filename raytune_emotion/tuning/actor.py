"""The process that runs trials for Ray Tune, one after the other."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ray import tune

from raytune_emotion.learn.checkpoint import Report, read_history
from raytune_emotion.tuning.searcher import OBJECTIVE
from raytune_emotion.tuning.trial import Job, TrialFailed, train_here
from raytune_emotion.tuning.workers import Workers


class TrialActor(tune.Trainable):
    """Trains in its own process, or drives workers that train together. Imports, maps and devices stay warm."""

    _workers: Workers | None = None

    def setup(self, config: dict[str, Any]) -> None:
        self._job = Job.from_dict(config)
        self._reports = self._train()

    def step(self) -> dict[str, Any]:
        """Trains until the next report, which is the result; a trial that fails for good ends with the reason."""
        try:
            report = next(self._reports)
        except StopIteration:
            # The folder holds a training that had ended, and whose ending was not heard.
            report = read_history(Path(self._job.folder))[-1]
        except TrialFailed as error:
            self._close_workers()
            return {"failed": str(error), OBJECTIVE: math.inf, "done": True}
        return {**report, "done": report["finished"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._reports.close()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._reports.close()
        self._close_workers()

    def _train(self) -> Generator[Report, None, None]:
        if self._job.resources.workers == 1:
            return train_here(self._job)
        if self._workers is None:
            self._workers = Workers(self._job)
        return self._workers.train(self._job)

    def _close_workers(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None
