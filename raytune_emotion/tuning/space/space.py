"""Represent a search space: settings with distributions, and the configurations that they suggest.

The name of a parameter in Optuna is its setting's dotted path. A branch of `when` has a separate parameter,
`optim.lr [train.batch_size=64]`, so that each parameter has only one distribution in a study. A loss of a mixture is
the raw parameter `loss.kl~`, uniform in (0, 1]. The weights are computed from all raw parameters.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from raytune_emotion.config import SETTINGS, FlatConfig
from raytune_emotion.storage.json_text import is_number

#: Losses that can be in a mixture.
LOSSES: tuple[str, ...] = tuple(key.removeprefix("loss.") for key in SETTINGS if key.startswith("loss."))

# Its lower bound is exp(-x) for x = 20. The weights of a start point need x of at most 5.
_RAW_WEIGHT = FloatDistribution(2e-9, 1.0)


@dataclass(frozen=True)
class Fixed:
    """One value for every trial; for `loss`, the name of the only loss."""

    value: Any


@dataclass(frozen=True)
class Simplex:
    """Weights of losses: non-negative, with sum 1, uniformly distributed over all such mixtures.

    With u uniform in (0, 1], the weights -ln(u_i) / sum_j -ln(u_j) follow the flat Dirichlet distribution (Optuna FAQ,
    "How do I suggest variables which represent the proportion, that is, are in accordance with Dirichlet
    distribution?"). A weight is 0 where its u is 1.
    """

    losses: tuple[str, ...]

    def raw_names(self, name: str) -> dict[str, str]:
        """Map each loss to its Optuna parameter: `loss [a=b]` gives `loss.kl~ [a=b]`."""
        return {loss: name.replace("loss", f"loss.{loss}~", 1) for loss in self.losses}

    def weights(self, raw: Mapping[str, float]) -> dict[str, float]:
        parts = {loss: abs(math.log(u)) for loss, u in raw.items()}
        total = sum(parts.values())
        # All u at 1, the one point without a direction, stands for the middle.
        return {loss: part / total if total > 0 else 1 / len(parts) for loss, part in parts.items()}

    def raw(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Invert `weights`, with the sum of the exponentials set to its mean, the number of losses."""
        return {loss: math.exp(-len(self.losses) * weights.get(loss, 0.0)) for loss in self.losses}


Setting = Fixed | Simplex | BaseDistribution


@dataclass(frozen=True)
class Branch:
    """An entry of `when`: settings that apply if all conditions hold."""

    conditions: Mapping[str, tuple[Any, ...]]
    settings: Mapping[str, Setting]

    def applies(self, decided: FlatConfig) -> bool:
        return all(key in decided and decided[key] in values for key, values in self.conditions.items())

    def parameter(self, key: str) -> str:
        """Return the name in Optuna of a setting in this branch."""
        conditions = (f"{name}={'|'.join(map(str, values))}" for name, values in self.conditions.items())
        return f"{key} [{', '.join(conditions)}]"


_RANGES = (IntDistribution, FloatDistribution)


@dataclass(frozen=True)
class Space:
    """A valid search space. Every configuration that it suggests is a valid `RunConfig`."""

    settings: Mapping[str, Setting]
    when: tuple[Branch, ...] = ()
    start: tuple[FlatConfig, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that are the same in every trial, by dotted path."""
        varied = {key for branch in self.when for key in branch.settings}
        same = ((k, s) for k, s in self.settings.items() if isinstance(s, Fixed) and k not in varied)
        return self.flatten({key: setting.value for key, setting in same})

    @property
    def parameters(self) -> dict[str, BaseDistribution]:
        """Return every parameter of Optuna, by its name there."""
        return _parameters((name, setting) for name, _, setting in self._all_settings())

    def columns(self) -> tuple[str, ...]:
        """Return the settings in which trials can differ, by dotted path, in the order of the file."""
        varied = {key for branch in self.when for key in branch.settings}
        keys = dict.fromkeys(key for _, key, s in self._all_settings() if key in varied or not isinstance(s, Fixed))
        return tuple(
            name for key in keys for name in ([f"loss.{x}" for x in self._losses()] if key == "loss" else [key])
        )

    def values_of(self, key: str) -> tuple[Any, ...]:
        """Return the values that a setting can have, as far as they can be listed; none if it is not in the space."""
        values: list[Any] = []
        for _, name, setting in self._all_settings():
            if name == key and isinstance(setting, Fixed):
                values.append(setting.value)
            elif name == key and isinstance(setting, CategoricalDistribution):
                values += setting.choices
        return tuple(dict.fromkeys(values))

    def largest_value(self, key: str) -> float | None:
        """Return the largest value that a numeric setting can have; None if it is not in the space."""
        highs = [s.high for _, name, s in self._all_settings() if name == key and isinstance(s, _RANGES)]
        return max((*self.values_of(key), *highs), default=None)

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return every setting of the space by dotted path. The trial suggests those that are searched.

        Settings that the space does not name are absent and have their defaults.
        """
        decided = {key: _draw(trial, key, self.settings[key]) for key in self.condition_keys()}
        return self.flatten({key: _draw(trial, name, s) for key, (name, s) in self.active_settings(decided).items()})

    def start_points(self) -> list[dict[str, Any]]:
        """Return the start points as Optuna's parameters, for `study.enqueue_trial`."""
        return [self.params_of(start) for start in self.start]

    def params_of(self, settings: FlatConfig) -> dict[str, Any]:
        """Return Optuna's parameters of a whole or partial configuration."""
        params: dict[str, Any] = {}
        for key, (name, setting) in self.active_settings(settings).items():
            if isinstance(setting, Simplex):
                weights = {loss: settings[f"loss.{loss}"] for loss in setting.losses if f"loss.{loss}" in settings}
                if weights:
                    names = setting.raw_names(name)
                    params |= {names[loss]: raw for loss, raw in setting.raw(weights).items()}
            elif isinstance(setting, BaseDistribution) and key in settings:
                params[name] = settings[key]
            elif key == "loss" and isinstance(setting, CategoricalDistribution):
                alone = [loss for loss in setting.choices if settings.get(f"loss.{loss}") == 1]
                if alone:
                    params[name] = alone[0]
        return params

    def to_dict(self) -> dict[str, Any]:
        """Return the space as plain dicts and lists, which `parse_space` can read."""
        return dict(self.source)

    def active_settings(self, decided: FlatConfig) -> dict[str, tuple[str, Setting]]:
        """Return the settings that apply for these values of the condition settings, as (Optuna name, domain)."""
        result = {key: (key, setting) for key, setting in self.settings.items()}
        for branch in self.when:
            if branch.applies(decided):
                result |= {key: (branch.parameter(key), setting) for key, setting in branch.settings.items()}
        return result

    def decisions(self) -> Iterator[dict[str, Any]]:
        """Yield each combination of values of the condition settings, by dotted path."""
        keys = self.condition_keys()
        for values in itertools.product(*map(self.values_of, keys)):
            yield dict(zip(keys, values, strict=True))

    def alike(self) -> Iterator[dict[str, list[Any]]]:
        """Yield the values of the condition settings in groups: the same branches apply to all values of a group.

        There are far fewer groups than combinations of values.
        """
        groups: list[list[list[Any]]] = []
        for key in self.condition_keys():
            wanted = [branch.conditions[key] for branch in self.when if key in branch.conditions]
            found: dict[tuple[bool, ...], list[Any]] = {}
            for value in self.values_of(key):
                found.setdefault(tuple(value in values for values in wanted), []).append(value)
            groups.append([*found.values()])
        for combination in itertools.product(*groups):
            yield dict(zip(self.condition_keys(), combination, strict=True))

    def branches(self) -> Iterator[tuple[dict[str, Any], dict[str, BaseDistribution]]]:
        """Yield each combination of values of the condition settings, with the parameters that are drawn for it."""
        for decided in self.decisions():
            yield decided, _parameters(its for key, its in self.active_settings(decided).items() if key not in decided)

    def ends(self, decided: FlatConfig) -> dict[str, tuple[Any, ...]]:
        """Return the extreme values of each setting for these values of the condition settings."""
        active = {key: _ends(setting) for key, (_, setting) in self.active_settings(decided).items()}
        return active | {key: (value,) for key, value in decided.items()}

    def condition_keys(self) -> tuple[str, ...]:
        """Return the condition settings: those in an `if` of `when`."""
        return tuple(dict.fromkeys(key for branch in self.when for key in branch.conditions))

    def flatten(self, values: FlatConfig) -> dict[str, Any]:
        """Replace `loss`, a name or weights by name, by `loss.…`. The other losses of the space get weight 0."""
        result: dict[str, Any] = {}
        for key, value in values.items():
            if key == "loss":
                weights = value if isinstance(value, dict) else {value: 1.0}
                result |= {f"loss.{loss}": weights.get(loss, 0.0) for loss in self._losses()}
            else:
                result[key] = list(value) if isinstance(value, tuple) else value
        return result

    def _all_settings(self) -> Iterator[tuple[str, str, Setting]]:
        yield from ((key, key, setting) for key, setting in self.settings.items())
        for branch in self.when:
            yield from ((branch.parameter(key), key, setting) for key, setting in branch.settings.items())

    def _losses(self) -> list[str]:
        simplexes = [s.losses for _, _, s in self._all_settings() if isinstance(s, Simplex)]
        taking_part = {*self.values_of("loss"), *itertools.chain(*simplexes)}
        return [loss for loss in LOSSES if loss in taking_part]


def _parameters(settings: Iterable[tuple[str, Setting]]) -> dict[str, BaseDistribution]:
    """Return the parameters of settings, given with their names in Optuna."""
    result: dict[str, BaseDistribution] = {}
    for name, setting in settings:
        if isinstance(setting, Simplex):
            result |= dict.fromkeys(setting.raw_names(name).values(), _RAW_WEIGHT)
        elif isinstance(setting, BaseDistribution):
            result[name] = setting
    return result


def _ends(setting: Setting) -> tuple[Any, ...]:
    """Return the lowest and the highest value of a setting; for words, all values."""
    if isinstance(setting, Fixed):
        return (setting.value,)
    if isinstance(setting, Simplex):
        return (setting.losses[0],)
    if isinstance(setting, CategoricalDistribution):
        return extremes(setting.choices)
    assert isinstance(setting, FloatDistribution | IntDistribution)
    return (setting.low, setting.high)


def extremes(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return the lowest and the highest of some numbers; for words, all of them."""
    return (min(values), max(values)) if all(map(is_number, values)) else tuple(values)


def _draw(trial: optuna.trial.BaseTrial, name: str, setting: Setting) -> Any:
    if isinstance(setting, Fixed):
        return setting.value
    if isinstance(setting, Simplex):
        low, high = _RAW_WEIGHT.low, _RAW_WEIGHT.high
        return setting.weights({k: trial.suggest_float(n, low, high) for k, n in setting.raw_names(name).items()})
    if isinstance(setting, CategoricalDistribution):
        return trial.suggest_categorical(name, setting.choices)
    if isinstance(setting, IntDistribution):
        return trial.suggest_int(name, setting.low, setting.high, step=setting.step, log=setting.log)
    assert isinstance(setting, FloatDistribution)
    return trial.suggest_float(name, setting.low, setting.high, step=setting.step, log=setting.log)


def draw(space: Space, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the start points of the space and then random configurations, `count` in total, by dotted path."""
    study = optuna.create_study(sampler=RandomSampler(seed=seed))
    for point in space.start_points():
        study.enqueue_trial(point)
    for _ in range(count):
        yield space.suggest(study.ask())


def is_setting(value: Any) -> bool:
    """Tell whether a value can be that of a setting: text, a number, a boolean, None, or a list of these."""
    if isinstance(value, list):
        return all(is_setting(item) and not isinstance(item, list) for item in value)
    return value is None or isinstance(value, str | bool) or is_number(value)


def are_settings(value: Any) -> bool:
    """Tell whether a value is a mapping of names to settings, with a number as the weight of each loss."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and (is_number(item) if key.startswith("loss.") else is_setting(item))
        for key, item in value.items()
    )
