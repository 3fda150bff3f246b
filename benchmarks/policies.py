"""How good a model policies of search find for a budget, replayed on recorded learning curves.

A policy is a sampler with a rule of when to stop. It is driven as a study drives it: the same `Searcher` asks and tells
Optuna, the same scheduler of Ray sees every report. Only the training is replayed, in simulated time: a report comes
when a core of its own would have come to it. No policy is given the space's start points.
"""

import dataclasses
import functools
import heapq
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.response import Nearest, Recorded, Surrogate, fit_responses, read_curves
from raytune_emotion.tuning import sampling
from raytune_emotion.tuning.model import Forecast, encoding_of
from raytune_emotion.tuning.searcher import OBJECTIVE, Propose, Searcher
from raytune_emotion.tuning.space import Space, load_space
from raytune_emotion.tuning.stopping import make_scheduler

CURVES = Path(__file__).parent / "curves"
SPACE = Path("search_spaces/quick.yaml")
#: Budget of random search, in trials that are trained to their end; all others are replayed for a share of it.
BUDGET, SHARE = 256, 1 / 8
#: Simulated workers that all compare on, and those that the parts of this project's policy are compared on.
WORKERS, ALSO = (2, 8, 32), 8
#: Studies a median is taken over.
SEEDS, SEEDS_ALSO = 16, 8


class Policy(Protocol):
    def ask(self) -> tuple[str, Mapping[str, Any]]:
        """A new trial: its id and its settings."""

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        """Whether the trial shall go on; one that has finished has ended either way."""


@dataclass(frozen=True)
class Trial:
    """All that Ray's schedulers ask of one of theirs."""

    trial_id: str


class Study:
    """Trials as a study of this project runs them."""

    def __init__(
        self, space: Space, scheduler: TrialScheduler | None, seed: int, propose: Propose = sampling.propose
    ) -> None:
        self._space, self._study = space, optuna.create_study()
        self._searcher = Searcher(self._study, space, seed=seed, propose=propose)
        self._scheduler = scheduler

    def ask(self) -> tuple[str, Mapping[str, Any]]:
        proposal = self._searcher.ask()
        assert proposal is not None  # the space is not finite
        if self._scheduler is not None:
            self._scheduler.on_trial_add(None, Trial(proposal.trial_id))
        return proposal.trial_id, proposal.settings

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        self._searcher.observe(trial_id, report)
        trial: Any = Trial(trial_id)
        stopped = (
            self._scheduler is not None and self._scheduler.on_trial_result(None, trial, report) == TrialScheduler.STOP
        )
        if report["finished"]:
            self._searcher.tell(trial_id, "complete")
        elif stopped:
            self._searcher.tell(trial_id, "pruned")
        return not stopped

    def learned(self) -> Forecast:
        """What this study says to a later one."""
        return Forecast(encoding_of(self._space), sampling.curves(self._study.get_trials(deepcopy=False)))


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
        self._scheduler.on_trial_add(None, Trial(trial_id))
        return trial_id, self._settings

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        result = {"training_iteration": report["report"], "val_js": report["val_js"]}
        trial: Any = Trial(trial_id)
        stopped = self._scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP
        if stopped or report["finished"]:
            self._search.on_trial_complete(trial_id, result)
        else:
            self._search.on_trial_result(trial_id, result)
        return not stopped


def by_optuna(make: Callable[[int], BaseSampler]) -> Propose:
    """Proposes what a sampler of Optuna does that is told of the past."""

    def propose(space: Space, past: Sequence[FrozenTrial], seed: int) -> dict[str, Any]:
        study = optuna.create_study(sampler=make(seed))
        study.add_trials(past)
        trial = study.ask()
        space.suggest(trial)
        return trial.params

    return propose


@dataclass(frozen=True)
class Market:
    """What policies are compared on."""

    space: Space
    response: Nearest | Surrogate
    most_reports: int
    earlier: tuple[Forecast, ...] = ()  # of a study on other curves


propose_random = by_optuna(lambda seed: RandomSampler(seed=seed))
propose_tpe = by_optuna(lambda seed: TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed))


def brackets(most_reports: int) -> TrialScheduler:
    """Asynchronous Hyperband: brackets that stop from the first, the third and the ninth part of the length on."""
    return ASHAScheduler("report", OBJECTIVE, "min", max_t=most_reports, reduction_factor=3, brackets=3)


def median_rule(most_reports: int) -> TrialScheduler:
    # With slices without end no trial is paused, which a replay knows nothing of.
    grace = math.ceil(most_reports / 3)
    return MedianStoppingRule("report", OBJECTIVE, "min", grace_period=grace, min_time_slice=math.inf)


