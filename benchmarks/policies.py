"""How good a model policies of search find for a budget, replayed on recorded learning curves.

A policy is a sampler with a rule of when to stop. It is driven as a study drives it: the same `Searcher` asks and tells
Optuna, the same scheduler of Ray sees every report. Only the training is replayed, in simulated time: a report comes
when a core of its own would have come to it. No policy is given the space's start points.
"""

import copy
import dataclasses
import functools
import heapq
import itertools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.response import Nearest, Recorded, Surrogate, fit_responses, read_curves
from benchmarks.curves.rules import Extrapolating, OfRay, Promoting, Rule, Trial
from raytune_emotion.learn.checkpoint import Report
from raytune_emotion.tuning import sampling
from raytune_emotion.tuning.model import Floats, Forecast, encoding_of
from raytune_emotion.tuning.objective import OBJECTIVES
from raytune_emotion.tuning.searcher import OBJECTIVE, Propose, Searcher, trial_id_of
from raytune_emotion.tuning.space import Space, load_space
from raytune_emotion.tuning.stopping import make_scheduler

CURVES = Path(__file__).parent / "curves"
SPACE = Path("search_spaces/quick.yaml")
#: Of the recorded curves.
EPOCHS = 8
#: Budget of random search, in trials that are trained to their end; all others are replayed for a share of it.
BUDGET, SHARE = 256, 1 / 8
#: What a policy that has not reached a goal by then is given, to see when it does.
LONGER = 1 / 2
#: Simulated workers that all compare on, and those that the parts of this project's policy are compared on.
WORKERS, ALSO = (2, 8, 32), 8
#: Studies that a median is taken over: with the surrogate, and random search also without; and with the nearest.
SEEDS, SEEDS_ALSO = 200, 16
#: Of the parts, of which one takes Optuna seconds to propose, and of those that go on for longer.
SEEDS_PARTS, SEEDS_SLOW = 8, 2
#: Shares of the best among all configurations, whose JS is to be reached.
BEST = (0.05, 0.01)

PER_HOUR = OBJECTIVES["val_js per hour"]


class Policy(Protocol):
    def ask(self) -> tuple[str, Mapping[str, Any]]:
        """A new trial: its id and its settings."""

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        """Whether the trial shall go on; one that has finished has ended either way."""

    def promoted(self) -> str | None:
        """A stopped trial that goes on now, in place of a new one."""


class Study:
    """Trials as a study of this project runs them."""

    def __init__(
        self,
        space: Space,
        rule: Rule,
        seed: int,
        propose: Propose = sampling.propose,
        cost: Callable[[Report], float] | None = None,
    ) -> None:
        self._rule, self._propose = rule, propose
        self._study = optuna.create_study()
        self._searcher = Searcher(self._study, space, seed=seed, propose=self._next, cost=cost)
        # Optuna takes nothing back, so what may go on again is not told to have ended.
        self._paused: set[str] = set()

    def ask(self) -> tuple[str, Mapping[str, Any]]:
        proposal = self._searcher.ask()
        assert proposal is not None  # the space is not finite
        return proposal.trial_id, proposal.settings

    def _next(self, space: Space, past: list[FrozenTrial], seed: int) -> dict[str, Any] | None:
        return self._propose(space, [self._seen(trial) for trial in past], seed)

    def _seen(self, trial: FrozenTrial) -> FrozenTrial:
        if trial_id_of(trial.number) in self._paused:
            trial = copy.copy(trial)
            trial.state = TrialState.PRUNED
        return trial

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        self._searcher.observe(trial_id, report)
        if report["finished"]:
            self._searcher.tell(trial_id, "complete")
            return False
        goes_on = self._rule.keeps(trial_id, report, self.trials)
        if not goes_on and self._rule.pauses:
            self._paused.add(trial_id)
        elif not goes_on:
            self._searcher.tell(trial_id, "pruned")
        return goes_on

    def promoted(self) -> str | None:
        trial_id = self._rule.promoted()
        self._paused -= {trial_id}
        return trial_id

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


