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
interruption are resumed before the policy is asked, or end if their last report is now answered so (`decide_again`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from optuna.trial import FrozenTrial

from raytune_emotion.learn.report import DriverReport, Report

#: Names of the samplers, which propose configurations, and of the schedulers, which decide which trials continue. The
#: first of each is this project's own.
FORECAST, FREEZE_THAW = "forecast", "freeze-thaw"
SAMPLERS = (FORECAST, "tpe", "gp", "cmaes", "random", "qmc")
SCHEDULERS = (FREEZE_THAW, "asha", "hyperband", "median", "none")
#: Default schedulers of the samplers that do not learn from paused trials: `tpe` learns from ended ones, pruned or not,
#: `gp` and `cmaes` only from complete ones.
DEFAULT_SCHEDULERS = {"tpe": "asha", "gp": "none", "cmaes": "none"}

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

    def decide_again(
        self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits
    ) -> Decision:
        """Answer for the last report of a trial that ran at an interruption. The first answer may not be recorded."""

    def replay(self, trials: Sequence[Recorded]) -> None:
        """Learn from earlier reports when a study is resumed, before any question."""


def default_scheduler(sampler: str) -> str:
    """Return the default scheduler of a study with this sampler."""
    return DEFAULT_SCHEDULERS.get(sampler, FREEZE_THAW)