RANDOM, RAY, OURS = "random, nothing stopped", "OptunaSearch + ASHAScheduler", "this project"
#: By name: makes a policy with a seed.
POLICIES: dict[str, Callable[[Market, int], Policy]] = {
    RANDOM: lambda market, seed: Study(market.space, None, seed, propose_random),
    RAY: lambda market, seed: RayAsItComes(market.space, market.most_reports, seed),
    OURS: lambda market, seed: Study(market.space, make_scheduler(market.most_reports), seed),
}
#: With one part of this project's policy in another's place.
PARTS: dict[str, Callable[[Market, int], Policy]] = {
    "with random proposals": lambda market, seed: Study(
        market.space, make_scheduler(market.most_reports), seed, propose_random
    ),
    "with Optuna's TPE": lambda market, seed: Study(
        market.space, make_scheduler(market.most_reports), seed, propose_tpe
    ),
    "nothing stopped": lambda market, seed: Study(market.space, None, seed),
    "with Hyperband's brackets": lambda market, seed: Study(market.space, brackets(market.most_reports), seed),
    "with the median rule": lambda market, seed: Study(market.space, median_rule(market.most_reports), seed),
    "warm-started from the other curves": lambda market, seed: Study(
        market.space,
        make_scheduler(market.most_reports),
        seed,
        functools.partial(sampling.propose, earlier=market.earlier),
    ),
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


def replay(market: Market, name: str, workers: int, seconds: float, seed: int) -> Replay:
    """Simulates a study by a policy until its time is over."""
    np.random.seed(seed)  # noqa: NPY002  # Ray's schedulers draw from it
    return simulate(market, (POLICIES | PARTS)[name](market, seed), workers, seconds)


def simulate(market: Market, policy: Policy, workers: int, seconds: float) -> Replay:
    """Runs a policy on replayed reports, each in the order of its time, until the study's time is over."""
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


def run() -> Table:
    _quiet()
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_quiet) as pool:
        return _run(pool)


def _run(pool: ProcessPoolExecutor) -> Table:
    space = read_space()
    recorded = {file.stem: read_curves(file, space) for file in sorted(CURVES.glob("*.parquet"))}
    fitted = {name: fit_responses(each) for name, each in recorded.items()}
    learned = {name: _learned(space, fitted[name].surrogate, each) for name, each in recorded.items()}
    notes = [
        f"Medians over {SEEDS} seeds, {SEEDS_ALSO} for the parts. Random search has the time of {BUDGET} full trials, "
        f"all others a {round(1 / SHARE)}th of it. A ratio of 0: not reached within that."
    ]
    markets: list[tuple[str, str, Market, float]] = []
    for name, each in recorded.items():
        found = fitted[name]
        notes.append(
            f"{name}: {len(each.settings)} configurations of {each.js_NR.shape[1]} reports, {each.mean_seconds:.0f} "
            f"core-seconds each. Of a configuration that it has not seen, the surrogate is off by "
            f"{found.surrogate_error:.4f} bits in the median (rank correlation {found.rank_correlation:.2f}), the "
            f"nearest by {found.nearest_error:.4f}."
        )
        others = tuple(forecast for other, forecast in learned.items() if other != name)
        for kind, response in (("surrogate", found.surrogate), ("nearest", found.nearest)):
            market = Market(space, response, each.js_NR.shape[1], others)
            markets.append((name, kind, market, BUDGET * each.mean_seconds))
    rows: list[tuple[Any, ...]] = []
    for (name, kind, market, core_seconds), workers in track([*product(markets, WORKERS)], "policies"):
        rows += compare(pool, market, workers, core_seconds / workers, (name, kind, workers))
    columns = (
        "curves", "response", "workers", "policy", "budget of random search over its own, to random's JS",
        "budget of Ray's over its own, to Ray's JS", "JS at 1/16 of random's budget", "quartile", "quartile",
        "JS at 1/8", "quartile", "quartile", "trials",
    )  # fmt: skip
    return Table(columns, rows, notes)


def _learned(space: Space, response: Surrogate, recorded: Recorded) -> Forecast:
    """What a study on these curves, in the time of 32 full trials, says to a later one."""
    market = Market(space, response, recorded.js_NR.shape[1])
    study = Study(space, make_scheduler(market.most_reports), seed=SEEDS)
    simulate(market, study, 2, BUDGET * SHARE * recorded.mean_seconds / 2)
    return study.learned()


def compare(
    pool: ProcessPoolExecutor, market: Market, workers: int, budget: float, labels: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    """How much less of the budget each policy needs for the JS that others reach with theirs; medians over seeds."""
    times = {name: budget if name == RANDOM else budget * SHARE for name in POLICIES}
    done = {name: replays(pool, market, name, workers, times[name], range(SEEDS)) for name in POLICIES}
    goals = [(times[name], float(np.median([one.at(times[name]) for one in done[name]]))) for name in (RANDOM, RAY)]
    if workers == ALSO:
        done |= {name: replays(pool, market, name, workers, budget * SHARE, range(SEEDS_ALSO)) for name in PARTS}
    rows = []
    for name, studies in done.items():
        ratios = [given / float(np.median([one.until(js) for one in studies])) for given, js in goals]
        found = [np.percentile([one.at(budget * part) for one in studies], [50, 25, 75]) for part in (SHARE / 2, SHARE)]
        trials = float(np.mean([one.trials for one in studies]))
        rows.append((*labels, name, *ratios, *map(float, np.concatenate(found)), trials))
    return rows


def read_space() -> Space:
    """The space that the configurations were drawn from, without its start points."""
    fixed = {"train.epochs": 8, "train.evals_per_epoch": 2, "train.ema_decay": 0.0, "data.image_size": 48}
    return dataclasses.replace(load_space(SPACE, overrides=fixed), start=())
