"""Translate Ray Tune's events into calls of the recorder, and the recorder's answers into Ray Tune's trials."""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Experiment, Trial
from ray.tune.search import SearchAlgorithm

from raytune_emotion.learn.report import DriverReport
from raytune_emotion.tuning.execution.capacity import Capacity, Waiting
from raytune_emotion.tuning.execution.job import Job, with_smaller_micro_batches
from raytune_emotion.tuning.execution.ray_tune_patches import (
    LOW_MEMORY,
    QuietProgress,
    forget_actor,
    make_trial,
    newest_error,
)
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.execution.trial_actor import ENDING, NODES
from raytune_emotion.tuning.study.endings import Failed
from raytune_emotion.tuning.study.optuna_study import Proposal

#: Separator of a trial's id and the number of its stretch. For Ray Tune, a resumed trial is a new one.
_STRETCH = "."
#: Seconds between two checks whether the workers of trials have places.
_COUNT_S = 5.0
#: A process may hang that has not reported for so many seconds, and so many times the longest time between two reports.
_SILENT_S, _SILENT_TIMES = 1800.0, 10


class Search(SearchAlgorithm):
    """Give Ray Tune a trial whenever a place is free, and tell the recorder which trials died.

    Ray's trials have the study's own ids, so that dashboard, logs and folders use the same names.
    """

    def __init__(
        self,
        recorder: Recorder,
        job_of: Callable[[Proposal], Job],
        room: Capacity,
        waiting: Waiting,
        stop: threading.Event,
    ) -> None:
        self._recorder, self._job_of, self._room = recorder, job_of, room
        self._waiting, self._stop = waiting, stop
        self._experiment: Experiment | None = None
        self._running: dict[str, Trial] = {}
        self._stretches: dict[str, int] = {}

    def add_configurations(self, experiments: Any) -> None:
        (self._experiment,) = experiments

    def is_finished(self) -> bool:
        return self._finished or self._recorder.is_over or self._stop.is_set()

    def next_trial(self) -> Trial | None:
        # The policy is asked only when a place is free, so that it knows all ended trials. If nothing runs or waits, it
        # is asked without a place, too, because a cluster may have shrunk to nothing.
        full = len(self._running) >= self._room()
        if self.is_finished() or (full and (self._running or self._recorder.count_open())):
            if not self._running:
                # While there is no trial, Tune only calls this method again and again.
                self._waiting.look(runs=False)
            return None
        proposal = self._recorder.next()
        if proposal is None:
            if self._recorder.waits:
                self._waiting.look(runs=False)
            return None
        trial_id = proposal.trial_id
        self._stretches[trial_id] = self._stretches.get(trial_id, 0) + 1
        if self._stretches[trial_id] > 1:
            trial_id += f"{_STRETCH}{self._stretches[trial_id]}"
        assert self._experiment is not None
        trial = make_trial(self._experiment, trial_id, self._job_of(proposal).to_dict(), proposal.settings)
        self._running[trial_id] = trial
        return trial

    def leaves_node(self, trial_id: str, nodes: Iterable[str]) -> bool:
        """Tell whether one of a running trial's nodes ends soon. If so, the trial's process gets no other trial."""
        leaves = any(map(self._room.is_leaving, nodes))
        if leaves:
            forget_actor(self._running[trial_id])
        return leaves

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass  # `Gate` has handled it

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id)
        if error or result is None:
            job, deaths = Job.from_dict(trial.config), trial.run_metadata.num_failures
            if job.resources.workers > 1:
                from raytune_emotion.tuning.execution.worker_group import release_workers

                release_workers(Path(job.folder))
            reason = f"its process ended {deaths} times without a new report, the last time with: {newest_error(trial)}"
            self._recorder.end(_id_of(trial_id), Failed(reason))


