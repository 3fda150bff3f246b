"""Stop trials early and for good: ASHA, Hyperband, the median rule."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from raytune_emotion.learn.report import OBJECTIVE, Heard
from raytune_emotion.tuning.policy.decisions import Recorded
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective

#: One trial of so many passes a rung.
_REDUCTION = 3
_ROUNDING = 1e-9
#: Trials that the median is taken of, at least.
_PEERS = 5


class Scheduler(Protocol):
    """Say after every report whether a trial goes on."""

    def keeps(self, trial_id: str, report: Heard) -> bool:
        """Answer for a new report of a trial that has not reached its last epoch."""


class Halving:
    """Stop the worse two thirds of the trials at each of some rungs, on the best validation JS.

    A trial is compared with those that reached the rung before it (Li et al., 2020, A System for Massively Parallel
    Hyperparameter Tuning, algorithm 2, stopping variant). The clock is the epoch: trials may report a different number
    of times in an epoch.
    """

    def __init__(self, rungs: Sequence[float], objective: Objective = JS_ALONE) -> None:
        """Make a scheduler without a past.

        Args:
            rungs: epochs at which trials are compared, in their order.
            objective: of the study. For a front, trials are compared with those of about their cost alone: beside
                large models every small one would be stopped.
        """
        self._rungs, self._objective = tuple(rungs), objective
        self._group_of: dict[str, int] = {}
        self._reached: dict[tuple[int, float], dict[str, float]] = {}  # best JS by group and rung, and by trial

    def keeps(self, trial_id: str, report: Heard) -> bool:
        # By its first report, since a rate that varies must not move the trial.
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

    def _group(self, report: Heard) -> int:
        """Tell apart trials by every doubling of their cost, where the objective is a front."""
        if self._objective.cost is None or not self._objective.front:
            return 0
        return math.floor(math.log2(self._objective.cost(report)))


class Hyperband:
    """Halve in brackets that begin at different rungs, since nobody knows how early the order of trials is settled.

    The asynchronous form of Hyperband (Li et al., 2018), in which each trial belongs to a bracket by its id.
    """

    def __init__(self, rungs: Sequence[float], objective: Objective = JS_ALONE) -> None:
        """Make a scheduler without a past; for the arguments see `Halving`."""
        self._brackets = [Halving(rungs[first:], objective) for first in range(len(rungs) + 1)]
        # Brackets cost about the same: the earlier one stops, the more trials it takes.
        self._trials = [_REDUCTION**left / (left + 1) for left in range(len(rungs), -1, -1)]

    def keeps(self, trial_id: str, report: Heard) -> bool:
        place = zlib.crc32(trial_id.encode()) / 2**32 * sum(self._trials)
        bracket = int(np.searchsorted(np.cumsum(self._trials), place, side="right"))
        return self._brackets[min(bracket, len(self._brackets) - 1)].keeps(trial_id, report)


class Median:
    """Stop a trial whose best validation JS is worse than the median of the others at its epoch.

    After Golovin et al., 2017, Google Vizier, section 3.2.2, with the best value in place of the mean.
    """

    def __init__(self, first: float) -> None:
        """Make a scheduler without a past, that stops no trial before its first epochs."""
        self._first = first
        self._reached: dict[float, dict[str, float]] = {}  # best JS by epoch and trial

    def keeps(self, trial_id: str, report: Heard) -> bool:
        peers = self._reached.setdefault(round(report["epoch"], 6), {})
        best = float(report[OBJECTIVE])
        others = [value for other, value in peers.items() if other != trial_id]
        peers[trial_id] = best
        early = report["epoch"] < self._first - _ROUNDING or len(others) < _PEERS
        return early or best <= float(np.median(others))


class RunToEnd:
    """Stop no trial."""

    def keeps(self, trial_id: str, report: Heard) -> bool:
        return True


def rungs_of(epochs: float, first: float | None = None) -> list[float]:
    """Return a rung at the first epochs and at each threefold of them, before the last epoch.

    Where no first epochs are given, they are a ninth, but at least one: before, the order of trials says little of
    their order at the end, as the recorded curves show (`benchmarks/curves`).
    """
    first = max(1.0, epochs / _REDUCTION**2) if first is None else first
    rungs = []
    while first < epochs - _ROUNDING:
        rungs.append(first)
        first *= _REDUCTION
    return rungs


#: Of the epochs of a full trial and the objective: what stops trials, by the names that `--scheduler` takes.
STOPPING: dict[str, Callable[[float, Objective], Scheduler]] = {
    "asha": lambda epochs, objective: Halving(rungs_of(epochs), objective),
    "hyperband": lambda epochs, objective: Hyperband(rungs_of(epochs), objective),
    "median": lambda epochs, objective: Median(min(1.0, epochs)),
    "none": lambda epochs, objective: RunToEnd(),
}


def replay(scheduler: Scheduler, trials: Sequence[Recorded]) -> set[str]:
    """Have a scheduler without a past hear all reports in the order of time.

    Returns:
        The running trials that it does not let go on: they were stopped when the study broke off.
    """
    running = {trial.trial_id: trial.reports[-1] for trial in trials if trial.status == "running" and trial.reports}
    reports = [(report, trial.trial_id) for trial in trials for report in trial.reports]
    stopped = set()
    for report, trial_id in sorted(reports, key=lambda item: float(item[0]["time"])):
        # A trial with later reports was allowed to go on at the time: some older reports had not been heard yet.
        if not scheduler.keeps(trial_id, report) and report is running.get(trial_id):
            stopped.add(trial_id)
    return stopped
