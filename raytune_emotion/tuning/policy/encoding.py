"""Map settings to the unit cube, and points of the cube to parameters."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raytune_emotion.storage.json_text import is_number
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.space.space import Space

#: Values of a setting for M configurations.
Column = npt.NDArray[Any]


@dataclass(frozen=True)
class Columns:
    """Settings of M configurations: values by the name of the setting, NaN for a configuration without it."""

    of: Mapping[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.of.values()), ()))


#: M configurations, as a sequence or by columns.
Configurations = Sequence[Mapping[str, Any]] | Columns


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map of a range of numbers to the unit interval."""

    low: float  # lower end; for a logarithmic axis, its logarithm
    high: float
    log: bool

    def unit(self, value_M: Floats) -> Floats:
        """Map values to the unit interval; a missing value to its middle."""
        if self.log:
            # A branch, or another study, may set to 0 (off) a setting that is drawn logarithmically elsewhere.
            off_M = value_M <= 0
            value_M = np.where(off_M, self.low, np.log(np.where(off_M, 1.0, value_M)))
        return np.nan_to_num((value_M - self.low) / (self.high - self.low), nan=0.5)

    def value(self, unit_M: Floats) -> Floats:
        """Map points of the unit interval to values."""
        value_M = self.low + unit_M * (self.high - self.low)
        return np.exp(value_M) if self.log else value_M


@dataclass(frozen=True)
class Encoding:
    """A map of settings to the unit cube, with an axis for every numeric setting and for every word of the others."""

    ranges: Mapping[str, Axis]
    choices: Mapping[str, tuple[Any, ...]]

    @property
    def names(self) -> list[str]:
        """Return the setting of every coordinate, [D]."""
        return [*self.ranges, *(key for key, listed in self.choices.items() for _ in listed)]

    def __call__(self, settings: Configurations) -> Floats:
        """Return the points, [M, D]. Missing numbers are mapped to the middle."""
        x_MD = np.zeros((len(settings), len(self.names)))
        place = 0
        for key, axis in self.ranges.items():
            x_MD[:, place] = axis.unit(_column(settings, key).astype(float))
            place += 1
        for key, listed in self.choices.items():
            column_M = _column(settings, key)
            for word in listed:
                # A setting that is None counts as missing.
                x_MD[:, place] = 0 if word is None else column_M == _objects([word])
                place += 1
        return x_MD


def _column(settings: Configurations, key: str) -> Column:
    """Return the values of a setting, [M]; NaN if it is missing. A loss that is not in a mixture has weight 0."""
    if isinstance(settings, Columns):
        return settings.of[key] if key in settings.of else np.full(len(settings), _missing(settings.of, key))
    found = [each[key] if key in each else _missing(each, key) for each in settings]
    return _objects([np.nan if value is None else value for value in found])


def _objects(values: Sequence[Any]) -> Column:
    """Return an array of objects, [M], also if they are sequences, which NumPy would unpack."""
    column_M = np.empty(len(values), object)
    for number, value in enumerate(values):
        column_M[number] = value
    return column_M


def _missing(settings: Iterable[str], key: str) -> float:
    return 0.0 if key.startswith("loss.") and any(name.startswith("loss.") for name in settings) else math.nan


def encoding_of(space: Space) -> Encoding:
    """Return the encoding of all settings that a space can suggest."""
    listed = {key: (0.0, 1.0) if key.startswith("loss.") else space.values_of(key) for key in space.columns()}
    drawn = {key: [d for name, d in space.parameters.items() if name.partition(" ")[0] == key] for key in listed}
    return _encoding(listed, drawn)


def encoding_of_parameters(parameters: Mapping[str, BaseDistribution]) -> Encoding:
    """Return the encoding of Optuna's parameters, each as one setting."""
    listed = {name: d.choices if isinstance(d, CategoricalDistribution) else () for name, d in parameters.items()}
    return _encoding(listed, {name: [d] for name, d in parameters.items()})


def _encoding(listed: Mapping[str, Sequence[Any]], drawn: Mapping[str, Iterable[BaseDistribution]]) -> Encoding:
    """Make the axes of each setting from its listed values and its distributions."""
    ranges: dict[str, Axis] = {}
    choices: dict[str, tuple[Any, ...]] = {}
    for key, values in listed.items():
        if not all(map(is_number, values)):
            choices[key] = tuple(values)
            continue
        spans = [d for d in drawn[key] if isinstance(d, FloatDistribution | IntDistribution)]
        ends = [*values, *(d.low for d in spans), *(d.high for d in spans)]
        # Listed positive numbers, such as batch sizes, get a logarithmic axis.
        log = any(d.log for d in spans) if spans else min(ends) > 0
        if log:
            ends = [math.log(end) for end in ends if end > 0]
        low, high = min(ends), max(ends)
        if high > low:
            ranges[key] = Axis(low, high, log)
    return Encoding(ranges, choices)


def unit_of(distribution: BaseDistribution, value: Any) -> float:
    """Map a parameter's value to the unit interval from which it is drawn uniformly."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.to_internal_repr(value) + 0.5) / len(distribution.choices)
    (unit,) = _axis_of(distribution).unit(np.array([value], float))
    return float(unit)


def values_at(distribution: BaseDistribution, unit_M: Floats) -> Column:
    """Map points of the unit interval to values of a parameter, [M]: the inverse of `unit_of`."""
    if isinstance(distribution, CategoricalDistribution):
        count = len(distribution.choices)
        chosen_M: Column = _objects(distribution.choices)[np.minimum(unit_M * count, count - 1).astype(int)]
        return chosen_M
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    value_M = _axis_of(distribution).value(unit_M)
    if distribution.step:
        value_M = distribution.low + distribution.step * np.round((value_M - distribution.low) / distribution.step)
    value_M = np.clip(value_M, distribution.low, distribution.high)
    return value_M.astype(int) if isinstance(distribution, IntDistribution) else value_M


def _axis_of(distribution: BaseDistribution) -> Axis:
    """Return the axis on which a parameter is drawn uniformly. The steps at both ends are as wide as the others."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    half = (distribution.step or 0) / 2
    low, high = distribution.low - half, distribution.high + half
    return Axis(math.log(low), math.log(high), True) if distribution.log else Axis(low, high, False)