class Gate(tune.Stopper):
    """Handle every result before the rest of Ray Tune does, and stop trials that the recorder ends."""

    def __init__(self, recorder: Recorder, search: Search, stop: threading.Event) -> None:
        self._recorder, self._search, self._stop = recorder, search, stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        leaves_node = self._search.leaves_node(trial_id, result.get(NODES, ()))
        if ENDING in result:
            self._recorder.end(_id_of(trial_id), result[ENDING])
            return True
        goes_on = self._recorder.report(_id_of(trial_id), cast("DriverReport", result))
        if goes_on and leaves_node:
            self._recorder.give_back(_id_of(trial_id))
        return leaves_node or not goes_on

    def stop_all(self) -> bool:
        return bool(self._recorder.broken) or self._stop.is_set()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles this object into a file that is never read.
        return {}


class Recovery(tune.Callback):
    """Continue a trial whose process has died: with smaller micro-batches, if possible, after a lack of memory.

    The count of its deaths starts from 0 again after each new report, because the trial makes progress.
    """

    def __init__(self) -> None:
        self._reports: dict[str, int] = {}  # newest report of each trial

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        # A process that resumes a trial sends its newest report again.
        if result.get("report", 0) > self._reports.get(trial.trial_id, 0):
            self._reports[trial.trial_id] = result["report"]
            trial.run_metadata.num_failures = 0

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        smaller = with_smaller_micro_batches(Job.from_dict(trial.config)) if LOW_MEMORY in newest_error(trial) else None
        if smaller is not None:
            trial.set_config(smaller.to_dict())  # type: ignore[no-untyped-call]


class BetweenEvents(QuietProgress):
    """Write the tables between Tune's events, and tell the user when no trial has room."""

    def __init__(self, recorder: Recorder, waiting: Waiting, count_unplaced: Callable[[], int] = lambda: 0) -> None:
        """Start to watch the trials.

        Args:
            recorder: recorder of the study.
            waiting: tells the user that no trial has room.
            count_unplaced: function that returns how many of Tune's running trials have no places for their workers.
        """
        super().__init__()
        self._recorder, self._waiting, self._count_unplaced = recorder, waiting, count_unplaced
        self._unplaced, self._count_at = 0, time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._recorder.write_in_time()
        if time.monotonic() >= self._count_at:
            self._unplaced, self._count_at = self._count_unplaced(), time.monotonic() + _COUNT_S
        running = sum(trial.status == Trial.RUNNING for trial in trials)
        self._waiting.look(runs=running > self._unplaced)


class Silence(tune.Callback):
    """Tell the user of trials that have not reported for far longer than others: their processes may hang.

    Ray waits for ever for a process that the driver of a GPU, or a file server, holds up. How long a report takes is
    learned from two reports of one process, not from its start: a resumed trial repeats its newest report at once.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._heard: dict[str, float] = {}  # time of the newest report of each running trial, or of its start
        self._places: dict[str, str] = {}  # the process from which that report came
        self._named: set[str] = set()  # trials that were named since that report
        self._longest = 0.0  # longest time between two reports

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forget(trial)
        self._heard[trial.trial_id] = self._clock()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        now, trial_id = self._clock(), trial.trial_id
        if trial_id in self._places:
            self._longest = max(self._longest, now - self._heard[trial_id])
        self._heard[trial_id] = now
        self._places[trial_id] = f" (process {result.get('pid')} on {result.get('host')})"
        self._named.discard(trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forget(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forget(trial)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forget(trial)  # it may wait for a place

    def _forget(self, trial: Trial) -> None:
        self._heard.pop(trial.trial_id, None)
        self._places.pop(trial.trial_id, None)
        self._named.discard(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if not self._longest:
            return  # nobody knows how long a report takes
        now, limit = self._clock(), max(_SILENT_S, _SILENT_TIMES * self._longest)
        silent = {trial_id for trial_id, heard in self._heard.items() if now - heard > limit}
        for trial_id in sorted(silent - self._named):
            self._say(
                f"trial {_id_of(trial_id)}{self._places.get(trial_id, '')} has not reported for "
                f"{(now - self._heard[trial_id]) / 60:.0f} min; the longest time between two reports was "
                f"{self._longest / 60:.1f} min; if its process hangs, end it with `kill -9`, and the trial continues "
                f"from its checkpoint"
            )
        self._named |= silent


def _id_of(ray_trial_id: str) -> str:
    return ray_trial_id.partition(_STRETCH)[0]
