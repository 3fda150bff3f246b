"""Check the calibration of forecasts: compare predicted with actual probabilities of a better final value.

Trials are forecast at the ends of their stretches, in studies as in `benchmarks.policies`. The final value of a trial
that did not run to its end is taken from its recorded curve.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from rich.progress import track
from scipy.special import ndtr

from benchmarks import Table
from benchmarks.curves.replay import BUDGET, SHARE, Market, pool, read_markets, simulate
from benchmarks.policies import ALSO, study
from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.decisions import Decision, Limits
from raytune_emotion.tuning.policy.freeze_thaw import stretch_ends
from raytune_emotion.tuning.policy.outlook import STD_FACTOR, Aim, Outlook
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS, as_paused
from raytune_emotion.tuning.study.optuna_study import Searcher

SEEDS = 8
#: Number of trials that must have begun before forecasts count.
BEGUN = 5
EDGES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class Foretold:
    """The forecast of a trial's end while it ran."""

    number: int
    best: float  # log of the study's best value at that time
    chance: float  # probability that the trial will improve on it


class Listening(Searcher):
    """A searcher that keeps the forecasts of its trials."""

    def __init__(self, market: Market, seed: int, kept: optuna.Study) -> None:
        made = study(market, seed, kept=kept)
        super().__init__(kept, market.space, made._policy, sampler=made._sampler)
        self._kept, self._domain, self._reports = kept, domain_of(market.space), market.most_reports
        self.foretold: list[Foretold] = []

    def decide(self, trial_id: str, report: Any, limits: Limits) -> Decision:
        past = self._kept.get_trials(deepcopy=False)
        if report["report"] in stretch_ends(self._reports) and len(past) > BEGUN:
            # Treat the trial as paused, as the policy does. Otherwise its forecast would be believed as a fact.
            past = [as_paused(trial) if trial.number == int(trial_id) else trial for trial in past]
            outlook = Outlook(self._domain, past, Aim(reports=self._reports))
            settings = past[int(trial_id)].user_attrs[SETTINGS]
            if outlook.forecast is not None:
                mean_M, std_M = outlook.forecast([settings])
                chance = ndtr((outlook.forecast.best - mean_M[0]) / (STD_FACTOR * std_M[0]))
                self.foretold.append(Foretold(int(trial_id), outlook.forecast.best, float(chance)))
        return super().decide(trial_id, report, limits)


def foretold(market: Market, seed: int) -> list[tuple[Foretold, float]]:
    """Return every forecast of a study, with the log of the value of its trial at full length."""
    kept = optuna.create_study()
    listening = Listening(market, seed, kept)
    simulate(market, listening, ALSO, market.budget(ALSO) * SHARE)
    js_MR, _ = market.response([trial.user_attrs[SETTINGS] for trial in kept.trials])
    ends_M = np.log(js_MR.min(axis=1))
    return [(each, float(ends_M[each.number])) for each in listening.foretold]


def run() -> Table:
    rows = []
    notes = [f"{ALSO} workers, an eighth of {BUDGET} full trials, {SEEDS} seeds, after {BEGUN} trials have begun."]
    with pool() as processes:
        for market in track(read_markets([]), "calibration"):
            studies = processes.map(foretold, [market] * SEEDS, range(SEEDS))
            made = [each for study in studies for each in study]
            chance_N = np.array([each.chance for each, _ in made])
            true_N = np.array([end < each.best for each, end in made])
            for low, high in pairwise(EDGES):
                inside = (chance_N >= low) & ((chance_N < high) | (high == 1))
                if inside.any():
                    found = chance_N[inside].mean(), true_N[inside].mean()
                    rows.append(
                        (market.curves, market.kind, f"{low:.0%} to {high:.0%}", int(inside.sum()), *map(float, found))
                    )
    columns = ("curves", "response", "chance", "forecasts", "foretold in the mean", "came true")
    return Table(columns, rows, notes)
