"""Measure the results of others for a budget on recorded learning curves: random search, and Ray's default search.

`policies` compares this project's policy with these results. They change only with Ray, Optuna and the curves.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.replay import (
    BEST,
    BUDGET,
    COLUMNS,
    SHARE,
    WORKERS,
    Goals,
    Market,
    at_random,
    found_at,
    in_order,
    many,
    pool,
    read_markets,
    read_rows,
    replays,
    row,
)
from raytune_emotion.tuning.policy.decisions import Decision, Limits
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.study.optuna_study import Proposal, Status
from raytune_emotion.tuning.study.trials import trial_id_of

KEPT = Path(__file__).parent / "results" / "rivals.json"
#: Numbers of studies per median: for random search, and with the surrogate; and for Ray's search with the nearest.
SEEDS, SEEDS_NEAREST = 200, 16
RANDOM, RAY, FASTEST = "random, nothing stopped", "OptunaSearch + ASHAScheduler", "the fastest configuration"
#: Columns of the goals.
OF_RANDOM, OF_BEST = "random's JS at its full budget", tuple(f"JS of the best {share:.0%}" for share in BEST)


#: Placeholder for an object of which Ray's schedulers use nothing.
_NO_CONTROLLER: Any = None


@dataclass(frozen=True)
class _Trial:
    """The part of a Ray trial that Ray's schedulers use."""

    trial_id: str


class RayAsItComes:
    """Ray's `OptunaSearch` with its `ASHAScheduler`, with nothing set but the metric, the seed and the length."""

    def __init__(self, market: Market, seed: int) -> None:
        self._settings: dict[str, Any] = {}

        def define(trial: Any) -> None:
            self._settings = market.space.suggest(trial)

        self._search = OptunaSearch(define, metric="val_js", mode="min", seed=seed)
        self._scheduler = ASHAScheduler(metric="val_js", mode="min", max_t=market.most_reports)
        self._asked = 0
        self._newest: dict[str, Any] = {}

    def ask(self, limits: Limits) -> Proposal:
        trial_id = trial_id_of(self._asked)
        self._asked += 1
        self._search.suggest(trial_id)
        trial: Any = _Trial(trial_id)
        self._scheduler.on_trial_add(_NO_CONTROLLER, trial)
        return Proposal(trial_id, self._settings, None)

    def observe(self, trial_id: str, report: dict[str, Any]) -> bool:
        self._newest = {"training_iteration": report["report"], "val_js": report["val_js"]}
        return True

    def decide(self, trial_id: str, report: dict[str, Any], limits: Limits) -> Decision:
        if self._stops(trial_id):
            return "stop"
        self._search.on_trial_result(trial_id, self._newest)
        return "go on"

    def tell(self, trial_id: str, status: Status, *, reason: str = "", seconds: float | None = None) -> None:
        if status == "complete":
            self._stops(trial_id)
        self._search.on_trial_complete(trial_id, self._newest)

    def _stops(self, trial_id: str) -> bool:
        trial: Any = _Trial(trial_id)
        return bool(self._scheduler.on_trial_result(_NO_CONTROLLER, trial, self._newest) == TrialScheduler.STOP)

    def pause(self, trial_id: str, seconds: float) -> None:
        raise AssertionError("it pauses nothing")

    def resume(self, trial_id: str, *, to_train: bool = True) -> Proposal:
        raise AssertionError("it pauses nothing")


def run() -> Table:
    notes = [
        f"Medians over the seeds named. Random search has the time of {BUDGET} full trials, Ray's "
        f"1/{1 / SHARE:g} of it. The best {BEST[0]:.0%} and {BEST[1]:.0%} are of all configurations. A ratio of "
        f"0, and a dash: not reached. '{FASTEST}' is, of 20,000, the one that would get there soonest by itself: no "
        f"policy can be faster."
    ]
    with pool() as processes:
        markets = [(market, *many(market, SEEDS)) for market in read_markets(notes)]
        cells = track([*product(markets, WORKERS)], "rivals")
        rows = [each for market, workers in cells for each in _rows(processes, *market, workers)]
    return Table((*COLUMNS, OF_RANDOM, *OF_BEST), rows, notes)


def _rows(
    processes: ProcessPoolExecutor, market: Market, js_MR: Floats, seconds_MR: Floats, workers: int
) -> list[tuple[Any, ...]]:
    """Return the rows of one cell; JS and seconds are those of many configurations."""
    budget = market.budget(workers)
    seeds = range(SEEDS if market.kind == "surrogate" else SEEDS_NEAREST)
    random = list(processes.map(at_random, *map(repeat, (market, workers)), range(SEEDS), repeat(budget)))
    by_ray = replays(processes, RayAsItComes, market, workers, seeds, budget * SHARE)
    goals = Goals(
        float(np.median([one.at(budget) for one in random])),
        float(np.median([one.at(budget * SHARE) for one in by_ray])),
        tuple(map(float, np.quantile(js_MR.min(axis=1), BEST))),
    )
    # Treat all configurations as one study, in which each began at the start.
    at_once = in_order(np.cumsum(seconds_MR, axis=1).ravel(), js_MR.ravel(), np.zeros(1))
    return [
        (*row(market, workers, name, studies, goals, seconds, len(studies)), goals.of_random, *goals.best)
        for name, studies, seconds in (
            (RANDOM, random, budget),
            (RAY, by_ray, budget * SHARE),
            (FASTEST, [at_once], budget * SHARE),
        )
    ]


def kept_goals(market: Market, workers: int) -> Goals:
    """Return the goals from the last run."""
    found = read_rows(KEPT)[market.curves, market.kind, workers, RAY]
    return Goals(found[OF_RANDOM], found[found_at(SHARE)[0]], tuple(found[name] for name in OF_BEST))
