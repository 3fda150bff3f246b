"""Provide recorded results of configurations to a study that searches the same settings.

`portfolio.json` holds them, with a part for each data set. `python -m benchmarks.curves.portfolio` chooses them from
the recorded curves.
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
#: Key of the name of the data in a part of the portfolio. Earlier studies do not have this key.
RECORDED = "recorded"
#: Smallest share of each range of the study that the portfolio must cover.
_KNOWN = 0.5


@dataclass(frozen=True)
class Portfolio:
    """The parts of the portfolio that fit a space."""

    recorded: tuple[str, ...]  # name of the data of each part
    trials: int
    text: str  # in the format of `gather_earlier`

    def __str__(self) -> str:
        return f"the portfolio, {self.trials} configurations recorded on {' and '.join(self.recorded)}"


def portfolio_of(space: Space, excluded_data: Collection[str] = ()) -> Portfolio | None:
    """Return the parts of the portfolio that fit a space; None if there are none.

    Args:
        space: search space of the study.
        excluded_data: names of data whose parts are left out.
    """
    parts = [
        part
        for part in load_json(PORTFOLIO.read_bytes())
        if part[RECORDED] not in excluded_data and fits(space, parse_space(part["space"], PORTFOLIO.name))
    ]
    if not parts:
        return None
    names = tuple(str(part[RECORDED]) for part in parts)
    return Portfolio(names, sum(len(part["trials"]) for part in parts), json.dumps(parts))


def fits(space: Space, recorded: Space) -> bool:
    """Tell whether records of one space are useful for another.

    The other space must search all recorded settings. Its choices must be among the recorded ones, and at least half of
    each of its ranges must be inside of the recorded range. It may search further settings, for which there are no
    records.
    """
    its, known = encoding_of(space), encoding_of(recorded)
    return all(
        key in its.choices and {*its.choices[key]} <= {*choices} for key, choices in known.choices.items()
    ) and all(key in its.ranges and _share(its.ranges[key], axis) >= _KNOWN for key, axis in known.ranges.items())


def _share(axis: Axis, known: Axis) -> float:
    """Return the share of a range that the known range covers."""
    low, high = known.unit(axis.value(np.array([0.0, 1.0])))
    return float((min(high, 1.0) - max(low, 0.0)) / (high - low))
