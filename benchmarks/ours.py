"""How soon this project's policy of search reaches what others had reached in `policies`, without replaying these.

`policies` takes more than an hour, most of it for Ray's searches, which do not change with this project. What Ray's
reach is read from its kept results; random search, which is soon replayed, is replayed.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.response import Surrogate
from benchmarks.policies import (
    BUDGET,
    CURVES,
    LONGER,
    OURS,
    RANDOM,
    RAY,
    SEEDS,
    SEEDS_PARTS,
    SHARE,
    WORKERS,
    Market,
    Replay,
    pool,
    read_markets,
    read_space,
    replay,
    summary,
)

KEPT = CURVES.parent / "results" / "policies.json"


def run() -> Table:
    notes = [
        f"Medians over the seeds named, by the surrogate. Random search has the time of {BUDGET} full trials, this "
        f"project a {round(1 / SHARE)}th of it; the first {SEEDS_PARTS} of its seeds go on, up to {LONGER:g} of that "
        f"time, until they reach random's JS."
    ]
    with pool() as processes:
        markets = [market for market in read_markets(read_space(), notes) if isinstance(market[2].response, Surrogate)]
        rows = [
            _row(processes, market, workers, full, (name, workers))
            for (name, _, market, full), workers in track([*product(markets, WORKERS)], "policy")
        ]
    columns = (
        "curves", "workers", "seeds", "budget of random search over its own, to random's JS",
        "budget of Ray's over its own, to Ray's JS", "JS at 1/16 of random's budget", "quartile", "quartile",
        "JS at 1/8", "quartile", "quartile", "random's JS at its full budget", "Ray's JS at 1/8", "trials",
    )  # fmt: skip
    return Table(columns, rows, notes)


def _row(
    processes: ProcessPoolExecutor, market: Market, workers: int, full: float, labels: tuple[str, int]
) -> tuple[Any, ...]:
    budget = BUDGET * full / workers

    def replays(name: str, seconds: float, seeds: Sequence[int], goal: float, longer: float) -> list[Replay]:
        return list(processes.map(replay, *map(repeat, (market, name, workers, seconds, goal, longer)), seeds))

    random = replays(RANDOM, budget, range(SEEDS), np.inf, 0.0)
    goal = float(np.median([one.at(budget) for one in random]))
    to_ray = _kept(*labels)
    longer = replays(OURS, budget * SHARE, range(SEEDS_PARTS), goal, budget * LONGER)
    studies = longer + replays(OURS, budget * SHARE, range(SEEDS_PARTS, SEEDS), np.inf, 0.0)
    trials = float(np.mean([np.sum(one.begun <= budget * SHARE) for one in studies]))
    return (*labels, len(studies), *summary(studies, longer, budget, goal, to_ray), goal, to_ray, trials)


def _kept(curves: str, workers: int) -> float:
    """The JS that Ray's searches had reached in the median at an eighth of random's budget."""
    table = json.loads(KEPT.read_text(encoding="utf-8"))
    asked = [curves, "surrogate", workers, RAY]
    (row,) = (row for row in table["rows"] if row[: len(asked)] == asked)
    return float(row[table["columns"].index("JS at 1/8")])
