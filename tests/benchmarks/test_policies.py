import dataclasses
import functools
import itertools

import numpy as np
import pytest

from benchmarks.curves import replay
from benchmarks.curves.replay import Market, at_random, simulate
from benchmarks.curves.response import Nearest, fit_responses, read_curves
from benchmarks.policies import ours, part
from benchmarks.rivals import kept_goals
from benchmarks.simulation import Found
from raytune_emotion.tuning.study.optuna_study import Proposal


@pytest.fixture(scope="module")
def market():
    """What was recorded on drawn faces, each configuration answered for by the nearest."""
    space = replay.read_space()
    recorded = read_curves(replay.CURVES / "drawn.parquet", space)
    return Market("drawn", "nearest", space, Nearest(recorded, np.ones(recorded.x_ND.shape[1])))


class Listed:
    """Trials of configurations that were drawn before, of which none is stopped."""

    def __init__(self, space, seed):
        blocks = (replay.drawn(space, seed, block).of for block in range(100))
        self._left = (
            dict(zip(of, row, strict=True))
            for of in blocks
            for row in zip(*[c.tolist() for c in of.values()], strict=True)
        )
        self._asked = 0

    def ask(self, limits):
        self._asked += 1
        return Proposal(str(self._asked), next(self._left), None)

    def observe(self, trial_id, report):
        return True

    def decide(self, trial_id, report, limits):
        return "go on"

    def tell(self, trial_id, status, *, reason="", seconds=None):
        assert status == "complete"


def test_random_search_drawn_at_once_is_that_of_one_trial_after_the_other(market):
    seconds = 20 * market.full
    at_once, one_by_one = at_random(market, 3, 7, seconds), simulate(market, Listed(market.space, 7), 3, seconds)
    within = at_once.begun <= seconds
    assert within.sum() > 40
    assert at_once.begun[within] == pytest.approx(one_by_one.begun)
    for js in np.quantile(one_by_one.best, [0, 0.3, 0.7]):
        assert at_once.until(js) == pytest.approx(one_by_one.until(js))


@pytest.mark.long
def test_searching_betters_random_search_of_the_same_time(market):
    recorded = market.response.recorded
    some = {name: getattr(recorded, name)[:64] for name in ("settings", "x_ND", "js_NR", "seconds_NR")}
    # Between as many as can be fitted at once: by the nearest, few are as good as the best.
    market = dataclasses.replace(market, response=fit_responses(dataclasses.replace(recorded, **some)).surrogate)
    seconds = 24 / 2 * market.full
    searched = [replay.replay(ours, market, 2, seed, seconds) for seed in range(3)]
    random = [at_random(market, 2, seed, seconds) for seed in range(24)]
    assert np.median([one.at(seconds) for one in searched]) < np.median([one.at(seconds) for one in random])


@pytest.mark.long
def test_a_goal_that_is_not_reached_is_gone_on_for(market):
    by_chance, seconds = functools.partial(part, "with random proposals"), market.full
    short, longer = (replay.replay(by_chance, market, 2, 0, seconds, goal, 9 * seconds) for goal in (1.0, 0.14))
    assert short.begun[-1] <= seconds < longer.begun[-1]
    assert longer.at(seconds) == short.at(seconds)


def test_a_row_tells_when_most_had_reached_what_others_found(market):
    def study(*reports):
        seconds, best = np.array(reports).T
        return Found(seconds * market.full, best, np.array([0.0, 3 * market.full]))

    # Of four full trials' time for each of eight workers; the first two went on.
    studies = [study((1, 0.2), (8, 0.1)), study((1, 0.3), (16, 0.1)), study((2, 0.2)), study((3, 0.2))]
    goals = replay.Goals(of_random=0.1, of_ray=0.2, best=(0.2, 0.05))
    row = replay.row(market, 8, "these", studies, goals, 4 * market.full, 2)
    assert row[:5] == ("drawn", "nearest", 8, "these", 4)
    assert row[5:7] == pytest.approx([32 / 12, 4 / 2.5])
    found = dict(zip(replay.COLUMNS, row, strict=True))
    after_two, after_four = ([found[name] for name in replay.found_at(share)] for share in (1 / 16, 1 / 8))
    assert after_two == pytest.approx([0.25, 0.2, 0.475])  # of 0.2, 0.3, 0.2, 1
    assert after_four == pytest.approx([0.2, 0.2, 0.225])
    assert found["full trials to the best 5%"] == pytest.approx(8 * 2.5)
    assert found["full trials to the best 1%"] == "-"
    assert found["trials"] == 2.0


def test_the_settings_that_matter_most_are_told_by_their_shortest_length():
    names = ["optim.lr", "model.backbone", "model.backbone", "loss.kl"]
    told = replay._shortest(names, np.array([0.7, 2.0, 1.6, 9.0]))
    assert told == "optim.lr 0.7, model.backbone 1.6"


def test_rivals_are_kept_for_every_comparison(market):
    for kind, workers in itertools.product(("surrogate", "nearest"), replay.WORKERS):
        goals = kept_goals(dataclasses.replace(market, kind=kind), workers)
        assert goals.best[1] < goals.best[0] < 0.5
        assert goals.of_random < goals.of_ray < 0.5
