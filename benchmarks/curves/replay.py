"""Replay studies in simulated time: recorded learning curves answer the requests of a search policy.

No policy gets the space's start points.
"""

import dataclasses
import heapq
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from benchmarks.curves.response import Nearest, Surrogate, fit_responses, read_curves
from benchmarks.simulation import Driver, Found, Simulation
from raytune_emotion.tuning.policy.candidates import draw_candidates, settings_of
from raytune_emotion.tuning.policy.encoding import Columns
from raytune_emotion.tuning.policy.freeze_thaw import TAKE_UP_S
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space

CURVES = Path(__file__).parent
SPACE = Path("search_spaces/quick.yaml")
#: Epochs of the recorded curves.
EPOCHS = 8
#: Budget of random search, in fully trained trials. All other policies are replayed for a share of it.
BUDGET, SHARE = 256, 1 / 8
#: Shares of that budget at which the best JS is reported.
SPENT = tuple(SHARE / 2**halved for halved in (4, 3, 2, 1, 0))
#: Numbers of simulated workers.
WORKERS = (2, 8, 32)
#: Goals: the JS of the best configurations, as shares of all configurations.
BEST = (0.05, 0.01)
#: Key columns, and all columns, of a table of replayed studies.
KEY = ("curves", "response", "workers", "policy")


def found_at(share: float) -> tuple[str, str, str]:
    """Return the columns of the best JS after a share of random search's budget: median and quartiles."""
    part = f"1/{1 / share:g}"
    return f"JS at {part}", f"Q1 at {part}", f"Q3 at {part}"


COLUMNS = (
    *KEY, "seeds", "budget of random search over its own, to random's JS", "budget of Ray's over its own, to Ray's JS",
    *itertools.chain.from_iterable(map(found_at, SPENT)),
    *(f"full trials to the best {share:.0%}" for share in BEST), "trials",
)  # fmt: skip


@dataclass(frozen=True)
class Market:
    """Curves on which policies are compared."""

    curves: str  # name of the file
    kind: str  # kind of the response
    space: Space
    response: Nearest | Surrogate

    @property
    def most_reports(self) -> int:
        return int(self._nearest.recorded.js_NR.shape[1])

    @property
    def full(self) -> float:
        """Return the mean cost of a fully trained random configuration, core-seconds."""
        return self._nearest.recorded.mean_seconds

    @property
    def _nearest(self) -> Nearest:
        return self.response if isinstance(self.response, Nearest) else self.response.nearest

    def budget(self, workers: int) -> float:
        """Return the time of random search, seconds."""
        return BUDGET * self.full / workers


#: Function from a market and a seed to a driver, which asks for trials and gets their reports.
Make = Callable[[Market, int], Driver]


def replay(
    make: Make, market: Market, workers: int, seed: int, seconds: float, goal: float = np.inf, longer: float = 0.0
) -> Found:
    """Simulate a study with a policy until its time is over; if the goal is not reached then, for longer."""
    np.random.seed(seed)  # noqa: NPY002  # Ray's schedulers draw from it
    return simulate(market, make(market, seed), workers, seconds, goal, longer)


