"""Name the decisions of a policy: the seam between a study's recorder and what decides about its trials.

The recorder (`execution/recorder.py`) runs the loop of a study. It asks two things, and does not know how the answers
come about. Ray, the journal and checkpoints are the recorder's business, never the policy's.

1.  After each report of a running trial it asks the *scheduler* whether the trial goes on, pauses or stops. A paused
    trial frees its place. It keeps its checkpoint, and any process of any machine can take it up.
2.  Whenever a place is free it asks the *proposer* what takes the place: `Begin` a new trial, `TakeUp` a paused one, or
    `Prune` a paused one for good, after which it is asked again. None: nothing for now. The proposer is then asked
    again when something has happened. The study is over when it answers None while no trial runs; trials that are
    paused then are recorded as pruned.

The proposer sees the past as Optuna's frozen trials, in the order of their numbers, with what was reported so far.
A trial's user attribute `SETTINGS` holds its configuration, `COST` its cost where the objective has one, and `PAUSED`
is true while it is paused (its state is then `RUNNING`). All of it is on disk before a decision takes effect: a study
that was interrupted, or killed, asks with the same past. Trials that ran when it broke off are taken up before the
proposer is asked for anything.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from optuna.trial import FrozenTrial

from raytune_emotion.learn.report import Heard, Report
from raytune_emotion.tuning.space.space import Space

#: Attributes of an Optuna trial: its configuration by dotted path, its cost where one counts, whether it is paused.
SETTINGS, COST, PAUSED = "settings", "cost", "paused"

#: What becomes of a running trial after a report.
Decision = Literal["go on", "pause", "stop"]


@dataclass(frozen=True)
class Begin:
    """Begin a new trial with these parameters of Optuna's; what they leave out is drawn at random."""

    params: Mapping[str, Any]


@dataclass(frozen=True)
class TakeUp:
    """Go on with the paused trial of this number, from its checkpoint."""

    number: int


@dataclass(frozen=True)
class Prune:
    """End the paused trial of this number; its weights go unless it is among the best."""

    number: int


class Proposer(Protocol):
    """Decide what takes a free place."""

    def __call__(self, space: Space, past: list[FrozenTrial], seed: int, *, new: bool) -> Begin | TakeUp | Prune | None:
        """Answer for one free place.

        Args:
            space: of the study.
            past: every trial that has begun, by number: running, paused and ended.
            seed: of this answer; it follows from the study's seed and the past alone.
            new: whether a new trial may begin; False once the study has as many as it was asked for.
        """


class Recorded(Protocol):
    """What a scheduler learns of a trial of the past."""

    @property
    def trial_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reports(self) -> Sequence[Report]: ...


def best_js(trial: FrozenTrial) -> float:
    """Return the lowest validation JS that a trial has reported, bits; infinite where it has not."""
    return min(trial.intermediate_values.values(), default=math.inf)


class Scheduler(Protocol):
    """Decide after every report what becomes of its trial."""

    def decide(self, trial_id: str, report: Heard) -> Decision:
        """Answer for a report of a running trial that has not reached its last epoch."""

    def replay(self, trials: Sequence[Recorded]) -> set[str]:
        """Learn what was reported before, when a study goes on.

        Returns:
            The running trials whose last report was answered by stop, where that was not recorded any more.
        """
