"""Define the interface between a study's recorder and the policy that decides about its trials.

The recorder (`execution/recorder.py`) runs the loop of a study. It asks a `Policy` two questions, and does not depend
on how the policy answers. Ray, the journal and checkpoints belong to the recorder, never to the policy.

1.  `decide`: after each report of a running trial, the trial goes on, pauses or stops. A paused trial frees its place.
    It keeps its checkpoint, and any process of any machine can resume it.
2.  `next`: whenever a place is free, the policy answers `Begin` (a new trial), `TakeUp` (a paused trial) or `Prune`
    (end a paused trial for good), after which it is asked again. None means nothing for now: it is asked again after
    the next event. The study ends when the answer is None and no trial runs. Trials that are still paused are then
    recorded as pruned.

A policy sees the past as Optuna's frozen trials with their reports, in the order of their numbers. All of it is on disk
before a decision takes effect, so an interrupted or killed study asks with the same past. Trials that ran at an
interruption are resumed before the policy is asked.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.learn.report import DriverReport, Report

#: Names of the samplers, which propose configurations, and of the schedulers, which decide which trials continue. The
#: first of each is this project's own.
FORECAST, FREEZE_THAW = "forecast", "freeze-thaw"
SAMPLERS = (FORECAST, "tpe", "gp", "cmaes", "random", "qmc")
ASHA = "asha"
SCHEDULERS = (FREEZE_THAW, ASHA, "hyperband", "median", "none")
#: Samplers that learn only from ended trials. With paused trials, few would have ended for a long time.
LEARN_FROM_ENDED = ("tpe", "gp", "cmaes")

#: Attributes of an Optuna trial: its configuration by dotted path; its cost, if the objective has one; whether it is
#: paused (Optuna's state is then still `RUNNING`); the seconds of training up to the report at which it last paused or
#: ended; the number of times it was resumed; the driver that runs it, if a study has several.
SETTINGS, COST, PAUSED, SECONDS, TAKEN_UP, DRIVER = "settings", "cost", "paused", "seconds", "taken_up", "driver"
#: Attribute of an Optuna trial: whether it is a start point of the study's space.
START = "start"
#: Attribute of an Optuna study: the expected further gain, as bits and seconds.
GAIN = "expected_gain"

#: Decision about a running trial after a report.
Decision = Literal["go on", "pause", "stop"]


@dataclass(frozen=True)
class Gain:
    """The expected gain of the most promising further training."""

    bits: float  # expected decrease of the best JS of the study
    seconds: float  # time of that training; 0 if nothing is left to train

    @property
    def per_hour(self) -> float:
        """Return the bits per hour of training."""
        return 3600 * self.bits / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Begin:
    """Begin a new trial with these Optuna parameters. The study's sampler draws the parameters that are missing."""

    params: Mapping[str, Any]


@dataclass(frozen=True)
class TakeUp:
    """Resume the paused trial of this number from its checkpoint."""

    number: int


@dataclass(frozen=True)
class Prune:
    """End the paused trial of this number. Its weights are deleted unless it is among the best."""

    number: int


#: Answer for a free place; None if there is nothing to run for now.
Answer = Begin | TakeUp | Prune | None


@dataclass(frozen=True)
class Limits:
    """Limits of a study."""

    new: bool  # whether a new trial may begin; False once the study has all its trials
    paused: int  # number of trials that may be paused, and keep their checkpoints


NO_LIMITS = Limits(new=True, paused=10**9)


class Recorded(Protocol):
    """The record of a trial."""

    @property
    def trial_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reports(self) -> Sequence[Report]: ...


class Policy(Protocol):
    """Decide how the places of a study are used."""

    def next(self, past: Sequence[FrozenTrial], limits: Limits) -> Answer:
        """Answer for one free place.

        Args:
            past: every trial that has begun, by number: running, paused and ended.
            limits: limits of the study.
        """

    def decide(self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        """Answer for a new report of a running trial that has not reached its last epoch."""

    def replay(self, trials: Sequence[Recorded]) -> set[str]:
        """Learn from earlier reports when a study is resumed.

        Returns:
            The running trials whose last report was answered by "stop" without this being recorded.
        """


def default_scheduler(sampler: str) -> str:
    """Return the default scheduler of a study with this sampler."""
    return ASHA if sampler in LEARN_FROM_ENDED else FREEZE_THAW


def is_running(trial: FrozenTrial) -> bool:
    """Tell whether a trial trains now."""
    return trial.state == TrialState.RUNNING and not trial.user_attrs.get(PAUSED)


def is_paused(trial: FrozenTrial) -> bool:
    """Tell whether a trial has left its process, and can be resumed."""
    return trial.state == TrialState.RUNNING and bool(trial.user_attrs.get(PAUSED))


def count_reports(trial: FrozenTrial) -> int:
    """Return the number of a trial's last report; 0 before the first."""
    return max(trial.intermediate_values, default=0)


def reports_left(trial: FrozenTrial, reports: int) -> int:
    """Return the number of reports that an unfinished trial still needs to its end, at least 1."""
    return max(1, reports - count_reports(trial))


def as_paused(trial: FrozenTrial, seconds: float | None = None) -> FrozenTrial:
    """Return a copy of a trial as if it paused now, after these seconds of training if they are known.

    The recorded seconds of a running trial end at its last pause, so they do not match its later reports.
    """
    paused = copy.copy(trial)
    known = {name: value for name, value in trial.user_attrs.items() if name != SECONDS}
    paused.user_attrs = {**known, PAUSED: True, **({} if seconds is None else {SECONDS: seconds})}
    return paused


def best_js(trial: FrozenTrial) -> float:
    """Return the lowest validation JS that a trial has reported, bits; infinity without a report."""
    return min(trial.intermediate_values.values(), default=math.inf)