def replays(
    processes: ProcessPoolExecutor, make: Make, market: Market, workers: int, seeds: Sequence[int], *limits: float
) -> list[Found]:
    """Simulate one study per seed; for the limits see `replay`."""
    each = (*map(repeat, (make, market, workers)), seeds, *map(repeat, limits))
    return list(processes.map(replay, *each, chunksize=max(1, len(seeds) // 16)))


def at_random(market: Market, workers: int, seed: int, seconds: float) -> Found:
    """Simulate random search without stopping. Its trials are independent, so that they can be drawn at once."""
    free = [0.0] * workers
    begins: list[float] = []
    times: list[Floats] = []
    found: list[Floats] = []
    blocks = (market.response(drawn(market.space, seed, block)) for block in itertools.count())
    for js_R, seconds_R in (curve for js_MR, seconds_MR in blocks for curve in zip(js_MR, seconds_MR, strict=True)):
        begins.append(heapq.heappop(free))
        if begins[-1] > seconds:
            break
        times.append(begins[-1] + np.cumsum(seconds_R))
        found.append(js_R)
        heapq.heappush(free, times[-1][-1])
    return in_order(np.concatenate(times), np.concatenate(found), np.array(begins))


def in_order(seconds_N: Floats, js_N: Floats, begun: Floats) -> Found:
    """Make a study from reports, which may come in any order."""
    order = np.argsort(seconds_N, kind="stable")
    return Found(seconds_N[order], np.minimum.accumulate(js_N[order]), begun)


def drawn(space: Space, seed: int, block: int) -> Columns:
    """Draw random configurations."""
    rng = np.random.default_rng(zlib.crc32(f"{seed}/{block}".encode()))
    return settings_of(space, draw_candidates(space.parameters, [], rng))


def many(market: Market, seed: int) -> tuple[Floats, Floats]:
    """Return JS and core-seconds by report, [M, R] each, of about 20,000 random configurations."""
    every = [market.response(drawn(market.space, seed, block)) for block in range(20)]
    js_MR, seconds_MR = (np.concatenate(part) for part in zip(*every, strict=True))
    return js_MR, seconds_MR


def simulate(
    market: Market, driver: Driver, workers: int, seconds: float, goal: float = np.inf, longer: float = 0.0
) -> Found:
    """Run a study on replayed curves until its time is over; if the goal is not reached then, for longer."""

    def respond(settings: Mapping[str, Any]) -> tuple[Floats, Floats]:
        (js_R,), (seconds_R,) = market.response([settings])
        return js_R, seconds_R

    return Simulation(driver, respond, workers, TAKE_UP_S).run(seconds, goal, longer)


def pool() -> ProcessPoolExecutor:
    """Make a pool of processes that replay studies."""
    _quiet()
    return ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_quiet)


def _quiet() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def read_space() -> Space:
    """Return the space of the recorded configurations, without its start points."""
    fixed = {"train.epochs": EPOCHS, "train.evals_per_epoch": 2, "train.ema_decay": 0.0, "data.image_size": 48}
    return dataclasses.replace(load_space(SPACE, overrides=fixed), start=())


def read_markets(notes: list[str]) -> list[Market]:
    """Return every set of curves with both responses. The notes get the errors of the responses."""
    space = read_space()
    markets: list[Market] = []
    for file in sorted(CURVES.glob("*.parquet")):
        recorded = read_curves(file, space)
        found = fit_responses(recorded)
        notes.append(
            f"{file.stem}: {len(recorded.settings)} configurations of {recorded.js_NR.shape[1]} reports, "
            f"{recorded.mean_seconds:.0f} core-seconds each. For an unseen configuration, the surrogate is "
            f"off by {found.surrogate_error:.4f} bits in the median (rank correlation {found.rank_correlation:.2f}), "
            f"the nearest by {found.nearest_error:.4f}. Its shortest length scales, in parts of a setting's range: "
            f"{_shortest(recorded.encoding.names, 1 / found.nearest.scales_D)}."
        )
        markets.append(Market(file.stem, "surrogate", space, found.surrogate))
        markets.append(Market(file.stem, "nearest", space, found.nearest))
    return markets


def _shortest(names: Sequence[str], length_D: Floats, most: float = 6.0) -> str:
    """Return the settings with the largest influence on the JS, with their length scales as shares of their ranges."""
    ranked = sorted(zip(length_D, names, strict=True))
    listed = dict.fromkeys(name for length, name in ranked if length < most)
    return ", ".join(f"{name} {min(length for length, its in ranked if its == name):.1f}" for name in listed)


@dataclass(frozen=True)
class Goals:
    """The goals of policies with a number of workers."""

    of_random: float  # JS of random search after its whole time, bits
    of_ray: float  # JS of Ray's search after its share of that time, bits
    best: tuple[float, ...]  # JS of the best configurations, by their shares


def row(
    market: Market, workers: int, policy: str, studies: Sequence[Found], goals: Goals, seconds: float, longer: int
) -> tuple[Any, ...]:
    """Return the results of a policy, and the shares of the budget that it needed for the goals; medians over studies.

    Args:
        market: the curves.
        workers: workers of each study.
        policy: name of the policy.
        studies: one study per seed.
        goals: goals to reach.
        seconds: time of each study.
        longer: number of first studies whose longer time counts for a goal that fewer than half reached in their time.
    """

    def until(js: float) -> float:
        found = float(np.median([one.until(js) for one in studies]))
        return found if np.isfinite(found) else float(np.median([one.until(js) for one in studies[:longer]]))

    budget = market.budget(workers)
    ratios = [budget / until(goals.of_random), budget * SHARE / until(goals.of_ray)]
    found = [np.percentile([one.at(budget * part) for one in studies], [50, 25, 75]) for part in SPENT]
    full_trials = [workers * until(js) / market.full for js in goals.best]
    shown = [count if np.isfinite(count) else "-" for count in full_trials]
    trials = float(np.mean([np.sum(one.begun <= seconds) for one in studies]))
    labels = (market.curves, market.kind, workers, policy, len(studies))
    return (*labels, *ratios, *map(float, np.concatenate(found)), *shown, trials)


def read_rows(results: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read the rows of a saved table, by their key columns."""
    table = json.loads(results.read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], each, strict=True)) for each in table["rows"]]
    return {tuple(each[name] for name in KEY): each for each in rows}
