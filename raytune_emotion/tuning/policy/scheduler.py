"""Stop trials early: asynchronous successive halving with one rung."""

import math
from collections.abc import Sequence

import numpy as np

from raytune_emotion.learn.report import OBJECTIVE, Heard
from raytune_emotion.tuning.policy.decisions import Decision, Recorded
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective

#: One trial of so many passes the rung.
_REDUCTION = 3
_ROUNDING = 1e-9


class Halving:
    """Stop the worse two thirds of the trials at a third of their length, on the best validation JS.

    Before a third, the order of trials says little of their order at the end, as the recorded curves show
    (`benchmarks/curves`). A trial is compared with those that reached the rung before it (Li et al., 2020, A System for
    Massively Parallel Hyperparameter Tuning, algorithm 2, stopping variant). The clock is the epoch: trials may report
    a different number of times in an epoch.
    """

    def __init__(self, epochs: float, objective: Objective = JS_ALONE) -> None:
        """Make a scheduler without a past.

        Args:
            epochs: of a trial that is not stopped.
            objective: of the study. For a front, trials are compared with those of about their cost alone: beside
                large models every small one would be stopped.
        """
        self._rung = epochs / _REDUCTION - _ROUNDING
        self._objective = objective
        self._group_of: dict[str, int] = {}
        self._reached: dict[int, dict[str, float]] = {}  # best JS at the rung, by group and trial

    def decide(self, trial_id: str, report: Heard) -> Decision:
        # By its first report, since a rate that varies must not move the trial.
        peers = self._reached.setdefault(self._group_of.setdefault(trial_id, self._group(report)), {})
        if report["epoch"] < self._rung or trial_id in peers:
            return "go on"
        best = float(report[OBJECTIVE])
        worse = bool(peers) and best > float(np.percentile([*peers.values()], 100 / _REDUCTION))
        peers[trial_id] = best
        return "stop" if worse else "go on"

    def replay(self, trials: Sequence[Recorded]) -> set[str]:
        running = {trial.trial_id: trial.reports[-1] for trial in trials if trial.status == "running" and trial.reports}
        reports = [(report, trial.trial_id) for trial in trials for report in trial.reports]
        stopped = set()
        for report, trial_id in sorted(reports, key=lambda item: float(item[0]["time"])):
            # A trial with later reports was allowed to go on at the time: some older reports had not been heard yet.
            if self.decide(trial_id, report) == "stop" and report is running.get(trial_id):
                stopped.add(trial_id)
        return stopped

    def _group(self, report: Heard) -> int:
        """Tell apart trials by every doubling of their cost, where the objective is a front."""
        if self._objective.cost is None or not self._objective.front:
            return 0
        return math.floor(math.log2(self._objective.cost(report)))


class RunToEnd:
    """Stop no trial."""

    def decide(self, trial_id: str, report: Heard) -> Decision:
        return "go on"

    def replay(self, trials: Sequence[Recorded]) -> set[str]:
        return set()
