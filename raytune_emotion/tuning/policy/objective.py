"""Define what a study is after: the least validation JS, alone, for its time, or for what a model costs."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from raytune_emotion.learn.report import Heard

T = TypeVar("T")


@dataclass(frozen=True)
class Objective:
    """JS, and what is weighed against it."""

    #: Of a trial that has reported, the less the better; None where JS alone counts.
    cost: Callable[[Heard], float] | None = None
    #: Whether the best JS at every cost is wanted, not the most JS for it.
    front: bool = False
    #: How a trial of less cost is called.
    cheaper: str = ""


def _seconds_per_epoch(report: Heard) -> float:
    return float(report["seconds"] / report["epoch"])


def _params_millions(report: Heard) -> float:
    return float(report["params_millions"])


def _seconds_per_image(report: Heard) -> float:
    return float(1 / report["images_per_second"])


JS_ALONE = Objective()
DEFAULT_OBJECTIVE = "val_js"
BY_SIZE = "val_js, params_millions"
#: By the name that `--objective` takes.
OBJECTIVES = {
    DEFAULT_OBJECTIVE: JS_ALONE,
    "val_js per hour": Objective(_seconds_per_epoch),
    BY_SIZE: Objective(_params_millions, front=True, cheaper="smaller"),
    "val_js, images_per_second": Objective(_seconds_per_image, front=True, cheaper="faster"),
}


def pareto_front(best_first: Iterable[T], cost: Callable[[T], float]) -> list[T]:
    """Return those trials that none of less cost has bettered, of trials in the order of their JS and in that order."""
    found: list[T] = []
    least = math.inf
    for trial in best_first:
        if cost(trial) < least:
            found.append(trial)
            least = cost(trial)
    return found
