"""Replay search policies on recorded learning curves, and compare their results.

A configuration that a policy asks for is replaced by the nearest recorded one that was not used yet. The trial gets the
settings of that one.
"""

import argparse
import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import table_console
from benchmarks.alternatives import (
    EqualLengths,
    Mixed,
    OptimizerLengths,
    OtherScores,
    RandomGoal,
    RandomHorizon,
    ThompsonDraw,
)
from benchmarks.former import FormerSampler
from benchmarks.simulation import LIMITS, Found, Simulation
from raytune_emotion.data.cores import usable_cores
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.policy.candidates import Params, domain_of, draw_candidates, settings_key
from raytune_emotion.tuning.policy.decisions import Answer, Begin, Decision, Limits, Policy, Recorded
from raytune_emotion.tuning.policy.forecast import Forecast
from raytune_emotion.tuning.policy.gaussian_process import Floats, on_one_thread
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.outlook import Outlook
from raytune_emotion.tuning.policy.policies import BeginAndStop
from raytune_emotion.tuning.policy.portfolio import Portfolio, portfolio_of
from raytune_emotion.tuning.policy.sampler import make_sampler
from raytune_emotion.tuning.policy.scheduler import Halving, RunToEnd, Scheduler, rungs_of
from raytune_emotion.tuning.policy.trial_attributes import START
from raytune_emotion.tuning.policy.warm_start import forecasts_of
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.optuna_study import Searcher

#: Shares of the budget at which the best value is reported.
SPENT = (0.05, 0.1, 0.25, 0.5, 1.0)
#: Number of recorded configurations that are compared in a choice.
_DRAWN = 500
DEFAULT, RANDOM = "default", "random"
#: Policies that show the effect of the portfolio: the default without one, and with a misleading one.
WITHOUT, MISLED = "no-portfolio", "misled"
#: Policies with other scores of what to train next, without a portfolio.
THOMPSON, GOALS, MIXED, HORIZONS = "thompson", "goals", "mixed", "horizons"
#: Policies with other priors of the length scales, without a portfolio: the same for all settings, and, on Taskset,
#: those of this project's optimizers.
EQUAL, AS_OPTIM = "no-lengths", "optim-lengths"
#: Name of all recordings together.
_ALL = "all recordings"
#: Policies that are compared only by name.
_SEPARATE = (WITHOUT, MISLED, THOMPSON, GOALS, MIXED, HORIZONS, EQUAL, AS_OPTIM)


@dataclass(frozen=True)
class Recording:
    """N fully trained configurations with R reports each."""

    name: str
    space: Space
    params: Sequence[Mapping[str, Any]]  # parameters of Optuna, [N]
    value_NR: Floats  # lowest value until each report
    seconds_NR: Floats  # seconds since the previous report
    budget: float  # seconds of all workers together
    take_up_s: float  # cost of resuming a paused trial, seconds
    choose: bool  # whether this project's policies see which configurations were recorded
    #: Bounds between which a value is a regret from 0 to 1; None: values are reported unchanged.
    bounds: tuple[float, float] | None = None
    trials: int | None = None  # number of trials that a study may begin; None: all
    #: Start points of every study: the nearest recorded configuration to each of these parameters is used.
    start: Sequence[Mapping[str, Any]] = ()

    @property
    def reports(self) -> int:
        return int(self.value_NR.shape[1])

    def measure(self, value_N: Floats) -> Floats:
        """Return regrets, or the values if there are no bounds."""
        if self.bounds is None:
            return value_N
        low, high = self.bounds
        return np.clip((value_N - low) / (high - low), 0.0, 1.0)