class ByOptuna:
    """Trials that a sampler of Optuna proposes, stopped as this project's are; each ending has its name."""

    def __init__(self, space: Space, rule: Rule, sampler: BaseSampler) -> None:
        self._space, self._rule = space, rule
        self._study = optuna.create_study(sampler=sampler)
        self._trials: dict[str, optuna.Trial] = {}

    def ask(self) -> tuple[str, Mapping[str, Any]]:
        trial = self._study.ask()
        trial_id = trial_id_of(trial.number)
        self._trials[trial_id] = trial
        return trial_id, self._space.suggest(trial)

    def report(self, trial_id: str, report: dict[str, Any]) -> bool:
        trial = self._trials[trial_id]
        trial.report(report[OBJECTIVE], report["report"])
        if report["finished"]:
            self._study.tell(trial, report[OBJECTIVE])
            return False
        goes_on = self._rule.keeps(trial_id, report, ())
        if not goes_on:
            self._study.tell(trial, state=TrialState.PRUNED)
        return goes_on

    def promoted(self) -> str | None:
        return None


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
        return not (stopped or report["finished"])

    def promoted(self) -> str | None:
        return None


@dataclass(frozen=True)
class Market:
    """What policies are compared on."""

    space: Space
    response: Nearest | Surrogate
    most_reports: int
    earlier: tuple[Forecast, ...] = ()  # of a study on other curves


def asha(market: Market) -> Rule:
    """This project's."""
    return OfRay(make_scheduler(market.most_reports))


def brackets(market: Market) -> Rule:
    """Asynchronous Hyperband: brackets that stop from the first, the third and the ninth part of the length on."""
    return OfRay(ASHAScheduler("report", OBJECTIVE, "min", max_t=market.most_reports, reduction_factor=3, brackets=3))


def median_rule(market: Market) -> Rule:
    # With slices without end no trial is paused, which a replay of Ray's knows nothing of.
    grace = math.ceil(market.most_reports / 3)
    return OfRay(MedianStoppingRule("report", OBJECTIVE, "min", grace_period=grace, min_time_slice=math.inf))


def extrapolating(market: Market) -> Extrapolating:
    return Extrapolating(encoding_of(market.space), market.most_reports)


Make = Callable[[Market, int], Policy]


def stopped_by(rule: Callable[[Market], Rule]) -> Make:
    return lambda market, seed: Study(market.space, rule(market), seed)


def proposed_by(sampler: Callable[[int], BaseSampler]) -> Make:
    return lambda market, seed: ByOptuna(market.space, asha(market), sampler(seed))


RANDOM, RAY, OURS = "random, nothing stopped", "OptunaSearch + ASHAScheduler", "this project"
#: By name: makes a policy with a seed.
POLICIES: dict[str, Make] = {
    RAY: lambda market, seed: RayAsItComes(market.space, market.most_reports, seed),
    OURS: stopped_by(asha),
}
#: With one part of this project's policy in another's place.
PARTS: dict[str, Make] = {
    "with random proposals": proposed_by(lambda seed: RandomSampler(seed=seed)),
    "with quasi-random proposals": proposed_by(lambda seed: QMCSampler(seed=seed)),
    "with Optuna's TPE": proposed_by(
        lambda seed: TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    ),
    "with Optuna's plain TPE": proposed_by(lambda seed: TPESampler(multivariate=False, seed=seed)),
    "with CMA-ES": proposed_by(lambda seed: CmaEsSampler(seed=seed)),
    "with Optuna's Gaussian process": proposed_by(lambda seed: GPSampler(seed=seed)),
    "nothing stopped": stopped_by(lambda market: OfRay(None)),
    "with Hyperband's brackets": stopped_by(brackets),
    "with the median rule": stopped_by(median_rule),
    "with curves extrapolated": stopped_by(extrapolating),
    "with pauses and promotion": stopped_by(lambda market: Promoting(market.most_reports)),
    "warm-started from the other curves": lambda market, seed: Study(
        market.space, asha(market), seed, functools.partial(sampling.propose, earlier=market.earlier)
    ),
    "for JS per hour": lambda market, seed: Study(
        market.space, asha(market), seed, functools.partial(sampling.propose, objective=PER_HOUR), PER_HOUR.cost
    ),
}
SLOW = {"with Optuna's Gaussian process"}


