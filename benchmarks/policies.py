"""Measure the best model that this project's search policy finds for a budget, complete and with parts replaced.

It is replayed on recorded learning curves, and compared with the results of others in `rivals`. The policy runs as in a
study: the same `Searcher` asks and tells Optuna, and the same policy decides after every report. No study uses the
portfolio, because it contains configurations of these curves.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.replay import (
    BUDGET,
    COLUMNS,
    SHARE,
    WORKERS,
    Make,
    Market,
    pool,
    read_markets,
    replays,
    row,
    simulate,
)
from benchmarks.former import FormerSampler
from benchmarks.rivals import kept_goals
from raytune_emotion.tuning.policy.candidates import domain_of, draw_candidates
from raytune_emotion.tuning.policy.decisions import FORECAST, FREEZE_THAW
from raytune_emotion.tuning.policy.encoding import encoding_of
from raytune_emotion.tuning.policy.forecast import Forecast, curves_of
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.objective import JS_ALONE, OBJECTIVES, Objective
from raytune_emotion.tuning.policy.policies import BeginAndStop, make_policy, make_sampler_of
from raytune_emotion.tuning.policy.scheduler import Halving
from raytune_emotion.tuning.study.optuna_study import Searcher

#: Longer time of a policy that has not reached a goal in its time, as a share of random search's time.
LONGER = 1 / 2
#: Number of workers for the comparison of parts.
ALSO = 8
#: Numbers of studies per median: with the surrogate, of which some run longer; with the nearest; for the parts; and for
#: the sampler that needs seconds per proposal.
SEEDS, SEEDS_LONGER, SEEDS_NEAREST, SEEDS_PARTS, SEEDS_SLOW = 48, 24, 16, 16, 4
OURS, FORMER = "this project", "this project before trials could be paused"


def study(
    market: Market,
    seed: int,
    *,
    sampler: str = FORECAST,
    scheduler: str = FREEZE_THAW,
    objective: Objective = JS_ALONE,
    earlier: Sequence[Forecast] = (),
    kept: optuna.Study | None = None,
) -> Searcher:
    """Make the driver of a study, as a study's recorder does."""
    length = market.most_reports
    inputs = PolicyInputs(market.space, length, length, seed, objective, earlier)
    policy, made = make_policy(inputs, sampler=sampler, scheduler=scheduler), make_sampler_of(inputs, sampler)
    return Searcher(kept or optuna.create_study(), market.space, policy, sampler=made, cost=objective.cost)


def ours(market: Market, seed: int) -> Searcher:
    return study(market, seed)


def former(market: Market, seed: int) -> Searcher:
    """Make this project's policy before it could pause trials."""
    sampler: BaseSampler = FormerSampler(market.space, seed, draw_candidates)
    policy = BeginAndStop(market.space, Halving([math.ceil(market.most_reports / 3)]))
    return Searcher(optuna.create_study(), market.space, policy, sampler=lambda number: sampler)


WHOLE: dict[str, Make] = {OURS: ours, FORMER: former}
#: This project's policy with one part replaced.
PARTS: dict[str, Callable[..., Searcher]] = {
    "with random proposals": functools.partial(study, sampler="random"),
    "with quasi-random proposals": functools.partial(study, sampler="qmc"),
    "with Optuna's TPE": functools.partial(study, sampler="tpe"),
    "with CMA-ES": functools.partial(study, sampler="cmaes"),
    "with Optuna's Gaussian process": functools.partial(study, sampler="gp"),
    "nothing stopped": functools.partial(study, scheduler="none"),
    "with successive halving": functools.partial(study, scheduler="asha"),
    "with Hyperband's brackets": functools.partial(study, scheduler="hyperband"),
    "with the median rule": functools.partial(study, scheduler="median"),
    "random proposals with successive halving": functools.partial(study, sampler="random", scheduler="asha"),
    "TPE with successive halving": functools.partial(study, sampler="tpe", scheduler="asha"),
    "for JS per hour": functools.partial(study, objective=OBJECTIVES["val_js per hour"]),
}
SLOW = "with Optuna's Gaussian process"


def part(name: str, market: Market, seed: int) -> Searcher:
    """Make a part by its name, because the part itself cannot be sent to other processes."""
    return PARTS[name](market, seed)


def warm_started(earlier: Forecast, market: Market, seed: int) -> Searcher:
    return study(market, seed, earlier=[earlier])


def run() -> Iterator[Table]:
    """Measure the whole policy in each cell, with the surrogate first, then its parts."""
    notes = [
        f"Medians over the seeds named. Every study has 1/{1 / SHARE:g} of the time of {BUDGET} full trials, "
        f"which random search had. For this project, the first {SEEDS_LONGER} seeds (with the nearest, all) that have "
        f"not reached random's JS by then continue, up to {LONGER:g} of that time. The median time to a JS that most "
        f"had not reached is computed from those. A ratio of 0, and a dash: not reached."
    ]
    rows: list[tuple[Any, ...]] = []
    with pool() as processes:
        markets = read_markets(notes)
        learned = {market.curves: _learned(market) for market in markets if market.kind == "surrogate"}
        ordered = sorted(markets, key=lambda market: market.kind != "surrogate")
        for market, workers in track([*product(ordered, WORKERS)], "policies"):
            rows += [_whole(processes, market, workers, name, make) for name, make in WHOLE.items()]
            yield Table(COLUMNS, [*rows], notes)
        for market in track(ordered, "parts"):
            (earlier,) = (forecast for curves, forecast in learned.items() if curves != market.curves)
            for row in _parts(processes, market, earlier):
                rows.append(row)
                yield Table(COLUMNS, [*rows], notes)


def _whole(processes: ProcessPoolExecutor, market: Market, workers: int, name: str, make: Make) -> tuple[Any, ...]:
    seconds, goals = market.budget(workers) * SHARE, kept_goals(market, workers)
    count = SEEDS if market.kind == "surrogate" else SEEDS_NEAREST
    longer = min(SEEDS_LONGER, count)
    until = goals.of_random, market.budget(workers) * LONGER
    studies = replays(processes, make, market, workers, range(longer), seconds, *until)
    studies += replays(processes, make, market, workers, range(longer, count), seconds)
    return row(market, workers, name, studies, goals, seconds, longer)


def _parts(processes: ProcessPoolExecutor, market: Market, earlier: Forecast) -> Iterator[tuple[Any, ...]]:
    seconds, goals = market.budget(ALSO) * SHARE, kept_goals(market, ALSO)
    makes: dict[str, Make] = {name: functools.partial(part, name) for name in PARTS}
    makes["warm-started from the other curves"] = functools.partial(warm_started, earlier)
    for name, make in makes.items():
        count = SEEDS_SLOW if name == SLOW else SEEDS_PARTS
        studies = replays(processes, make, market, ALSO, range(count), seconds)
        yield row(market, ALSO, name, studies, goals, seconds, count)


def _learned(market: Market) -> Forecast:
    """Return the forecast of a study on these curves after the time of 32 full trials, for a later study."""
    kept = optuna.create_study()
    simulate(market, study(market, SEEDS, kept=kept), 2, market.budget(2) * SHARE)
    return Forecast(encoding_of(market.space), curves_of(domain_of(market.space), kept.trials))