class Answers:
    """The unused recorded configurations, with a search for the nearest one."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._domain = recording, domain_of(recording.space)
        settings = [recording.space.suggest(FixedTrial(dict(params))) for params in recording.params]
        self._x_ND = self._domain.encoding(settings)
        # A configuration may have been recorded more than once.
        self._numbers_of: dict[str, list[int]] = {}
        for number, its in enumerate(settings):
            self._numbers_of.setdefault(settings_key(its), []).append(number)
        self._left_N = np.ones(len(settings), bool)

    def nearest(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of the unused recorded configuration that is nearest in the unit cube."""
        (x_D,) = self._domain.encoding([self._recording.space.suggest(FixedTrial(dict(params)))])
        left = np.flatnonzero(self._left_N)
        return dict(self._recording.params[left[((self._x_ND[left] - x_D) ** 2).sum(axis=1).argmin()]])

    def draw(
        self, parameters: Mapping[str, BaseDistribution], best: Sequence[FrozenTrial], rng: np.random.Generator
    ) -> Params:
        """Return the unused recorded configurations in any order, as candidates."""
        some = rng.permutation(np.flatnonzero(self._left_N))[:_DRAWN]
        rows = [self._recording.params[number] for number in some]
        return {name: np.array([row[name] for row in rows]) for name in parameters}

    def respond(self, settings: Mapping[str, Any]) -> tuple[Floats, Floats]:
        """Return the curve of the recorded configuration with these settings, and mark it as used."""
        numbers = self._numbers_of[settings_key(settings)]
        number = next((number for number in numbers if self._left_N[number]), numbers[-1])
        self._left_N[number] = False
        return self._recording.value_NR[number], self._recording.seconds_NR[number]

    def limits(self) -> Limits:
        """Return the limits of a study with these answers: it begins no trial if none is unused."""
        recorded = len(self._left_N)
        most = min(self._recording.trials or recorded, recorded)
        return dataclasses.replace(LIMITS, new=bool((~self._left_N).sum() < most))

    def any(self, rng: np.random.Generator) -> dict[str, Any]:
        """Return the parameters of a random unused configuration."""
        return dict(self._recording.params[int(rng.choice(np.flatnonzero(self._left_N)))])


class _Whole(BaseSampler):
    """A sampler of whole recorded configurations."""

    def __init__(self, space: Space, answers: Answers) -> None:
        self._space, self._answers = space, answers

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space.parameters)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name}: is not recorded")


class Answered(_Whole):
    """Any Optuna sampler, answered by the nearest recorded configuration."""

    def __init__(self, inner: BaseSampler, space: Space, answers: Answers) -> None:
        super().__init__(space, answers)
        self._inner = inner

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        inner = self._inner
        drawn = inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))
        asked = {
            name: drawn[name] if name in drawn else inner.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
        }
        return self._answers.nearest(asked)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner.after_trial(study, trial, state, values)


