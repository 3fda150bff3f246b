"""Name the decisions of a policy: the seam between a study's recorder and what decides about its trials.

The recorder (`execution/recorder.py`) runs the loop of a study. It asks a `Policy` two things, and does not know how
the answers come about. Ray, the journal and checkpoints are the recorder's business, never the policy's.

1.  `decide`: after each report of a running trial, whether the trial goes on, pauses or stops. A paused trial frees its
    place. It keeps its checkpoint, and any process of any machine can take it up.
2.  `next`: whenever a place is free, what takes it: `Begin` a new trial, `TakeUp` a paused one, or `Prune` a paused one
    for good, after which it is asked again. None: nothing for now. It is then asked again when something has happened.
    The study is over when it answers None while no trial runs; trials that are paused then are recorded as pruned.

A policy sees the past as Optuna's frozen trials, in the order of their numbers, with what was reported so far. All of
it is on disk before a decision takes effect: a study that was interrupted, or killed, asks with the same past. Trials
that ran when it broke off are taken up before anything is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from optuna.trial import FrozenTrial

from raytune_emotion.learn.report import Heard, Report

#: Names of what proposes configurations, this project's first; and of what decides which trials go on.
FORECAST, FREEZE_THAW = "forecast", "freeze-thaw"
SAMPLERS = (FORECAST, "tpe", "gp", "cmaes", "random", "qmc")
ASHA = "asha"
SCHEDULERS = (FREEZE_THAW, ASHA, "hyperband", "median", "none")
#: Samplers that learn from trials that have ended alone: of those that are paused, few have for long.
LEARN_FROM_ENDED = ("tpe", "gp", "cmaes")

#: What becomes of a running trial after a report.
Decision = Literal["go on", "pause", "stop"]


@dataclass(frozen=True)
class Gain:
    """What the most promising training that is left is expected to bring."""

    bits: float  # by which it lowers the best JS of the study
    seconds: float  # that it takes; 0 where nothing is left

    @property
    def per_hour(self) -> float:
        """Return the bits per hour of training."""
        return 3600 * self.bits / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Begin:
    """Begin a new trial with these parameters of Optuna's; what they leave out, the study's sampler draws."""

    params: Mapping[str, Any]


@dataclass(frozen=True)
class TakeUp:
    """Go on with the paused trial of this number, from its checkpoint."""

    number: int


@dataclass(frozen=True)
class Prune:
    """End the paused trial of this number; its weights go unless it is among the best."""

    number: int


#: What takes a free place; None where there is nothing to run for now.
Answer = Begin | TakeUp | Prune | None


@dataclass(frozen=True)
class Limits:
    """What a study allows."""

    new: bool  # whether a new trial may begin; False once the study has as many as it was asked for
    paused: int  # trials that may be paused, and keep their checkpoints


NO_LIMITS = Limits(new=True, paused=10**9)


class Recorded(Protocol):
    """What is known of a trial of the past."""

    @property
    def trial_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reports(self) -> Sequence[Report]: ...


class Policy(Protocol):
    """Decide what a study's places are used for."""

    def next(self, past: Sequence[FrozenTrial], limits: Limits) -> Answer:
        """Answer for one free place.

        Args:
            past: every trial that has begun, by number: running, paused and ended.
            limits: of the study.
        """

    def decide(self, trial_id: str, report: Heard, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        """Answer for a new report of a running trial that has not reached its last epoch."""

    def replay(self, trials: Sequence[Recorded]) -> set[str]:
        """Learn what was reported before, when a study goes on.

        Returns:
            The running trials whose last report was answered by stop, where that was not recorded any more.
        """


def default_scheduler(sampler: str) -> str:
    """Return the scheduler of a study with this sampler where none is named."""
    return ASHA if sampler in LEARN_FROM_ENDED else FREEZE_THAW
