"""What is tried next: what the sampler is shown of a study's past, and what it makes of that.

The sampler works on a study of its own in memory, filled anew each time, so that the record says what happened (this
trial failed) while the sampler sees what follows from it (here is no place to look).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from raytune_emotion.tuning.space import Space

#: The attribute of an Optuna trial that has its configuration by dotted path.
SETTINGS = "settings"

#: Trials that end before the sampler models them; with fewer it settles on what is cheap and ends early.
_STARTUP = 16

#: Random configurations that are looked at before a space counts as exhausted.
_ATTEMPTS = 500


def propose(space: Space, past: Sequence[FrozenTrial], seed: int) -> dict[str, Any] | None:
    """Optuna's parameters of a configuration that was not tried before; None where the space has no other.

    Args:
        space: to choose from.
        past: all trials that were asked for, in order, with their settings as an attribute.
        seed: of the sampler; with the same past the same is proposed.
    """
    return propose_by(make_sampler(seed), space, shown(past), seed)


def propose_by(sampler: BaseSampler, space: Space, past: Sequence[FrozenTrial], seed: int) -> dict[str, Any] | None:
    """What a sampler proposes in the face of a past; something at random where it proposes what is there already."""
    study = optuna.create_study(sampler=sampler)
    study.add_trials(past)
    otherwise = RandomSampler(seed=seed)
    tried = {_key(trial.user_attrs[SETTINGS]) for trial in past}
    for _ in range(_ATTEMPTS):
        trial = study.ask()
        if _key(space.suggest(trial)) not in tried:
            return trial.params
        study.sampler = otherwise
    return None


def make_sampler(seed: int) -> BaseSampler:
    """The sampler of one trial of a study."""
    # Multivariate with groups: a branch of `when` has its own parameters, and TPE models each branch jointly.
    return TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=_STARTUP, seed=seed)


def shown(past: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The past as the sampler shall see it: trials that failed, which Optuna passes over, are the worst of all."""
    return [
        create_trial(
            state=TrialState.PRUNED,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
        )
        if trial.state == TrialState.FAIL
        else trial
        for trial in past
    ]


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
