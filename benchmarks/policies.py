"""How good a model this project's policy of search finds for a budget, whole and with its parts replaced.

Replayed on recorded learning curves, and measured by what others had reached in `rivals`. The policy is driven as a
study drives it: the same `Searcher` asks and tells Optuna, the same scheduler sees every report.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.replay import (
    BUDGET,
    COLUMNS,
    EPOCHS,
    SHARE,
    WORKERS,
    Make,
    Market,
    Policy,
    pool,
    read_markets,
    replays,
    row,
    simulate,
)
from benchmarks.curves.rules import Extrapolating, OfRay, Promoting, Rule, Stopping
from benchmarks.rivals import kept_goals
from raytune_emotion.learn.report import OBJECTIVE, Report
from raytune_emotion.tuning.policy import sampler
from raytune_emotion.tuning.policy.decisions import Begin
from raytune_emotion.tuning.policy.forecast import Forecast, encoding_of
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.policy.scheduler import Halving
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.optuna_study import Proposal, Searcher, trial_id_of

#: What a policy that has not reached a goal by then is given, to see when it does, of random search's time.
LONGER = 1 / 2
#: The workers that parts are compared on.
ALSO = 8
#: Studies that a median is taken over: with the surrogate, of which some go on for longer; with the nearest; of the
#: parts; and of the one that takes Optuna seconds to propose.
SEEDS, SEEDS_LONGER, SEEDS_NEAREST, SEEDS_PARTS, SEEDS_SLOW = 200, 48, 16, 16, 4
OURS = "this project"

PER_HOUR = OBJECTIVES["val_js per hour"]


#: Of a space, the past and a seed: Optuna's parameters of a new configuration, or None where there is none.
Propose = Callable[[Space, list[FrozenTrial], int], dict[str, Any] | None]


class Study:
    """Trials as a study of this project runs them."""

    def __init__(
        self,
        space: Space,
        rule: Rule,
        seed: int,
        propose: Propose = sampler.propose,
        cost: Callable[[Report], float] | None = None,
    ) -> None:
        self._rule, self._propose = rule, propose
        self._study = optuna.create_study()
        self._searcher = Searcher(self._study, space, seed=seed, propose=self._next, cost=cost)
        # Optuna takes nothing back, so what may go on again is not told to have ended.
        self._paused: set[str] = set()

    def ask(self) -> tuple[str, Mapping[str, Any]]:
        proposal = self._searcher.ask()
        assert isinstance(proposal, Proposal)  # the space is not finite
        return proposal.trial_id, proposal.settings

    def _next(self, space: Space, past: list[FrozenTrial], seed: int, *, new: bool) -> Begin | None:
        params = self._propose(space, [self._seen(trial) for trial in past], seed)
        return None if params is None else Begin(params)

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


def asha(market: Market) -> Rule:
    """This project's."""
    return Stopping(Halving(EPOCHS))


def brackets(market: Market) -> Rule:
    """Asynchronous Hyperband: brackets that stop from the first, the third and the ninth part of the length on."""
    return OfRay(ASHAScheduler("report", OBJECTIVE, "min", max_t=market.most_reports, reduction_factor=3, brackets=3))


def median_rule(market: Market) -> Rule:
    # With slices without end no trial is paused, which a replay of Ray's knows nothing of.
    grace = math.ceil(market.most_reports / 3)
    return OfRay(MedianStoppingRule("report", OBJECTIVE, "min", grace_period=grace, min_time_slice=math.inf))


def extrapolating(market: Market) -> Extrapolating:
    return Extrapolating(encoding_of(market.space), market.most_reports)


def ours(market: Market, seed: int) -> Study:
    return Study(market.space, asha(market), seed)


def stopped_by(rule: Callable[[Market], Rule]) -> Make:
    return lambda market, seed: Study(market.space, rule(market), seed)


def proposed_by(sampler: Callable[[int], BaseSampler]) -> Make:
    return lambda market, seed: ByOptuna(market.space, asha(market), sampler(seed))


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
    "for JS per hour": lambda market, seed: Study(
        market.space, asha(market), seed, functools.partial(sampler.propose, objective=PER_HOUR), PER_HOUR.cost
    ),
}
SLOW = "with Optuna's Gaussian process"


def part(name: str, market: Market, seed: int) -> Policy:
    """By its name, as other processes cannot be sent it itself."""
    return PARTS[name](market, seed)


def warm_started(earlier: Forecast, market: Market, seed: int) -> Study:
    return Study(market.space, asha(market), seed, functools.partial(sampler.propose, earlier=[earlier]))


def run() -> Table:
    notes = [
        f"Medians over the seeds named. Every study has 1/{1 / SHARE:g} of the time of {BUDGET} full trials, "
        f"which random search had. Of this project, the first {SEEDS_LONGER} seeds (with the nearest, all) that have "
        f"not reached random's JS by then go on, up to {LONGER:g} of that time: when a JS is reached that most had not "
        f"come to, is the median of those. A ratio of 0, and a dash: not reached."
    ]
    rows: list[tuple[Any, ...]] = []
    with pool() as processes:
        markets = read_markets(notes)
        learned = {market.curves: _learned(market) for market in markets if market.kind == "surrogate"}
        for market, workers in track([*product(markets, WORKERS)], "policies"):
            rows.append(_whole(processes, market, workers))
            if workers == ALSO:
                (earlier,) = (forecast for curves, forecast in learned.items() if curves != market.curves)
                rows += _parts(processes, market, earlier)
    return Table(COLUMNS, rows, notes)


def _whole(processes: ProcessPoolExecutor, market: Market, workers: int) -> tuple[Any, ...]:
    seconds, goals = market.budget(workers) * SHARE, kept_goals(market, workers)
    count = SEEDS if market.kind == "surrogate" else SEEDS_NEAREST
    longer = min(SEEDS_LONGER, count)
    until = goals.of_random, market.budget(workers) * LONGER
    studies = replays(processes, ours, market, workers, range(longer), seconds, *until)
    studies += replays(processes, ours, market, workers, range(longer, count), seconds)
    return row(market, workers, OURS, studies, goals, seconds, longer)


def _parts(processes: ProcessPoolExecutor, market: Market, earlier: Forecast) -> list[tuple[Any, ...]]:
    seconds, goals = market.budget(ALSO) * SHARE, kept_goals(market, ALSO)
    makes: dict[str, Make] = {name: functools.partial(part, name) for name in PARTS}
    makes["warm-started from the other curves"] = functools.partial(warm_started, earlier)
    rows = []
    for name, make in makes.items():
        count = SEEDS_SLOW if name == SLOW else SEEDS_PARTS
        studies = replays(processes, make, market, ALSO, range(count), seconds)
        rows.append(row(market, ALSO, name, studies, goals, seconds, count))
    return rows


def _learned(market: Market) -> Forecast:
    """What a study on these curves, in the time of 32 full trials, says to a later one."""
    study = ours(market, SEEDS)
    simulate(market, study, 2, market.budget(2) * SHARE)
    return Forecast(encoding_of(market.space), sampler.curves(study.trials))
