"""Stop trials early and for good: ASHA, Hyperband, the median rule."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from raytune_emotion.learn.report import OBJECTIVE, DriverReport
from raytune_emotion.tuning.policy.decisions import Recorded
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective

#: Reduction factor: one of this number of trials passes a rung.
_REDUCTION = 3
#: Tolerance of comparisons between epochs.
_ROUNDING = 1e-9
#: Smallest number of other trials for the median.
_PEERS = 5


class Scheduler(Protocol):
    """Decide after every report whether a trial continues."""

    def keeps(self, trial_id: str, report: DriverReport) -> bool:
        """Answer for a new report of a trial that has not reached its last epoch."""


class Halving:
    """Stop the worse two thirds of the trials at each rung, by the best validation JS.

    A trial is compared with the trials that reached the rung earlier (Li et al., 2020, A System for Massively Parallel
    Hyperparameter Tuning, algorithm 2, stopping variant). Rungs are measured in epochs, because trials may differ in
    the number of reports per epoch.
    """

    def __init__(self, rungs: Sequence[float], objective: Objective = JS_ALONE) -> None:
        """Make a scheduler without a past.

        Args:
            rungs: epochs at which trials are compared, in ascending order.
            objective: objective of the study. For a front, trials are compared only with trials of similar cost:
                compared with large models, every small model would be stopped.
        """
        self._rungs, self._objective = tuple(rungs), objective
        self._group_of: dict[str, int] = {}
        self._reached: dict[tuple[int, float], dict[str, float]] = {}  # best JS by group and rung, and by trial

    def keeps(self, trial_id: str, report: DriverReport) -> bool:
        # The group follows from the first report, because a varying cost must not move a trial.
        group = self._group_of.setdefault(trial_id, self._group(report))
        passed = [rung for rung in self._rungs if report["epoch"] >= rung - _ROUNDING]
        if not passed:
            return True
        peers = self._reached.setdefault((group, passed[-1]), {})
        if trial_id in peers:
            return True
        best = float(report[OBJECTIVE])
        worse = bool(peers) and best > float(np.percentile([*peers.values()], 100 / _REDUCTION))
        peers[trial_id] = best
        return not worse

    def _group(self, report: DriverReport) -> int:
        """Return the group of a trial: for a front, one group per doubling of the cost."""
        if self._objective.cost is None or not self._objective.front:
            return 0
        return math.floor(math.log2(self._objective.cost(report)))


class Hyperband:
    """Halve in brackets that begin at different rungs, because it is unknown how early the order of trials is final.

    This is the asynchronous form of Hyperband (Li et al., 2018). The id of a trial determines its bracket.
    """

    def __init__(self, rungs: Sequence[float], objective: Objective = JS_ALONE) -> None:
        """Make a scheduler without a past; for the arguments see `Halving`."""
        self._brackets = [Halving(rungs[first:], objective) for first in range(len(rungs) + 1)]
        # All brackets cost about the same: a bracket that stops earlier gets more trials.
        self._trials = [_REDUCTION**left / (left + 1) for left in range(len(rungs), -1, -1)]

    def keeps(self, trial_id: str, report: DriverReport) -> bool:
        place = zlib.crc32(trial_id.encode()) / 2**32 * sum(self._trials)
        bracket = int(np.searchsorted(np.cumsum(self._trials), place, side="right"))
        return self._brackets[min(bracket, len(self._brackets) - 1)].keeps(trial_id, report)


class Median:
    """Stop a trial whose best validation JS is worse than the median of the others at the same epoch.

    After Golovin et al., 2017, Google Vizier, section 3.2.2, with the best value instead of the mean.
    """

    def __init__(self, first: float) -> None:
        """Make a scheduler without a past, which stops no trial before `first` epochs."""
        self._first = first
        self._reached: dict[float, dict[str, float]] = {}  # best JS by epoch and trial

    def keeps(self, trial_id: str, report: DriverReport) -> bool:
        peers = self._reached.setdefault(round(report["epoch"], 6), {})
        best = float(report[OBJECTIVE])
        others = [value for other, value in peers.items() if other != trial_id]
        peers[trial_id] = best
        early = report["epoch"] < self._first - _ROUNDING or len(others) < _PEERS
        return early or best <= float(np.median(others))


class RunToEnd:
    """Stop no trial."""

    def keeps(self, trial_id: str, report: DriverReport) -> bool:
        return True


def rungs_of(epochs: float) -> list[float]:
    """Return rungs at the first epochs and at each threefold of the previous rung, before the last epoch.

    The first rung is at a ninth of the epochs, but at least at one. At earlier epochs, the order of trials says little
    about their final order, as the recorded curves show (`benchmarks/curves`).
    """
    rung, rungs = max(1.0, epochs / _REDUCTION**2), []
    while rung < epochs - _ROUNDING:
        rungs.append(rung)
        rung *= _REDUCTION
    return rungs


#: Scheduler factories by `--scheduler` name; arguments: epochs of a full trial, objective.
STOPPING: dict[str, Callable[[float, Objective], Scheduler]] = {
    "asha": lambda epochs, objective: Halving(rungs_of(epochs), objective),
    "hyperband": lambda epochs, objective: Hyperband(rungs_of(epochs), objective),
    "median": lambda epochs, objective: Median(min(1.0, epochs)),
    "none": lambda epochs, objective: RunToEnd(),
}


def replay(scheduler: Scheduler, trials: Sequence[Recorded]) -> set[str]:
    """Pass all reports to a new scheduler in the order of time.

    The history of a trial that continues another one begins with the reports of that trial, which count once.

    Returns:
        The running trials that it stops: they were stopped, but not recorded so, when the study was interrupted.
    """
    running = {trial.trial_id: trial.reports[-1] for trial in trials if trial.status == "running" and trial.reports}
    reports = [(report, trial.trial_id) for trial in trials for report in trial.reports]
    stopped, had = set(), set()
    # The order of trials is kept among equal times, so the copy of a report comes second.
    for report, trial_id in sorted(reports, key=lambda item: float(item[0]["time"])):
        key = report["time"], report["report"]
        if key in had:
            continue
        had.add(key)
        # A trial with later reports was allowed to continue then, because some older reports had not arrived yet.
        if not scheduler.keeps(trial_id, report) and report is running.get(trial_id):
            stopped.add(trial_id)
    return stopped