class AnsweredPolicy:
    """A policy that begins trials itself, answered by the nearest recorded configuration."""

    def __init__(self, inner: Policy, answers: Answers) -> None:
        self._inner, self._answers = inner, answers

    def next(self, past: Sequence[FrozenTrial], limits: Limits) -> Answer:
        answer = self._inner.next(past, limits)
        return Begin(self._answers.nearest(answer.params)) if isinstance(answer, Begin) else answer

    def decide(self, trial_id: str, report: Any, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        return self._inner.decide(trial_id, report, past, limits)

    def decide_again(self, trial_id: str, report: Any, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        return self._inner.decide_again(trial_id, report, past, limits)

    def replay(self, trials: Sequence[Recorded]) -> None:
        self._inner.replay(trials)


class AtRandom(_Whole):
    """Draw from the recorded configurations with equal probability."""

    def __init__(self, space: Space, answers: Answers, seed: int) -> None:
        super().__init__(space, answers)
        self._seed = seed

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._answers.any(np.random.default_rng([self._seed, trial.number]))


#: Function from a recording, its unused configurations and a seed to a policy and a factory of samplers.
Make = Callable[[Recording, Answers, int], tuple[Policy, Callable[[int], BaseSampler]]]


def _freeze_thaw(
    earlier: Callable[[Recording], list[Forecast]],
    recording: Recording,
    answers: Answers,
    seed: int,
    *,
    scores: type[Outlook] = Outlook,
) -> tuple[Policy, Callable[[int], BaseSampler]]:
    policy: Policy = OtherScores(
        PolicyInputs(recording.space, recording.reports, recording.reports, seed, earlier=earlier(recording)),
        take_up_s=recording.take_up_s,
        draw=answers.draw if recording.choose else draw_candidates,
        scores=scores,
    )
    if not recording.choose:
        policy = AnsweredPolicy(policy, answers)
    return policy, lambda number: AtRandom(recording.space, answers, seed)


def portfolio_of_others(recording: Recording) -> Portfolio | None:
    """Return the portfolio for a study on a recording, without the part that was recorded on the same data."""
    return portfolio_of(recording.space, excluded_data=[recording.name])


def guide(recording: Recording) -> list[Forecast]:
    """Return forecasts from the portfolio, as in a real study."""
    portfolio = portfolio_of_others(recording)
    return [] if portfolio is None else forecasts_of(portfolio.text)


def _nothing(recording: Recording) -> list[Forecast]:
    return []


def mislead(recording: Recording) -> list[Forecast]:
    """Return forecasts from a portfolio whose best configuration has the JS of its worst, and so on."""
    portfolio = portfolio_of_others(recording)
    if portfolio is None:
        return []
    parts = json.loads(portfolio.text)
    for part in parts:
        # The trials are in the order of their JS.
        settings, values = zip(*part["trials"], strict=True)
        part["trials"] = [*zip(settings, reversed(values), strict=True)]
    return forecasts_of(json.dumps(parts))


#: Function from a recording, its unused configurations, a seed and the number of a trial to a sampler.
MakeSampler = Callable[[Recording, Answers, int, int], BaseSampler]


def _stopping(scheduler: Callable[[int], Scheduler], sampler: MakeSampler) -> Make:
    def make(recording: Recording, answers: Answers, seed: int) -> tuple[Policy, Callable[[int], BaseSampler]]:
        policy = BeginAndStop(recording.space, scheduler(recording.reports))
        return policy, lambda number: sampler(recording, answers, seed, number)

    return make


def _at_random(recording: Recording, answers: Answers, seed: int, number: int) -> BaseSampler:
    return AtRandom(recording.space, answers, seed)


def _optuna(name: str) -> MakeSampler:
    def make(recording: Recording, answers: Answers, seed: int, number: int) -> BaseSampler:
        return Answered(make_sampler(name, seed, number), recording.space, answers)

    return make


def _former(recording: Recording, answers: Answers, seed: int, number: int) -> BaseSampler:
    sampler = FormerSampler(recording.space, seed, answers.draw if recording.choose else draw_candidates)
    return sampler if recording.choose else Answered(sampler, recording.space, answers)


def _asha(reports: int) -> Scheduler:
    return Halving(rungs_of(reports))


POLICIES: dict[str, Make] = {
    DEFAULT: functools.partial(_freeze_thaw, guide),
    WITHOUT: functools.partial(_freeze_thaw, _nothing),
    MISLED: functools.partial(_freeze_thaw, mislead),
    THOMPSON: functools.partial(_freeze_thaw, _nothing, scores=ThompsonDraw),
    GOALS: functools.partial(_freeze_thaw, _nothing, scores=RandomGoal),
    MIXED: functools.partial(_freeze_thaw, _nothing, scores=Mixed),
    HORIZONS: functools.partial(_freeze_thaw, _nothing, scores=RandomHorizon),
    EQUAL: functools.partial(_freeze_thaw, _nothing, scores=EqualLengths),
    AS_OPTIM: functools.partial(_freeze_thaw, _nothing, scores=OptimizerLengths),
    RANDOM: _stopping(lambda reports: RunToEnd(), _at_random),
    "random+asha": _stopping(_asha, _at_random),
    "tpe+asha": _stopping(_asha, _optuna("tpe")),
    "gp+asha": _stopping(_asha, _optuna("gp")),
    "former": _stopping(lambda reports: Halving([math.ceil(reports / 3)]), _former),
}


def simulate(recording: Recording, name: str, workers: int, seed: int) -> Found:
    """Run a study with a policy in simulated time, until its budget is spent."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings(), on_one_thread():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        answers = Answers(recording)
        policy, sampler = POLICIES[name](recording, answers, seed)
        kept = optuna.create_study()
        for params in recording.start:
            kept.enqueue_trial(answers.nearest(params), {START: True}, skip_if_exists=True)
        searcher = Searcher(kept, recording.space, policy, sampler=sampler)
        study = Simulation(searcher, answers.respond, workers, recording.take_up_s, answers.limits)
        return study.run(recording.budget / workers)


@dataclass(frozen=True)
class Verdict:
    """Results of P policies on T recordings over S seeds, at shares of the budget."""

    policies: Sequence[str]
    recordings: Sequence[str]
    regret_PTSA: npt.NDArray[np.float64]  # or values, if there are no bounds
    share_PTS: npt.NDArray[np.float64] | None  # of the budget, to random search's result; None without random search
    bounded: bool

    def to_json(self) -> dict[str, Any]:
        """Return all results as plain values."""
        word = "regret" if self.bounded else "best_js"
        rank_PA = _ranks(self.regret_PTSA).mean(axis=(1, 2))
        told: dict[str, Any] = {"shares_of_budget": [*SPENT], "recordings": [*self.recordings], "policies": {}}
        for number, name in enumerate(self.policies):
            runs_NA = self.regret_PTSA[number].reshape(-1, len(SPENT))
            middle_A = runs_NA.mean(axis=0) if self.bounded else np.median(runs_NA, axis=0)
            share = math.inf if self.share_PTS is None else float(np.median(self.share_PTS[number]))
            told["policies"][name] = {
                f"{'mean' if self.bounded else 'median'}_{word}": middle_A.tolist(),
                "standard_error": _standard_error(runs_NA).tolist(),
                "mean_rank": rank_PA[number].tolist(),
                "share_to_random_end": share if share < math.inf else None,
                "runs": len(runs_NA),
                "by_recording": {
                    task: self.regret_PTSA[number, at].mean(axis=0).tolist() for at, task in enumerate(self.recordings)
                },
                "minus_first": self._minus_first(number),
            }
        return told

    def _minus_first(self, number: int) -> dict[str, Any]:
        """Return the difference of a policy from the first one, seed by seed: for each recording, and for all."""
        more_TSA = self.regret_PTSA[number] - self.regret_PTSA[0]
        groups = {**dict(zip(self.recordings, more_TSA, strict=True)), _ALL: more_TSA.reshape(-1, len(SPENT))}
        return {
            name: {"mean": more_NA.mean(axis=0).tolist(), "standard_error": _standard_error(more_NA).tolist()}
            for name, more_NA in groups.items()
        }

    def show(self, console: Console, title: str) -> None:
        """Print regrets of all recordings, or the values of each, and the differences from the first policy."""
        table = Table(
            "policy", *(f"{share:.0%}" for share in SPENT), *(f"rank {share:.0%}" for share in SPENT), "random's end",
            title=title, title_justify="left", box=box.SIMPLE,
        )  # fmt: skip
        policies = self.to_json()["policies"]
        for name, each in policies.items():
            cells = _with_errors(each["mean_regret"], each["standard_error"]) if self.bounded else [""] * len(SPENT)
            ranks = [f"{rank:.2f}" for rank in each["mean_rank"]]
            share = each["share_to_random_end"]
            missing = "-" if self.share_PTS is None else "not reached"
            reached = f"{share:.2f}" if share is not None and share <= 1 else missing
            table.add_row(name, *cells, *ranks, reached)
        first = self.policies[0]
        for group in [_ALL] if self.bounded else self.recordings:
            for name, each in policies.items():
                if not self.bounded:
                    table.add_row(f"{name}, {group}", *(f"{value:.4f}" for value in each["by_recording"][group]))
                if name != first:
                    more = each["minus_first"][group]
                    cells = _with_errors(more["mean"], more["standard_error"], sign="+")
                    table.add_row(f"{name} - {first}, {group}", *cells)
        console.print(table)


def _standard_error(value_NA: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the standard error of the mean of N runs, [A]."""
    error_A: npt.NDArray[np.float64] = value_NA.std(axis=0, ddof=min(1, len(value_NA) - 1)) / math.sqrt(len(value_NA))
    return error_A


def _with_errors(values: Sequence[float], errors: Sequence[float], sign: str = "") -> list[str]:
    return [f"{value:{sign}.4f} ±{error:.4f}" for value, error in zip(values, errors, strict=True)]


def _ranks(value_PTSA: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the rank of each policy, 1 for the best. Equal ones share their rank."""
    before = (value_PTSA[:, None] > value_PTSA[None]).sum(axis=1)
    equal = (value_PTSA[:, None] == value_PTSA[None]).sum(axis=1)
    ranks: npt.NDArray[np.float64] = before + 0.5 * equal + 0.5
    return ranks


def judge(
    recordings: Sequence[Recording], policies: Sequence[str], *, workers: int, seeds: int, processes: int
) -> Verdict:
    """Run all policies on all recordings with all seeds."""
    jobs = [(r, name, workers, seed) for name in policies for r in recordings for seed in range(seeds)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        runs = pool.map(simulate, *zip(*jobs, strict=True))
        found = list(track(runs, "simulated studies", total=len(jobs)))
    shape = len(policies), len(recordings), seeds
    at = np.array([
        [one.at(share * r.budget / workers, float(r.value_NR.max())) for share in SPENT]
        for one, (r, *_) in zip(found, jobs, strict=True)
    ]).reshape(*shape, len(SPENT))  # fmt: skip
    share_PTS = None
    if RANDOM in policies:
        goals = dict(zip(map(id, recordings), np.median(at[policies.index(RANDOM), :, :, -1], axis=1), strict=True))
        reached = [one.until(goals[id(r)]) * workers / r.budget for one, (r, *_) in zip(found, jobs, strict=True)]
        share_PTS = np.array(reached).reshape(shape)
    regret = np.stack([r.measure(at[:, number]) for number, r in enumerate(recordings)], axis=1)
    bounded = all(r.bounds is not None for r in recordings)
    return Verdict(policies, [r.name for r in recordings], regret, share_PTS, bounded)


def add_arguments(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Add the options of both comparisons."""
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="simulated workers (default: 1)")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="S", help=f"studies a recording (default: {seeds})")
    parser.add_argument(
        "--policies",
        default=",".join(name for name in POLICIES if name not in _SEPARATE),
        metavar="A,B",
        help=f"of {', '.join(POLICIES)} (default: all but {', '.join(_SEPARATE)})",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="simulated studies at once (default: a core each)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")


def policies_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Return the requested policies; end the program if one is unknown."""
    names: list[str] = args.policies.split(",")
    if unknown := sorted({*names} - {*POLICIES}):
        parser.error(f"--policies: unknown policy {', '.join(unknown)}; choose from {', '.join(POLICIES)}")
    return names


def run(recordings: Sequence[Recording], names: Sequence[str], args: argparse.Namespace, title: str) -> None:
    """Run the comparison, print a table, and write the numbers with `--json`."""
    processes = args.processes or usable_cores()
    found = judge(recordings, names, workers=args.workers, seeds=args.seeds, processes=processes)
    console = table_console()
    found.show(console, title)
    portfolios = {each.name: portfolio_of_others(each) for each in recordings}
    for name, portfolio in portfolios.items():
        console.print(f"{name}: {DEFAULT} begins with {'no portfolio' if portfolio is None else portfolio}")
    if args.json is not None:
        told = {
            "workers": args.workers,
            "seeds": args.seeds,
            "portfolio": {name: [] if its is None else [*its.recorded] for name, its in portfolios.items()},
            **found.to_json(),
        }
        write_text(args.json, json.dumps(told, indent=2) + "\n")
