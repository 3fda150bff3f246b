"""What tests of several modules need."""

import contextlib
from types import SimpleNamespace

from raytune_emotion.tuning.policy.decisions import FORECAST
from raytune_emotion.tuning.policy.objective import JS_ALONE
from raytune_emotion.tuning.policy.policies import make_policy, make_sampler_of
from raytune_emotion.tuning.study.optuna_study import Searcher


def joined_session(address):
    """Stand in for `ray_session` in a process that has joined a cluster already: Ray can be started only once."""
    return contextlib.nullcontext(SimpleNamespace(failure=lambda: ""))


def searcher_of(study, space, *, seed=0, scheduler="none", objective=JS_ALONE, epochs=4, earlier=()):
    """What asks an Optuna study for trials, as a study's recorder makes it."""
    policy = make_policy(
        space, scheduler=scheduler, epochs=epochs, reports=epochs, seed=seed, objective=objective, earlier=earlier
    )
    sampler = make_sampler_of(space, FORECAST, seed=seed, objective=objective, earlier=earlier, reports=epochs)
    return Searcher(study, space, policy, sampler=sampler, cost=objective.cost)
