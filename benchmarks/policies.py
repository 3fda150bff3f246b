"""How good a model policies of search find for a budget, replayed on recorded learning curves.

A policy is a sampler with a rule of when to stop. It is driven as a study drives it: the same `Searcher` asks and tells
Optuna, the same scheduler of Ray sees every report. Only the training is replayed, in simulated time: a report comes
when a core of its own would have come to it. No policy is given the space's start points.
"""

import dataclasses
import heapq
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks import Table
from benchmarks.curves.response import Nearest, Surrogate, fit_responses, read_curves
from raytune_emotion.tuning import sampling
from raytune_emotion.tuning.searcher import OBJECTIVE, Propose, Searcher
from raytune_emotion.tuning.space import Space, load_space
from raytune_emotion.tuning.stopping import make_scheduler

CURVES = Path(__file__).parent / "curves"
SPACE = Path("search_spaces/quick.yaml")
#: Simulated workers, and the budget of random search in trials that are trained to their end.
BUDGETS = {2: 64, 8: 128}


class Policy(Protocol):
    def ask(self) -> tuple[str, Mapping[str, Any]]:
        """A new trial: its id and its settings."""

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        """Whether the trial shall go on; one that has finished has ended either way."""


class Study:
    """Trials as a study of this project runs them."""

    def __init__(
        self, space: Space, scheduler: TrialScheduler | None, seed: int, propose: Propose = sampling.propose
    ) -> None:
        self._searcher = Searcher(optuna.create_study(), space, seed=seed, propose=propose)
        self._scheduler = scheduler

    def ask(self) -> tuple[str, Mapping[str, Any]]:
        proposal = self._searcher.ask()
        assert proposal is not None  # the space is not finite
        if self._scheduler is not None:
            self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=proposal.trial_id))
        return proposal.trial_id, proposal.settings

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        self._searcher.observe(trial_id, report)
        trial: Any = SimpleNamespace(trial_id=trial_id)
        stopped = (
            self._scheduler is not None and self._scheduler.on_trial_result(None, trial, report) == TrialScheduler.STOP
        )
        if report["finished"]:
            self._searcher.tell(trial_id, "complete")
        elif stopped:
            self._searcher.tell(trial_id, "pruned")
        return not stopped


class RayAsItComes:
    """Ray's `OptunaSearch` with its `ASHAScheduler`, with nothing set but the metric, the seed and the length."""

    def __init__(self, space: Space, most_reports: int, seed: int) -> None:
        self._settings: dict[str, Any] = {}

        def define(trial: Any) -> None:
            self._settings = space.suggest(trial)

        self._search = OptunaSearch(define, metric="val_js", mode="min", seed=seed)
        self._scheduler = ASHAScheduler(metric="val_js", mode="min", max_t=most_reports)
        self._asked = 0

    def ask(self) -> tuple[str, Mapping[str, Any]]:
        trial_id = f"{self._asked:04d}"
        self._asked += 1
        self._search.suggest(trial_id)
        self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=trial_id))
        return trial_id, self._settings

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        result = {"training_iteration": report["report"], "val_js": report["val_js"]}
        trial: Any = SimpleNamespace(trial_id=trial_id)
        stopped = self._scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if stopped or report["finished"]:
            self._search.on_trial_complete(trial_id, result)
        else:
            self._search.on_trial_result(trial_id, result)
        return not stopped


def propose_random(space: Space, past: Sequence[FrozenTrial], seed: int) -> dict[str, Any]:
    """Draws from the space, whatever the past."""
    trial = optuna.create_study(sampler=RandomSampler(seed=seed)).ask()
    space.suggest(trial)
    return trial.params


RANDOM, RAY, OURS = "random, nothing stopped", "OptunaSearch + ASHAScheduler", "this project"
#: By name: makes a policy of a space, the number of reports of a whole trial, and a seed.
POLICIES: dict[str, Callable[[Space, int, int], Policy]] = {
    RANDOM: lambda space, most, seed: Study(space, None, seed, propose_random),
    RAY: RayAsItComes,
    OURS: lambda space, most, seed: Study(space, make_scheduler(most), seed),
    "random, stopped as here": lambda space, most, seed: Study(space, make_scheduler(most), seed, propose_random),
}


@dataclass(frozen=True)
class Replay:
    """One simulated study: when the best JS fell, and to what."""

    seconds: np.ndarray  # of the study's clock
    best: np.ndarray  # bits
    trials: int

    def at(self, seconds: float) -> float:
        """The best JS at a time; 1, which is the worst, before the first report."""
        number = int(np.searchsorted(self.seconds, seconds, side="right"))
        return float(self.best[number - 1]) if number else 1.0

    def until(self, js: float) -> float:
        """The time at which a JS was reached; infinite where it was not."""
        reached = np.flatnonzero(self.best <= js)
        return float(self.seconds[reached[0]]) if len(reached) else np.inf


