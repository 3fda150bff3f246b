"""Follow a running study by its events: what its trials do now, and what it has reached."""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from raytune_emotion.interruption import run_in_thread
from raytune_emotion.learn.report import OBJECTIVE, DriverReport
from raytune_emotion.storage.locations import files_below
from raytune_emotion.tuning.execution.recorder import Event
from raytune_emotion.tuning.report.summary import BestTrial, Summary, count_statuses, per_hour, summarize, time_left
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import ENDED, Proposal, Status
from raytune_emotion.tuning.study.records import best_js_steps

#: Between two looks at the disk: a study may have thousands of files.
_DISK_S = 10.0


@dataclasses.dataclass(frozen=True)
class TrialAtWork:
    """A trial that a process trains now."""

    proposal: Proposal
    since: float  # when it was given to a process, in seconds of the session
    report: DriverReport | None  # None before its first evaluation here
    worker: str  # host and process; empty before the first evaluation


@dataclasses.dataclass(frozen=True)
class Disk:
    """What a study takes of its disk, and what is free there, in bytes."""

    used: int | None  # None until it is known
    free: int | None  # None if it is not known


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A running study at one moment."""

    summary: Summary
    epochs: int  # of a trial that is not stopped
    session_seconds: float  # since this process began to run trials
    seconds_left: float | None  # see `time_left`
    budget_left: float | None  # seconds of the time budget; None without one
    at_work: tuple[TrialAtWork, ...]  # in the order of their start

    @property
    def ended(self) -> int:
        return sum(self.summary.trials[status] for status in ENDED)

    @property
    def end_in(self) -> float | None:
        """Return in how many seconds the study, or its time budget, is expected to end; None where it is not known."""
        known = [seconds for seconds in (self.seconds_left, self.budget_left) if seconds is not None]
        return min(known, default=0.0) or None


class StudyProgress:
    """Know how a running study stands. One thread may report events while another asks for snapshots."""

    def __init__(
        self,
        study: OpenStudy,
        *,
        time_budget: timedelta | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what earlier sessions have reached."""
        records = study.records()
        self._folder, self._spec = study.folder, study.spec
        self._earlier = summarize(study, records, now=time.time(), name=study.folder.name)
        self._clock, self._began = clock, clock()
        self._budget = time_budget.total_seconds() if time_budget is not None else None
        # The pause between two sessions is left out of the time.
        times = [seconds for seconds, _ in self._earlier.best_js_by_time]
        self._before = times[-1] if times else 0.0
        steps = zip(times, best_js_steps(records), strict=True)
        self._points = [(seconds, js, trial_id) for seconds, (_, js, trial_id) in steps]
        # What is called running at the start runs only once this session takes it up.
        self._states: dict[str, Status] = {r.trial_id: r.status for r in records if r.status != "running"}
        self._reached = {
            r.trial_id: BestTrial(
                r.trial_id, r.status, r.best["val_js"], r.best["epoch"], self._spec.settings_now(r.settings)
            )
            for r in records
            if r.counts and r.best
        }
        if self._earlier.best is not None:  # it may have ended before the study went on with more epochs
            self._reached[self._earlier.best.trial_id] = self._earlier.best
        self._at_work: dict[str, TrialAtWork] = {}
        self._epochs = {r.trial_id: r.reports[-1]["epoch"] for r in records if r.reports}  # trained of each trial
        self._first: float | None = None  # when the first trial of this session began, in its seconds
        self._gain = self._earlier.expected_gain
        # The free space alone is known at once.
        self._disk, self._disk_due = Disk(None, free_space(study.folder)), clock()
        self._has_looked = threading.Event()
        self._has_looked.set()
        self._lock = threading.Lock()

    def watch(self, event: Event) -> None:
        """Take in what happened to a trial."""
        with self._lock:
            self._take_in(event)

    def _take_in(self, event: Event) -> None:
        trial_id, now = event.proposal.trial_id, self._clock() - self._began
        self._first = now if self._first is None else self._first
        if event.status != "running":
            self._gain = event.gain
        self._states[trial_id] = event.status
        if event.report is not None:
            self._epochs[trial_id] = event.report["epoch"]
            self._reach(event.proposal, event.status, event.report, now)
        if event.status == "running":
            before = self._at_work.get(trial_id)
            since = before.since if before else now
            self._at_work[trial_id] = TrialAtWork(event.proposal, since, event.report, event.worker)
            return
        self._at_work.pop(trial_id, None)
        if event.status == "failed":  # it is never the best
            self._reached.pop(trial_id, None)
            self._points = [point for point in self._points if point[2] != trial_id]

    def _reach(self, proposal: Proposal, status: Status, report: DriverReport, now: float) -> None:
        trial_id, js = proposal.trial_id, report[OBJECTIVE]
        known = self._reached.get(trial_id)
        if known is None or js < known.val_js:
            settings = self._spec.settings_now(proposal.settings)
            self._reached[trial_id] = BestTrial(trial_id, status, js, report["epoch"], settings)
        if not self._points or js < self._points[-1][1]:
            self._points.append((self._before + now, js, trial_id))

    def disk(self) -> Disk:
        """Return what the study takes of its disk, as it was a few seconds ago.

        A thread looks for it: on a shared disk, that may take long, and the recorder of the trials waits for the view.
        """
        if self._has_looked.is_set() and self._clock() >= self._disk_due:
            self._has_looked = run_in_thread("disk", self._look_at_disk)
        return self._disk

    def _look_at_disk(self) -> None:
        with contextlib.suppress(OSError):  # a server may fail for a moment
            self._disk = disk_of(self._folder)
        self._disk_due = self._clock() + _DISK_S

    def snapshot(self) -> Snapshot:
        """Return how the study stands now."""
        with self._lock:
            return self._snapshot(self._clock())

    def _snapshot(self, now: float) -> Snapshot:
        session, counts = now - self._began, count_statuses(self._states.values())
        best = min(self._reached.values(), key=lambda b: (b.val_js, b.trial_id), default=None)
        points = [(seconds, js) for seconds, js, _ in self._points]
        if best is not None:
            points.append((self._before + session, best.val_js))
        active = self._earlier.active_seconds + (session - self._first if self._first is not None else 0.0)
        ended = sum(counts[status] for status in ENDED)
        under_way = (
            min(1.0, self._epochs.get(trial_id, 0.0) / self._spec.epochs)
            for trial_id, status in self._states.items()
            if status not in ENDED
        )
        summary = dataclasses.replace(
            self._earlier,
            trials=counts,
            best=best,
            elapsed_seconds=self._before + session,
            active_seconds=active,
            trials_per_hour=per_hour(ended, active),
            best_js_by_time=points,
            expected_gain=self._gain,
            expected_gain_per_hour=self._gain.per_hour if self._gain is not None else None,
        )
        return Snapshot(
            summary,
            self._spec.epochs,
            session,
            time_left(self._earlier.trials_planned, ended, under_way, active),
            max(0.0, self._budget - session) if self._budget is not None else None,
            tuple(self._at_work.values()),
        )


def disk_of(folder: Path) -> Disk:
    """Look at what a folder takes of its disk. Files may come and go meanwhile."""
    used = 0
    for file in files_below(folder):
        with contextlib.suppress(OSError):
            used += file.stat().st_size
    return Disk(used, free_space(folder))


def free_space(folder: Path) -> int | None:
    """Return the free space of a folder's disk, bytes; None if it cannot be found out."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
