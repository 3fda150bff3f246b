"""Define the ways in which a trial ends or pauses."""

from dataclasses import dataclass

#: Default number of restarts of a trial whose processes died.
MAX_FAILURES = 3


@dataclass(frozen=True)
class Complete:
    """The trial has trained to its last epoch, or has stopped by early stopping."""


@dataclass(frozen=True)
class Pruned:
    """The scheduler has stopped the trial for good."""


@dataclass(frozen=True)
class Paused:
    """The scheduler has paused the trial; it can be resumed from its checkpoint."""


@dataclass(frozen=True)
class Failed:
    """The trial would fail again if it were run again."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The study cannot continue now, for a reason outside of the trial. The trial continues when the study does."""

    reason: str


Ending = Complete | Pruned | Paused | Failed | Broken