@dataclass(frozen=True)
class Market:
    """What policies are compared on."""

    space: Space
    response: Nearest | Surrogate
    most_reports: int


def replay(market: Market, name: str, workers: int, seconds: float, seed: int) -> Replay:
    """Simulates a study of a policy until its time is over."""
    np.random.seed(seed)  # noqa: NPY002  # Ray's schedulers draw from it
    policy = POLICIES[name](market.space, market.most_reports, seed)
    asked = 0
    times: list[float] = []
    bests: list[float] = []

    def begin(now: float) -> tuple[Any, ...]:
        nonlocal asked
        asked += 1
        trial_id, settings = policy.ask()
        js_R, seconds_R = market.response(settings)
        return now + seconds_R[0], asked, trial_id, js_R, seconds_R, 0

    events = [begin(0.0) for _ in range(workers)]
    heapq.heapify(events)
    while events[0][0] <= seconds:
        now, order, trial_id, js_R, seconds_R, done = heapq.heappop(events)
        if not bests or js_R[done] < bests[-1]:
            times.append(now)
            bests.append(js_R[done])
        done += 1
        finished = done == len(js_R)
        report = {
            "report": done,
            "val_js": float(js_R[done - 1]),
            OBJECTIVE: float(js_R[:done].min()),
            "seconds": float(seconds_R[:done].sum()),
            "finished": finished,
        }
        if policy.report(trial_id, report) and not finished:
            heapq.heappush(events, (now + seconds_R[done], order, trial_id, js_R, seconds_R, done))
        else:
            heapq.heappush(events, begin(now))
    return Replay(np.array(times), np.array(bests), asked)


def replays(
    pool: ProcessPoolExecutor, market: Market, name: str, workers: int, seconds: float, seeds: Sequence[int]
) -> list[Replay]:
    """Simulated studies of a policy, one a seed."""
    each = (repeat(market), repeat(name), repeat(workers), repeat(seconds), seeds)
    return list(pool.map(replay, *each, chunksize=max(1, len(seeds) // 8)))


def _quiet() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


#: A policy is replayed for this share of the budget that random search has.
SHARE = 1 / 4
SEEDS = 24


def run() -> Table:
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_quiet) as pool:
        return _run(pool)


def _run(pool: ProcessPoolExecutor) -> Table:
    rows: list[tuple[Any, ...]] = []
    notes = [f"Medians over {SEEDS} seeds. A ratio of 0: not reached within {SHARE:g} of random's budget."]
    for file in sorted(CURVES.glob("*.parquet")):
        recorded = read_curves(file, read_space())
        fitted = fit_responses(recorded)
        notes.append(
            f"{file.stem}: {len(recorded.settings)} configurations of {recorded.js_NR.shape[1]} reports, "
            f"{recorded.mean_seconds:.0f} core-seconds each. Of a configuration that it has not seen, the surrogate is "
            f"off by {fitted.surrogate_error:.4f} bits in the median (rank correlation {fitted.rank_correlation:.2f}), "
            f"the nearest by {fitted.nearest_error:.4f}."
        )
        for kind, response in (("surrogate", fitted.surrogate), ("nearest", fitted.nearest)):
            market = Market(read_space(), response, recorded.js_NR.shape[1])
            for workers, full in BUDGETS.items():
                budget = full * recorded.mean_seconds / workers
                rows += compare(pool, market, workers, budget, (file.stem, kind, workers))
    columns = (
        "curves", "response", "workers", "policy", "budget of random search over its own, to random's JS",
        "budget of Ray's over its own, to Ray's JS", "JS at 1/8 of random's budget", "quartile", "quartile",
        "JS at 1/4", "quartile", "quartile", "trials",
    )  # fmt: skip
    return Table(columns, rows, notes)


def compare(
    pool: ProcessPoolExecutor, market: Market, workers: int, budget: float, labels: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    """How much less of the budget each policy needs for the JS that others reach with theirs; medians over seeds."""
    seeds = range(SEEDS)
    times = {name: budget if name == RANDOM else budget * SHARE for name in POLICIES}
    done = {name: replays(pool, market, name, workers, times[name], seeds) for name in POLICIES}
    goals = [(times[name], float(np.median([one.at(times[name]) for one in done[name]]))) for name in (RANDOM, RAY)]
    rows = []
    for name, studies in done.items():
        ratios = [given / float(np.median([one.until(js) for one in studies])) for given, js in goals]
        found = [np.percentile([one.at(budget * share) for one in studies], [50, 25, 75]) for share in (1 / 8, SHARE)]
        trials = float(np.mean([one.trials for one in studies]))
        rows.append((*labels, name, *ratios, *map(float, np.concatenate(found)), trials))
    return rows


def read_space() -> Space:
    """The space that the configurations were drawn from, without its start points."""
    fixed = {"train.epochs": 8, "train.evals_per_epoch": 2, "data.image_size": 48}
    return dataclasses.replace(load_space(SPACE, overrides=fixed), start=())
