"""When trials are stopped, and when one that was stopped goes on: what the default is compared with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from optuna.trial import FrozenTrial
from ray.tune.schedulers import TrialScheduler
from scipy.stats import norm

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.tuning.policy.decisions import SETTINGS, Scheduler
from raytune_emotion.tuning.policy.forecast import Encoding, Forecast
from raytune_emotion.tuning.policy.sampler import curves
from raytune_emotion.tuning.study.optuna_study import trial_id_of

Report = Mapping[str, Any]


class Rule(Protocol):
    pauses: bool  # whether what it stops may go on later

    def keeps(self, trial_id: str, report: Report, past: Sequence[FrozenTrial]) -> bool:
        """Whether a trial goes on, which has not finished, with all trials as Optuna knows them."""

    def promoted(self) -> str | None:
        """A stopped trial that goes on now, in place of a new one."""


@dataclass(frozen=True)
class Trial:
    """All that Ray's schedulers ask of one of theirs."""

    trial_id: str


class OfRay:
    """A scheduler of Ray's; none stops nothing."""

    pauses = False

    def __init__(self, scheduler: TrialScheduler | None) -> None:
        self._scheduler = scheduler
        self._added: set[str] = set()

    def keeps(self, trial_id: str, report: Report, past: Sequence[FrozenTrial]) -> bool:
        if self._scheduler is None:
            return True
        trial: Any = Trial(trial_id)
        if trial_id not in self._added:
            self._added.add(trial_id)
            self._scheduler.on_trial_add(None, trial)
        return self._scheduler.on_trial_result(None, trial, report) != TrialScheduler.STOP

    def promoted(self) -> str | None:
        return None


class Stopping:
    """A scheduler of this project's that pauses nothing."""

    pauses = False

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def keeps(self, trial_id: str, report: Report, past: Sequence[FrozenTrial]) -> bool:
        return self._scheduler.decide(trial_id, dict(report)) == "go on"

    def promoted(self) -> str | None:
        return None


class Promoting:
    """Asynchronous successive halving with pauses (Li et al., 2020, algorithm 2).

    All trials pause at a third of the length, and whenever a worker is free, the best of them that is among the best
    third goes on from its checkpoint before a new trial begins.
    """

    pauses = True

    def __init__(self, most_reports: int) -> None:
        self._rung = math.ceil(most_reports / 3)
        self._reached: dict[str, float] = {}
        self._promoted: set[str] = set()

    def keeps(self, trial_id: str, report: Report, past: Sequence[FrozenTrial]) -> bool:
        if report["report"] != self._rung:
            return True
        self._reached[trial_id] = report[OBJECTIVE]
        return False

    def promoted(self) -> str | None:
        best = sorted(self._reached, key=self._reached.__getitem__)[: len(self._reached) // 3]
        chosen = next((trial_id for trial_id in best if trial_id not in self._promoted), None)
        if chosen is not None:
            self._promoted.add(chosen)
        return chosen


#: The least chance to better the best that a trial goes on with.
CHANCE = 0.05
#: Trials that have ended before it is known how far forecasts are off.
ENDED = 5
#: Standard deviations from the mean within which four fifths of a normal distribution lie.
_MIDDLE = float(norm.ppf(0.9))


@dataclass(frozen=True)
class Foretold:
    """What a trial's end was thought to be while it ran."""

    trial_id: str
    best: float  # log of the study's best value then
    mean: float  # of the log of the trial's value at full length
    std: float
    wider: float  # by how much forecasts were off until then, in standard deviations

    @property
    def chance(self) -> float:
        """That the trial betters the study's best; one in two while nothing is known of how far forecasts are off."""
        return float(norm.cdf((self.best - self.mean) / (self.std * self.wider)))


class Extrapolating:
    """Stops a trial whose chance to better the best is small, by the forecast of the search itself.

    The forecast is of the trial's own curve and of all others, and as uncertain as those of the trials that have ended
    turned out to be. Not before a third of the length, as with the other rules.
    """

    pauses = False

    def __init__(self, encoding: Encoding, most_reports: int) -> None:
        self._encoding, self._first = encoding, math.ceil(most_reports / 3)
        self.foretold: list[Foretold] = []

    def keeps(self, trial_id: str, report: Report, past: Sequence[FrozenTrial]) -> bool:
        if report["report"] < self._first:
            return True
        reported = [trial for trial in past if trial.intermediate_values]
        (settings,) = (t.user_attrs[SETTINGS] for t in reported if trial_id_of(t.number) == trial_id)
        mean_M, std_M = Forecast(self._encoding, curves(past))([settings])
        best = math.log(min(min(trial.intermediate_values.values()) for trial in reported))
        self.foretold.append(Foretold(trial_id, best, float(mean_M[0]), float(std_M[0]), self._wider(past)))
        return self.foretold[-1].chance >= CHANCE

    def promoted(self) -> str | None:
        return None

    def _wider(self, past: Sequence[FrozenTrial]) -> float:
        ends = {trial_id_of(t.number): math.log(t.value) for t in past if t.value is not None}
        off = [(ends[f.trial_id] - f.mean) / f.std for f in self.foretold if f.trial_id in ends]
        return max(1.0, float(np.quantile(np.abs(off), 0.8)) / _MIDDLE) if len(ends) >= ENDED and off else math.inf
