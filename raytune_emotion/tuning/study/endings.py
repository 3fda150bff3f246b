"""Name the ways in which a trial ends, or leaves its process for a while."""

from dataclasses import dataclass

#: Restarts of a trial whose processes died, where nothing else is asked for.
MAX_FAILURES = 3


@dataclass(frozen=True)
class Complete:
    """The trial has trained to its last epoch, or stopped by itself for want of progress."""


@dataclass(frozen=True)
class Pruned:
    """The scheduler has stopped the trial for good."""


@dataclass(frozen=True)
class Paused:
    """The scheduler has stopped the trial; it can be taken up again from its checkpoint."""


@dataclass(frozen=True)
class Failed:
    """The trial would fail again if it were run again."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """No fault of the trial: the study cannot go on now, and the trial goes on when the study does."""

    reason: str


Ending = Complete | Pruned | Paused | Failed | Broken
