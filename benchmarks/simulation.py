"""Run a study in simulated time: each report comes at the time at which a worker would have reached it.

The classes are those of real studies: `Searcher` asks and tells Optuna, and a policy decides after every report and for
every free place. Only the training is replayed.
"""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.tuning.policy.decisions import Decision, Limits, Prune
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.study.optuna_study import Proposal, Status
from raytune_emotion.tuning.study.trials import trial_id_of

#: Function from a trial's settings to its value at each report, and the seconds since the previous report, [R] each.
Respond = Callable[[Mapping[str, Any]], tuple[Floats, Floats]]
#: Number of paused trials that keep their checkpoints, as in a real study.
LIMITS = Limits(new=True, paused=32)


class Driver(Protocol):
    """The interface of a `Searcher`: it asks for trials, and gets their reports."""

    def ask(self, limits: Limits) -> Proposal | Prune | None: ...
    def resume(self, trial_id: str, *, to_train: bool = True) -> Proposal: ...
    def observe(self, trial_id: str, report: Any) -> bool: ...
    def decide(self, trial_id: str, report: Any, limits: Limits) -> Decision: ...
    def pause(self, trial_id: str, seconds: float) -> None: ...
    def tell(self, trial_id: str, status: Status, *, reason: str = "", seconds: float | None = None) -> None: ...


@dataclass(frozen=True)
class Found:
    """The results of a simulated study."""

    seconds: Floats  # times at which the best value decreased
    best: Floats  # best value from each of these times on
    begun: Floats  # times at which its trials began

    def at(self, seconds: float, before: float = 1.0) -> float:
        """Return the best value at a time; before the first report `before`, by default the worst JS."""
        number = int(np.searchsorted(self.seconds, seconds + 1e-9, side="right"))
        return float(self.best[number - 1]) if number else before

    def until(self, value: float) -> float:
        """Return the time at which a value was reached; infinity if it was not."""
        reached = np.flatnonzero(self.best <= value)
        return float(self.seconds[reached[0]]) if len(reached) else math.inf


class Simulation:
    """A study on simulated workers."""

    def __init__(
        self,
        driver: Driver,
        respond: Respond,
        workers: int,
        take_up_s: float = 0.0,
        limits: Callable[[], Limits] = lambda: LIMITS,
    ) -> None:
        """Make a study that has not begun.

        Args:
            driver: driver of the study.
            respond: function that returns the curve of a trial.
            workers: number of workers, each of which trains one trial.
            take_up_s: cost of resuming a paused trial, seconds.
            limits: function that returns the present limits of the study.
        """
        self._driver, self._respond = driver, respond
        self._workers, self._take_up_s, self._limits = workers, take_up_s, limits
        self._curves: dict[str, tuple[Floats, Floats]] = {}
        self.reports: dict[str, int] = {}  # number of reports of each trial, by its id
        self._events: list[tuple[float, int, str]] = []
        self._order = 0
        self._resumed: set[str] = set()  # trials without a report since they were resumed
        self._begun_count: list[float] = []

    def run(self, seconds: float, goal: float = math.inf, longer: float = 0.0) -> Found:
        """Run until a time; if a goal is not reached then, until it is reached or a longer time is over."""
        times, bests = [], [math.inf]
        self._fill(0.0)
        while self._events:
            if self._events[0][0] > (seconds if bests[-1] <= goal else max(seconds, longer)) + 1e-9:
                break
            now, _, trial_id = heapq.heappop(self._events)
            value = self._report(now, trial_id)
            if value < bests[-1]:
                times.append(now)
                bests.append(value)
            self._fill(now)
        return Found(np.array(times), np.array(bests[1:]), np.array(self._begun_count))

    def _fill(self, now: float) -> None:
        """Give every free place to a trial."""
        while len(self._events) < self._workers:
            answer = self._driver.ask(self._limits())
            if answer is None:
                return
            if isinstance(answer, Prune):
                trial_id = trial_id_of(answer.number)
                self._driver.resume(trial_id, to_train=False)
                self._driver.tell(trial_id, "pruned")
                continue
            trial_id = answer.trial_id
            if trial_id in self._curves:
                self._resumed.add(trial_id)
                self._go_on(now + self._take_up_s, trial_id)
            else:
                self._curves[trial_id], self.reports[trial_id] = self._respond(answer.settings), 0
                self._begun_count.append(now)
                self._go_on(now, trial_id)

    def _go_on(self, now: float, trial_id: str) -> None:
        self._order += 1
        seconds = float(self._curves[trial_id][1][self.reports[trial_id]])
        heapq.heappush(self._events, (now + seconds, self._order, trial_id))

    def _report(self, now: float, trial_id: str) -> float:
        """Let a trial report, and return its best value."""
        value_R, seconds_R = self._curves[trial_id]
        self.reports[trial_id] += 1
        report = self.reports[trial_id]
        best, seconds = float(value_R[:report].min()), float(seconds_R[:report].sum())
        heard = {
            "report": report,
            "epoch": float(report),
            "val_js": float(value_R[report - 1]),
            OBJECTIVE: best,
            "seconds": seconds,
            "finished": report == len(value_R),
        }
        if trial_id in self._resumed:
            self._resumed.remove(trial_id)
            heard["resumed_in"] = self._take_up_s
        self._driver.observe(trial_id, heard)
        if heard["finished"]:
            self._driver.tell(trial_id, "complete", seconds=seconds)
            return best
        decision = self._driver.decide(trial_id, heard, self._limits())
        if decision == "go on":
            self._go_on(now, trial_id)
        elif decision == "pause":
            self._driver.pause(trial_id, seconds)
        else:
            self._driver.tell(trial_id, "pruned", seconds=seconds)
        return best
