import itertools

import numpy as np
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import FixedTrial, TrialState, create_trial

from raytune_emotion.tuning.policy.candidates import (
    CANDIDATES,
    domain_of,
    domain_of_parameters,
    draw_candidates,
    first_untried,
    is_exhausted,
    settings_of,
)
from raytune_emotion.tuning.policy.outlook import Outlook
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.space.parser import parse_space
from tests.support.studies import SEARCH_SPACE

SPACES = {
    "branches, and a mixture": SEARCH_SPACE,
    "steps, whole numbers, and a choice of losses": {
        "loss": {"choice": ["js", "kl"]},
        "train.batch_size": {"int_log_uniform": [8, 64]},
        "data.image_size": {"choice": [32, 64]},
        "augment.flip": {"uniform": [0.0, 0.5, 0.25]},
        "model.dropout": {"uniform": [0.1, 0.3]},
        "model.backbone": "resnet18",  # fixed; an earlier study may have searched it
    },
}


@pytest.mark.parametrize("name", SPACES)
def test_candidates_are_what_the_space_suggests_of_their_parameters(name):
    space = parse_space(SPACES[name])
    (before,) = rows(draw_candidates(space.parameters, [], np.random.default_rng(1)))[:1]
    seed_trial = FixedTrial(before)
    space.suggest(seed_trial)
    params = draw_candidates(space.parameters, [seed_trial], np.random.default_rng(2))
    settings = settings_of(space, params)
    assert len(settings) == 2 * CANDIDATES
    for row, found in zip(rows(params)[::7], rows(settings.of)[::7], strict=True):
        assert found == pytest.approx(space.suggest(FixedTrial(row)), abs=1e-8, nan_ok=True)


def test_the_second_half_lies_near_the_place_of_the_best_in_its_own_range():
    """Taken for places in the range, numbers above one would all be its end."""
    ranges = [IntDistribution(0, 100), IntDistribution(0, 200)]
    best, other = (create_trial(params={"units": 40}, distributions={"units": d}, value=0.0) for d in ranges)
    domain = domain_of_parameters({"units": ranges[1]}, [best, other])
    units_M = draw_candidates(domain.parameters, [best], np.random.default_rng(0))["units"][CANDIDATES:]
    assert np.median(units_M) == pytest.approx(0.4, abs=0.02)


def test_the_second_half_lies_near_the_best():
    space = parse_space(SPACES["steps, whole numbers, and a choice of losses"])
    best = FixedTrial(rows(draw_candidates(space.parameters, [], np.random.default_rng(1)))[0])
    space.suggest(best)
    params = draw_candidates(space.parameters, [best], np.random.default_rng(2))
    off = abs(params["model.dropout"] - best.params["model.dropout"])
    assert np.median(off[CANDIDATES:]) < 0.6 * np.median(off[:CANDIDATES])
    same = np.array(params["loss"]) == best.params["loss"]
    assert same[CANDIDATES:].mean() > 0.8 > same[:CANDIDATES].mean()


@pytest.mark.parametrize("seed", range(5))
def test_the_last_configuration_of_a_space_is_found_and_then_none(seed):
    space = parse_space(
        {
            "train.batch_size": {"choice": [8, 16, 32, 64, 128]},
            "train.grad_clip": {"choice": [*range(60)]},
            "augment.flip": {"uniform": [0.0, 0.9, 0.1]},
            "when": [{"if": {"train.batch_size": [8]}, "augment.flip": 0.5}],
        }
    )
    points = list(itertools.product([8, 16, 32, 64, 128], range(60), [i / 10 for i in range(10)]))
    settings = [
        space.suggest(FixedTrial({"train.batch_size": size, "train.grad_clip": clip, "augment.flip": flip}))
        for size, clip, flip in points
    ]
    past = [create_trial(state=TrialState.FAIL, user_attrs={SETTINGS: found}) for found in settings]
    for number, trial in enumerate(past):
        trial.number = number
    assert offer(space, past, seed) is None
    left = offer(space, past[:-1], seed).params
    assert left["train.batch_size"] == 128
    assert left["augment.flip"] == pytest.approx(0.9)


def test_configurations_of_a_branch_are_counted_without_the_parameters_of_others():
    names = ["resnet18", "resnet34", "resnet50"]
    when = [
        {"if": {"model.backbone": [name]}, "optim.lr": {"choice": [(50 * number + i) / 1000 for i in range(1, 51)]}}
        for number, name in enumerate(names)
    ]
    space = parse_space({"model.backbone": {"choice": names}, "when": when})
    domain = domain_of(space)
    tried = set()
    while (params := first_untried(domain, tried)) is not None:
        tried.update(domain.keys(params))
    assert len(tried) == 150
    assert is_exhausted(domain, tried)


def offer(space, past, seed):
    outlook = Outlook(domain_of(space), past)
    return outlook.offer(outlook.candidates(np.random.default_rng(seed)))


def rows(params):
    return [dict(zip(params, row, strict=True)) for row in zip(*[c.tolist() for c in params.values()], strict=True)]
