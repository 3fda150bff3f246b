"""Know how configurations did that were recorded here, for a study that tries the same settings.

`portfolio.json` holds them, a part per data set that they were trained on. `python -m benchmarks.curves.portfolio`
chooses them from the recorded curves.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytune_emotion.storage.json_text import load_json
from raytune_emotion.tuning.policy.encoding import Axis, encoding_of
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import Space

PORTFOLIO = Path(__file__).with_name("portfolio.json")
#: The key that tells a part of the portfolio from an earlier study: the data that it was recorded on.
RECORDED = "recorded"
#: The least share of a range of the study that the portfolio must know.
_KNOWN = 0.5


@dataclass(frozen=True)
class Portfolio:
    """The parts of the portfolio that fit a space."""

    recorded: tuple[str, ...]  # the data of each part
    trials: int
    text: str  # as `write_earlier` writes it

    def __str__(self) -> str:
        return f"the portfolio, {self.trials} configurations recorded on {' and '.join(self.recorded)}"


def portfolio_of(space: Space, but: Collection[str] = ()) -> Portfolio | None:
    """Return what the portfolio knows of a space; None where it does not fit.

    Args:
        space: of the study.
        but: data whose parts are left out.
    """
    parts = [
        part
        for part in load_json(PORTFOLIO.read_bytes())
        if part[RECORDED] not in but and fits(space, parse_space(part["space"], PORTFOLIO.name))
    ]
    if not parts:
        return None
    names = tuple(str(part[RECORDED]) for part in parts)
    return Portfolio(names, sum(len(part["trials"]) for part in parts), json.dumps(parts))


def fits(space: Space, recorded: Space) -> bool:
    """Tell whether what was recorded of one space says something of another.

    The other has to search all settings that were searched. Its choices must be among the recorded ones, and at least
    half of each of its ranges within the recorded one. Further settings do no harm: nothing is said of them.
    """
    its, known = encoding_of(space), encoding_of(recorded)
    return all(
        key in its.choices and {*its.choices[key]} <= {*choices} for key, choices in known.choices.items()
    ) and all(key in its.ranges and _share(its.ranges[key], axis) >= _KNOWN for key, axis in known.ranges.items())


def _share(axis: Axis, known: Axis) -> float:
    """Return the share of a range that is known."""
    low, high = known.unit(axis.value(np.array([0.0, 1.0])))
    return float((min(high, 1.0) - max(low, 0.0)) / (high - low))
