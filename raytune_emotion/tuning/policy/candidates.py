"""Draw candidates from a search space, or from the parameters of any Optuna study."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, FrozenTrial

from raytune_emotion.storage.json_text import is_number
from raytune_emotion.tuning.policy.encoding import (
    Column,
    Columns,
    Configurations,
    Encoding,
    encoding_of,
    encoding_of_parameters,
    unit_of,
    values_at,
)
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.space.space import Fixed, Simplex, Space

#: Number of random candidates, and of candidates that are mutations of the best trials.
CANDIDATES = 1000
#: Mutation: probability of redrawing a parameter; step of the other numbers as a share of their range.
_ANEW, _STEP = 0.2, 0.1
#: Largest number of configurations of a space that are enumerated if all candidates were tried before.
_ENUMERABLE = 100_000

#: Values of every parameter for M configurations.
Params = Mapping[str, Column]
#: Keys of the settings of trials; None: of a trial that equals no configuration.
Tried = Set[str | None]


@dataclass(frozen=True)
class Domain:
    """The parameters of a study, and functions that map parameters and trials to settings."""

    parameters: Mapping[str, BaseDistribution]
    encoding: Encoding
    #: Function from the values of all parameters to the settings.
    settings_of: Callable[[Params], Configurations]
    #: Function from a trial to its settings.
    settings: Callable[[FrozenTrial], Mapping[str, Any]]
    #: Function from a configuration's parameters to the keys that a trial with equal settings may have.
    keys: Callable[[Mapping[str, Any]], Sequence[str]]
    #: Parameters that are drawn together, each with the values of the condition settings for which they apply.
    branches: Sequence[tuple[Mapping[str, Any], Mapping[str, BaseDistribution]]]
    #: Function that tells whether a trial's settings are complete, so that equal ones need no other trial.
    is_complete: Callable[[FrozenTrial], bool] = lambda trial: True
    #: Parameters whose ranges differ between trials. Their values are places in the range, from 0 to 1.
    moving: Set[str] = frozenset()
    _keys: dict[int, str | None] = field(default_factory=dict, compare=False, repr=False)  # by the numbers of trials

    def tried(self, trials: Iterable[FrozenTrial]) -> Tried:
        """Return the keys of trials."""
        return {self._key_of(trial) for trial in trials}

    def _key_of(self, trial: FrozenTrial) -> str | None:
        if trial.number not in self._keys:
            self._keys[trial.number] = settings_key(self.settings(trial)) if self.is_complete(trial) else None
        return self._keys[trial.number]


def domain_of(space: Space) -> Domain:
    """Return the domain of a study of this project, whose trials have their settings as an attribute."""

    def keys(params: Mapping[str, Any]) -> list[str]:
        return [settings_key(space.suggest(FixedTrial(dict(params))))]

    return Domain(
        space.parameters,
        encoding_of(space),
        lambda params: settings_of(space, params),
        lambda trial: trial.user_attrs[SETTINGS],
        keys,
        [*space.branches()],
    )


def domain_of_parameters(parameters: Mapping[str, BaseDistribution], trials: Sequence[FrozenTrial]) -> Domain:
    """Return the domain of any Optuna study, whose parameters are the settings.

    If the range of a parameter differs between trials, the setting is its place in its range, from 0 to 1.

    A trial has only the parameters of its branch of the objective. It equals all configurations with the same values of
    these, because the others have no influence. A trial that has shown no value may have ended before it drew all of
    them, so it equals none.
    """
    moving = {
        name
        for trial in trials
        for name, distribution in trial.distributions.items()
        if not distribution.single() and parameters.get(name, distribution) != distribution
    }

    def settings(trial: FrozenTrial) -> dict[str, Any]:
        return {
            name: _place(trial.distributions[name], value) if name in moving else value
            for name, value in trial.params.items()
            if name in parameters
        }

    def is_complete(trial: FrozenTrial) -> bool:
        return bool(trial.values or trial.intermediate_values) and trial.state.is_finished() and bool(settings(trial))

    parameters = {name: FloatDistribution(0, 1) if name in moving else d for name, d in parameters.items()}
    branches = {tuple(settings(trial)) for trial in trials if is_complete(trial)}
    return Domain(
        parameters,
        encoding_of_parameters(parameters),
        Columns,
        settings,
        lambda params: [settings_key({name: params[name] for name in names}) for names in branches],
        [({}, parameters)],
        is_complete,
        moving,
    )


def _place(distribution: BaseDistribution, value: Any) -> float:
    """Return the place of a value in the range of a parameter, from 0 to 1."""
    return 0.5 if distribution.single() else unit_of(distribution, value)


def draw_candidates(
    parameters: Mapping[str, BaseDistribution], best: Sequence[FrozenTrial], rng: np.random.Generator
) -> dict[str, Column]:
    """Draw values of all parameters, including those of inactive branches: first at random, then near the best."""
    u_MP = rng.random((CANDIDATES, len(parameters)))
    if best:
        # Each value has its place in the range that its own trial had: the range of a parameter may change.
        near_BP = [
            [_place(t.distributions[name], t.params[name]) if name in t.params else np.nan for name in parameters]
            for t in best
        ]
        near_MP = np.array(near_BP)[np.arange(CANDIDATES) % len(best)]
        steps_P = [0.0 if isinstance(d, CategoricalDistribution) else _STEP for d in parameters.values()]
        moved_MP = np.clip(near_MP + steps_P * rng.standard_normal(near_MP.shape), 0, 1)
        anew_MP = np.isnan(near_MP) | (rng.random(near_MP.shape) < _ANEW)
        u_MP = np.concatenate([u_MP, np.where(anew_MP, rng.random(near_MP.shape), moved_MP)])
    return {name: values_at(d, u_M) for (name, d), u_M in zip(parameters.items(), u_MP.T, strict=True)}


def row_of(params: Params, number: int) -> dict[str, Any]:
    """Return one configuration of M."""
    return {name: column[number : number + 1].tolist()[0] for name, column in params.items()}


def first_untried(domain: Domain, tried: Tried) -> dict[str, Any] | None:
    """Return the first untried configuration of a small space, which random draws may miss; None if there is none."""
    for decided, drawn in domain.branches if _has_few(domain) else ():
        for point in itertools.product(*map(_all_values, drawn.values())):
            params = {**decided, **dict(zip(drawn, point, strict=True))}
            if tried.isdisjoint(domain.keys(params)):
                return params
    return None


def is_exhausted(domain: Domain, tried: Tried) -> bool:
    """Tell whether a space is small, and all of its configurations were tried."""
    return _has_few(domain) and first_untried(domain, tried) is None


def _has_few(domain: Domain) -> bool:
    """Tell whether a space is small enough to enumerate all its configurations."""
    counts = [[len(_all_values(distribution)) for distribution in drawn.values()] for _, drawn in domain.branches]
    return all(all(its) for its in counts) and sum(map(math.prod, counts)) <= _ENUMERABLE


def _all_values(distribution: BaseDistribution) -> Sequence[Any]:
    """Return the values that a parameter can have; an empty sequence if they cannot be listed."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return ()
    steps = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + number * distribution.step for number in range(steps + 1)]