@dataclass(frozen=True)
class Replay:
    """One simulated study: when the best JS fell, and to what."""

    seconds: Floats  # of the study's clock
    best: Floats  # bits
    begun: Floats  # when its trials began

    def at(self, seconds: float) -> float:
        """The best JS at a time; 1, which is the worst, before the first report."""
        number = int(np.searchsorted(self.seconds, seconds, side="right"))
        return float(self.best[number - 1]) if number else 1.0

    def until(self, js: float) -> float:
        """The time at which a JS was reached; infinite where it was not."""
        reached = np.flatnonzero(self.best <= js)
        return float(self.seconds[reached[0]]) if len(reached) else np.inf


def replay(market: Market, name: str, workers: int, seconds: float, goal: float, longer: float, seed: int) -> Replay:
    """Simulates a study by a policy until its time is over, or longer, until it reaches a JS."""
    np.random.seed(seed)  # noqa: NPY002  # Ray's schedulers draw from it
    if name == RANDOM:
        return at_random(market, workers, seconds, seed)
    return simulate(market, (POLICIES | PARTS)[name](market, seed), workers, seconds, goal, longer)


def at_random(market: Market, workers: int, seconds: float, seed: int) -> Replay:
    """Random search that stops nothing, whose trials know nothing of each other, so that they can be drawn at once."""
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
    order = np.argsort(np.concatenate(times), kind="stable")
    return Replay(np.concatenate(times)[order], np.minimum.accumulate(np.concatenate(found)[order]), np.array(begins))


def drawn(space: Space, seed: int, block: int) -> pd.DataFrame:
    """Some configurations at random, a row each."""
    return sampling.settings_of(space, sampling.candidates(space, [], zlib.crc32(f"{seed}/{block}".encode())))


def simulate(
    market: Market, policy: Policy, workers: int, seconds: float, goal: float = np.inf, longer: float = 0.0
) -> Replay:
    """Runs a policy on replayed reports, each in the order of its time.

    Until the study's time is over; where the goal is not reached then, until it is or the longer time is over too.
    """
    times: list[float] = []
    bests: list[float] = [np.inf]
    begins: list[float] = []
    curves: dict[str, tuple[int, Floats, Floats]] = {}
    done: dict[str, int] = {}
    events: list[tuple[float, int, str]] = []

    def go_on(now: float, trial_id: str) -> None:
        order, _, seconds_R = curves[trial_id]
        heapq.heappush(events, (now + seconds_R[done[trial_id]], order, trial_id))

    def begin(now: float) -> None:
        trial_id = policy.promoted()
        if trial_id is None:
            trial_id, settings = policy.ask()
            (js_R,), (seconds_R,) = market.response([settings])
            curves[trial_id], done[trial_id] = (len(curves), js_R, seconds_R), 0
            begins.append(now)
        go_on(now, trial_id)

    for _ in range(workers):
        begin(0.0)
    while events[0][0] <= (seconds if bests[-1] <= goal else max(seconds, longer)):
        now, _, trial_id = heapq.heappop(events)
        _, js_R, seconds_R = curves[trial_id]
        if js_R[done[trial_id]] < bests[-1]:
            times.append(now)
            bests.append(js_R[done[trial_id]])
        done[trial_id] += 1
        report = {
            "report": done[trial_id],
            "epoch": done[trial_id] * EPOCHS / len(js_R),
            "val_js": float(js_R[done[trial_id] - 1]),
            OBJECTIVE: float(js_R[: done[trial_id]].min()),
            "seconds": float(seconds_R[: done[trial_id]].sum()),
            "finished": done[trial_id] == len(js_R),
        }
        if policy.report(trial_id, report):
            go_on(now, trial_id)
        else:
            begin(now)
    return Replay(np.array(times), np.array(bests[1:]), np.array(begins))


