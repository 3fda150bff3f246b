"""Define the objective of a study: the lowest validation JS, alone, per hour, or for each cost of a model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from raytune_emotion.learn.report import DriverReport

T = TypeVar("T")


@dataclass(frozen=True)
class Objective:
    """The JS, and a cost that is weighed against it."""

    #: Cost of a trial from its report, lower is better; None if only the JS counts.
    cost: Callable[[DriverReport], float] | None = None
    #: Whether the best JS at every cost is wanted, and not the largest decrease of the JS per cost.
    front: bool = False
    #: Adjective for a cheaper model in tables: "smaller" or "faster".
    cheaper: str = ""


def _seconds_per_epoch(report: DriverReport) -> float:
    return float(report["seconds"] / report["epoch"])


def _params_millions(report: DriverReport) -> float:
    return float(report["params_millions"])


def _seconds_per_image(report: DriverReport) -> float:
    return float(1 / report["images_per_second"])


JS_ALONE = Objective()
DEFAULT_OBJECTIVE = "val_js"
BY_SIZE = "val_js, params_millions"
#: Objectives by their name in `--objective`.
OBJECTIVES = {
    DEFAULT_OBJECTIVE: JS_ALONE,
    "val_js per hour": Objective(_seconds_per_epoch),
    BY_SIZE: Objective(_params_millions, front=True, cheaper="smaller"),
    "val_js, images_per_second": Objective(_seconds_per_image, front=True, cheaper="faster"),
}


def pareto_front(best_first: Iterable[T], cost: Callable[[T], float]) -> list[T]:
    """Return the Pareto front. `best_first` must be sorted by JS."""
    found: list[T] = []
    least = math.inf
    for trial in best_first:
        if cost(trial) < least:
            found.append(trial)
            least = cost(trial)
    return found
