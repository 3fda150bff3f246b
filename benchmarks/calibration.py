"""Whether the chance that a running trial has, by the forecast of its end, comes true as often as it says.

Studies as in `benchmarks.policies`, stopped where that chance is small. What a stopped trial would have come to, its
recorded curve says.
"""

import math
from itertools import pairwise

import numpy as np
from rich.progress import track

from benchmarks import Table
from benchmarks.curves.replay import BUDGET, SHARE, Market, pool, read_markets, simulate
from benchmarks.curves.rules import CHANCE, ENDED, Foretold
from benchmarks.policies import ALSO, Study, extrapolating
from raytune_emotion.tuning.policy.decisions import SETTINGS
from raytune_emotion.tuning.study.optuna_study import trial_id_of

SEEDS = 8
EDGES = (0.0, 0.01, CHANCE, 0.1, 0.2, 0.4, 0.7, 1.0)


def foretold(market: Market, seed: int) -> list[tuple[Foretold, float]]:
    """Every forecast of a study, and the log of the value that its trial comes to at full length."""
    rule = extrapolating(market)
    study = Study(market.space, rule, seed)
    simulate(market, study, ALSO, market.budget(ALSO) * SHARE)
    trials = {trial_id_of(trial.number): trial.user_attrs[SETTINGS] for trial in study.trials}
    js_MR, _ = market.response([*trials.values()])
    ends = dict(zip(trials, js_MR.min(axis=1), strict=True))
    return [(each, math.log(ends[each.trial_id])) for each in rule.foretold]


def run() -> Table:
    rows = []
    notes = [f"{ALSO} workers, an eighth of {BUDGET} full trials, {SEEDS} seeds, from the {ENDED}th trial's end on."]
    with pool() as processes:
        for market in track(read_markets([]), "calibration"):
            studies = processes.map(foretold, [market] * SEEDS, range(SEEDS))
            made = [each for study in studies for each in study if math.isfinite(each[0].wider)]
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