def _quiet() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def pool() -> ProcessPoolExecutor:
    """Processes that replay."""
    _quiet()
    return ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_quiet)


def run() -> Table:
    space = read_space()
    notes = [
        f"Medians over the seeds named. Random search has the time of {BUDGET} full trials, all others a "
        f"{round(1 / SHARE)}th of it. Where this project has not reached random's JS by then, the first {SEEDS_PARTS} "
        f"of its seeds go on, up to {LONGER:g} of that time: when a JS is reached that most had not come to, is the "
        f"median of those. The best {BEST[0]:.0%} and {BEST[1]:.0%} are of all configurations. A ratio of 0, and a "
        f"dash: not reached. 'The fastest configuration' is, of 20,000, the one that would get there soonest by "
        f"itself: no policy can be faster."
    ]
    rows: list[tuple[Any, ...]] = []
    with pool() as processes:
        markets = read_markets(space, notes)
        for (name, kind, market, full), workers in track([*product(markets, WORKERS)], "policies"):
            rows += compare(processes, market, workers, full, (name, kind, workers))
    columns = (
        "curves", "response", "workers", "policy", "seeds",
        "budget of random search over its own, to random's JS", "budget of Ray's over its own, to Ray's JS",
        "JS at 1/16 of random's budget", "quartile", "quartile", "JS at 1/8", "quartile", "quartile",
        *(f"full trials to the best {share:.0%}" for share in BEST), "trials",
    )  # fmt: skip
    return Table(columns, rows, notes)


def read_markets(space: Space, notes: list[str]) -> list[tuple[str, str, Market, float]]:
    """Every set of curves with both ways to answer between them, and the core-seconds of a full trial."""
    recorded = {file.stem: read_curves(file, space) for file in sorted(CURVES.glob("*.parquet"))}
    fitted = {name: fit_responses(each) for name, each in recorded.items()}
    learned = {name: _learned(space, fitted[name].surrogate, each) for name, each in recorded.items()}
    markets: list[tuple[str, str, Market, float]] = []
    for name, each in recorded.items():
        found = fitted[name]
        notes.append(
            f"{name}: {len(each.settings)} configurations of {each.js_NR.shape[1]} reports, {each.mean_seconds:.0f} "
            f"core-seconds each. Of a configuration that it has not seen, the surrogate is off by "
            f"{found.surrogate_error:.4f} bits in the median (rank correlation {found.rank_correlation:.2f}), the "
            f"nearest by {found.nearest_error:.4f}. The shortest of its lengths, in parts of a setting's range: "
            f"{_shortest(each.encoding.names, 1 / found.nearest.scales_D)}."
        )
        others = tuple(forecast for other, forecast in learned.items() if other != name)
        for kind, response in (("surrogate", found.surrogate), ("nearest", found.nearest)):
            markets.append((name, kind, Market(space, response, each.js_NR.shape[1], others), each.mean_seconds))
    return markets


def _shortest(names: Sequence[str], length_D: Floats, most: float = 6.0) -> str:
    """Which settings matter most to the JS, and over what a part of their range."""
    ranked = sorted(zip(length_D, names, strict=True))
    listed = dict.fromkeys(name for length, name in ranked if length < most)
    return ", ".join(f"{name} {min(length for length, its in ranked if its == name):.1f}" for name in listed)


def _learned(space: Space, response: Surrogate, recorded: Recorded) -> Forecast:
    """What a study on these curves, in the time of 32 full trials, says to a later one."""
    market = Market(space, response, recorded.js_NR.shape[1])
    study = Study(space, asha(market), seed=SEEDS)
    simulate(market, study, 2, BUDGET * SHARE * recorded.mean_seconds / 2)
    return Forecast(encoding_of(space), sampling.curves(study.trials))