def settings_of(space: Space, params: Params) -> Columns:
    """Return the settings of parameters in a space: every setting that can be encoded, as a trial has it."""
    deciding = space.condition_keys()
    count = len(next(iter(params.values())))
    columns = {key: np.full(count, np.nan, object) for key in space.columns()}
    for values in {*zip(*[params[key] for key in deciding], strict=True)} or {()}:
        decided = dict(zip(deciding, values, strict=True))
        rows = np.all([np.full(count, True), *(params[key] == value for key, value in decided.items())], axis=0)
        found: dict[str, Any] = {}
        for key, (name, setting) in space.active_settings(decided).items():
            if isinstance(setting, Simplex):
                raw = setting.raw_names(name)
                # If all are 1, the weights are undefined; equal weights are used.
                parts = {loss: np.maximum(-np.log(params[raw[loss]][rows]), 1e-9) for loss in raw}
                found[key] = {loss: part / sum(parts.values()) for loss, part in parts.items()}
            elif isinstance(setting, Fixed):
                found[key] = setting.value
            elif key == "loss" and isinstance(setting, CategoricalDistribution):
                found[key] = {loss: params[name][rows] == loss for loss in setting.choices}
            else:
                found[key] = params[name][rows]
        for key, value in space.flatten(found).items():
            if key in columns:
                columns[key][rows] = value
    # Include fixed settings, because an earlier study may have searched them. Lists are never searched.
    same = {key: value for key, value in space.fixed_settings.items() if not isinstance(value, list)}
    return Columns(
        {key: np.full(count, np.nan if value is None else value, object) for key, value in same.items()} | columns
    )


def settings_key(settings: Mapping[str, Any]) -> str:
    # 0.3 and 3 * 0.1 are equal settings, and so are 5 and 5.0.
    same = {key: f"{value:.9g}" if is_number(value) else value for key, value in settings.items()}
    return json.dumps(same, sort_keys=True, default=str)
