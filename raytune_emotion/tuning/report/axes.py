"""Define the axis of each searched setting in plots, with the scale of the search space."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raytune_emotion.errors import UserError
from raytune_emotion.storage.json_text import is_number
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import Fixed, Setting, Simplex, Space
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.spec import StudySpec

#: Ratio of the largest to the smallest value above which a setting outside of the space gets a log scale.
_LOG_RATIO = 30


@dataclass(frozen=True)
class Axis:
    """The scale of one setting."""

    name: str
    kind: Literal["linear", "log", "choice"]
    low: float = 0.0  # only for numbers
    high: float = 0.0
    choices: tuple[str, ...] = ()  # as text, in the order of the space

    @property
    def holds_text(self) -> bool:
        """Tell whether the values are names, not numbers."""
        return any(not choice.replace(".", "", 1).isdigit() for choice in self.choices)

    def position(self, value: Any) -> float | str | None:
        """Return the position of a value on the axis: a number, or the text of a choice; None without a value."""
        if value is None and "None" not in self.choices:
            return None
        return choice_text(value) if self.kind == "choice" else float(value)


def choice_text(value: Any) -> str:
    """Write a choice as in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def space_of(spec: StudySpec) -> Space | None:
    """Read a study's space; return None if this version cannot. The trials are shown nevertheless."""
    try:
        return parse_space(spec.space)
    except UserError:
        return None


def searched_axes(space: Space | None, records: Sequence[TrialRecord]) -> list[Axis]:
    """Return an axis for each setting in which the trials differ, in the order of the space."""
    columns = space.columns() if space else ()
    names = dict.fromkeys([*columns, *(name for record in records for name in record.settings)])
    axes = []
    for name in names:
        if len({repr(record.settings.get(name)) for record in records}) > 1:
            values = [record.settings[name] for record in records if name in record.settings]
            axes.append(_axis(name, settings_of_name(space, name) if space else [], values))
    return axes


def settings_of_name(space: Space, name: str) -> list[Setting]:
    """Return all definitions of a setting in the space and its branches; for a single loss, those of `loss`."""
    key = "loss" if name.startswith("loss.") else name
    layers = [space.settings, *(branch.settings for branch in space.when)]
    return [layer[key] for layer in layers if key in layer]


def _axis(name: str, settings: Sequence[Setting], values: Sequence[Any]) -> Axis:
    if any(isinstance(setting, Simplex) for setting in settings) and all(map(is_number, values)):
        return Axis(name, "linear", 0.0, 1.0)
    ranges = [setting for setting in settings if isinstance(setting, FloatDistribution | IntDistribution)]
    if not ranges or not all(map(is_number, values)):
        given = [value for setting in settings for value in _possible_values(setting)]
        return _choices(name, [*given, *values]) if given else _axis_of_values(name, values)
    fixed = [value for setting in settings for value in _possible_values(setting) if is_number(value)]
    low = min(*(r.low for r in ranges), *values, *fixed)
    high = max(*(r.high for r in ranges), *values, *fixed)
    return Axis(name, "log" if low > 0 and any(r.log for r in ranges) else "linear", float(low), float(high))


def _axis_of_values(name: str, values: Sequence[Any]) -> Axis:
    if not all(map(is_number, values)) or len(set(values)) < 2:
        return _choices(name, values)
    low, high = float(min(values)), float(max(values))
    return Axis(name, "log" if low > 0 and high > _LOG_RATIO * low else "linear", low, high)


def _choices(name: str, values: Iterable[Any]) -> Axis:
    return Axis(name, "choice", choices=tuple(dict.fromkeys(map(choice_text, values))))


def _possible_values(setting: Setting) -> tuple[Any, ...]:
    if isinstance(setting, Fixed):
        return (setting.value,)
    return tuple(setting.choices) if isinstance(setting, CategoricalDistribution) else ()