def compare(
    processes: ProcessPoolExecutor, market: Market, workers: int, full: float, labels: tuple[Any, ...]
) -> list[tuple[Any, ...]]:
    """How much less of the budget each policy needs for the JS that others reach with theirs; medians over seeds."""
    budget = BUDGET * full / workers

    def replays(name: str, seconds: float, seeds: Sequence[int], goal: float, longer: float) -> list[Replay]:
        each = (*map(repeat, (market, name, workers, seconds, goal, longer)), seeds)
        return list(processes.map(replay, *each, chunksize=max(1, len(seeds) // 8)))

    random = replays(RANDOM, budget, range(SEEDS), np.inf, 0.0)
    goal = float(np.median([one.at(budget) for one in random]))
    done = {RANDOM: random}
    for name in [*POLICIES, *(PARTS if workers == ALSO else ())]:
        whole = SEEDS if isinstance(market.response, Surrogate) else SEEDS_ALSO
        count = SEEDS_SLOW if name in SLOW else SEEDS_PARTS if name in PARTS else whole
        longer = SEEDS_PARTS if name == OURS else 0
        done[name] = replays(name, budget * SHARE, range(longer), goal, budget * LONGER)
        done[name] += replays(name, budget * SHARE, range(longer, count), np.inf, 0.0)
    to_ray = float(np.median([one.at(budget * SHARE) for one in done[RAY]]))
    every = [market.response(drawn(market.space, SEEDS, block)) for block in range(20)]
    js_MR, seconds_MR = (np.concatenate(part) for part in zip(*every, strict=True))
    goals = np.quantile(js_MR.min(axis=1), BEST)
    done["the fastest configuration"] = [_soonest(js_MR, np.cumsum(seconds_MR, axis=1))]
    rows = []
    for name, studies in done.items():
        went_on = studies[:SEEDS_PARTS] if name == OURS else studies
        until = [workers * _reached(studies, went_on, js) / full for js in goals]
        shown = [time if np.isfinite(time) else "-" for time in until]
        given = budget if name == RANDOM else budget * SHARE
        trials = float(np.mean([np.sum(one.begun <= given) for one in studies]))
        rows.append((*labels, name, len(studies), *summary(studies, went_on, budget, goal, to_ray), *shown, trials))
    return rows


def summary(
    studies: Sequence[Replay], went_on: Sequence[Replay], budget: float, goal: float, to_ray: float
) -> tuple[float, ...]:
    """How much less of the budget they need for random's JS and for Ray's, and medians and quartiles of theirs."""
    ratios = [budget / _reached(studies, went_on, goal), budget * SHARE / _reached(studies, went_on, to_ray)]
    found = [np.percentile([one.at(budget * part) for one in studies], [50, 25, 75]) for part in (SHARE / 2, SHARE)]
    return (*ratios, *map(float, np.concatenate(found)))


def _reached(studies: Sequence[Replay], went_on: Sequence[Replay], js: float) -> float:
    """When a JS is reached in the median; of those that went on, where too few of all have come to it."""
    found = float(np.median([one.until(js) for one in studies]))
    return found if np.isfinite(found) else float(np.median([one.until(js) for one in went_on]))


def _soonest(js_MR: Floats, seconds_MR: Floats) -> Replay:
    """All configurations as if they were one study's, each of which had begun at its start."""
    order = np.argsort(seconds_MR, axis=None)
    best = np.minimum.accumulate(js_MR.ravel()[order])
    return Replay(seconds_MR.ravel()[order], best, np.zeros(1))


def read_space() -> Space:
    """The space that the configurations were drawn from, without its start points."""
    fixed = {"train.epochs": EPOCHS, "train.evals_per_epoch": 2, "train.ema_decay": 0.0, "data.image_size": 48}
    return dataclasses.replace(load_space(SPACE, overrides=fixed), start=())
