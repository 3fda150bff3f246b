"""Read a search space from a YAML file, and check it completely before anything starts.

optim.lr: {log_uniform: [1e-5, 3e-3]}       # a setting's dotted path: a distribution, or a plain value
train.batch_size: {choice: [32, 64]}        # also uniform, int_uniform ([low, high] or [low, high, step]),
loss: {simplex: [mse, kl, js]}              # int_log_uniform; weights of a mixture that sum to 1
when:                                       # settings for some choices only; the last entry that applies wins
  - if: {train.batch_size: [64]}
    optim.lr: {log_uniform: [1e-4, 1e-2]}
start:                                      # points tried first; omitted settings are sampled
  - {optim.lr: 1e-3, train.batch_size: 32, loss.kl: 1}

`json_schema` describes the whole format; editors use it to complete and check a space.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from raytune_emotion.config import SETTINGS, FlatConfig, suggest_setting
from raytune_emotion.errors import UserError, show
from raytune_emotion.storage.json_text import is_number
from raytune_emotion.storage.yaml_text import MOST_VALUES, NESTED, TOO_MANY, invalid_yaml, read_text
from raytune_emotion.tuning.space.joint_check import conflicts, missing_weights
from raytune_emotion.tuning.space.space import Branch, Fixed, Setting, Simplex, Space
from raytune_emotion.tuning.space.words import NEVER_SEARCHED, Errors, is_on_grid, read_setting, read_value

_NO_OVERRIDES: FlatConfig = MappingProxyType({})

_Path = tuple[str | int, ...]


def load_space(path: Path, *, overrides: FlatConfig = _NO_OVERRIDES) -> Space:
    """Read a search space.

    Args:
        path: a YAML file (YAML 1.2, in which 1e-5 is a number).
        overrides: settings fixed by the caller, such as the number of epochs. They replace those of the file.

    Raises:
        UserError: all errors at once, each as "FILE:LINE: setting: what is wrong".
    """
    text = read_text(path, "the search space")
    source = _Source(str(path))
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except YAMLError as error:
        raise invalid_yaml(path, error) from None
    except RecursionError:
        raise UserError(f"{path}: the search space {NESTED}") from None
    if not isinstance(node, MappingNode):
        raise UserError(f"{path}:1: expected a mapping of settings, such as `optim.lr: 1e-3`")
    space = _parse(_plain_values(node, (), source, yaml), source, overrides)
    source.finish(missing_weights(space))
    return space


def parse_space(mapping: Mapping[str, Any], name: str = "the search space") -> Space:
    """Parse plain dicts and lists, such as those of `Space.to_dict`, like `load_space`. Errors name the file `name`.

    The existence of pretrained weights is not checked, because a machine may read a study that it cannot run.
    """
    return _parse(mapping, _Source(name), {})


class _Source:
    """The line numbers of a file's parts, and the errors in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[_Path, int] = {}
        self.faults: dict[str, int] = {}
        self.places: dict[str, _Path] = {}  # positions of settings, by their names in Optuna
        # Settings that could not be read. References to them cause no further errors.
        self.broken: set[str] = set()

    def fault(self, at: _Path, sentence: str, *, line: int = 0) -> None:
        line = line or self.lines.get(at, 0)
        self.faults[f"{self.name}:{line}: {sentence}" if line else f"{self.name}: {sentence}"] = line

    def faults_of(self, at: _Path, key: str, errors: Errors) -> None:
        for below, sentence in errors.items():
            self.fault((*at, *below), f"{key}: {sentence}")

    def finish(self, found: Iterable[tuple[str, str]] = ()) -> None:
        """Raise all errors, also those that are found now; each is given with its setting's name in Optuna."""
        for parameter, sentence in found:
            self.fault(self.places.get(parameter, ()), sentence)
        if self.faults:
            raise UserError(sorted(self.faults, key=self.faults.__getitem__))


def _plain_values(node: Node, at: _Path, source: _Source, yaml: YAML, within: tuple[int, ...] = ()) -> Any:
    """Convert a node to dicts, lists and scalars, and note its lines in the source."""
    source.lines.setdefault(at, node.start_mark.line + 1)
    if len(source.lines) > MOST_VALUES:
        raise UserError(f"{source.name}: the search space {TOO_MANY}")
    if id(node) in within:
        source.fault(at, f"{_setting_at(at)}: contains itself by an alias")
        return None
    within = (*within, id(node))
    if isinstance(node, MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            here = (*at, key)
            if key in result:
                source.fault(here, f"{key}: repeats line {source.lines[here]}; remove one of them", line=line)
            else:
                source.lines[here] = line
                result[key] = _plain_values(value_node, here, source, yaml, within)
        return result
    if isinstance(node, SequenceNode):
        return [_plain_values(item, (*at, i), source, yaml, within) for i, item in enumerate(node.value)]
    try:
        return yaml.constructor.construct_object(node)
    except (YAMLError, ValueError, LookupError):
        source.fault(at, f"{_setting_at(at)}: {node.value!r} with the tag {node.tag} is not a plain value")
        return None


def _setting_at(at: _Path) -> str:
    """Return the setting at a position in the file."""
    if at[0] in ("when", "start"):
        return str(at[2]) if len(at) > 2 else str(at[0])
    return str(at[0])


def _parse(mapping: Mapping[str, Any], source: _Source, overrides: FlatConfig) -> Space:
    when, start = ([] if mapping.get(key) is None else mapping[key] for key in ("when", "start"))
    kept: dict[str, Any] = {key: value for key, value in mapping.items() if key not in ("when", "start", *overrides)}
    kept |= {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()}
    settings = _settings(source, (), kept)
    source.places = {key: (key,) for key in settings}

    if not isinstance(when, list):
        source.fault(("when",), "when: expected a list of entries, each with an `if` and settings")
        when = []
    entries = _entries_without(overrides, when)
    deciding = {key for entry in entries.values() for key in _conditions_of(entry)}
    branches: list[Branch] = []
    for i, entry in entries.items():
        branch = _branch(source, ("when", i), entry, settings, deciding)
        if branch:
            for key in branch.settings:
                if any(b.conditions == branch.conditions and key in b.settings for b in branches):
                    source.fault(("when", i, key), f"{key}: already set by an earlier entry with the same `if`")
                source.places[branch.parameter(key)] = ("when", i, key)
            branches.append(branch)
    every = [*settings, *(key for branch in branches for key in branch.settings)]
    if "loss" in every and any(key.startswith("loss.") for key in every):
        source.fault(("loss",), "loss: cannot be combined with single weights (loss.…); give one or the other")

    if not isinstance(start, list):
        source.fault(("start",), "start: expected a list of points, each a mapping of settings to values")
        start = []
    space = Space(settings, tuple(branches))
    points = _entries_without(overrides, start)
    parsed = tuple(_start_point(source, ("start", i), point, space) for i, point in points.items())
    if not space.parameters and not source.faults:
        source.fault((), "nothing is searched; give a setting a distribution, such as {choice: [a, b]}")
    source.finish()
    source.finish(conflicts(space))

    kept |= {key: list(part.values()) for key, part in (("when", entries), ("start", points)) if part}
    return Space(settings, space.when, parsed, kept)


def _entries_without(overrides: FlatConfig, entries: list[Any]) -> dict[int, Any]:
    """Return entries of `when` or `start` by number, without overridden settings and without entries then empty."""
    result: dict[int, Any] = {}
    for i, entry in enumerate(entries):
        if isinstance(entry, Mapping) and not overrides.keys().isdisjoint(entry):
            left = {key: value for key, value in entry.items() if key not in overrides}
            if left.keys() - {"if"}:
                result[i] = left
        else:
            result[i] = entry
    return result


def _conditions_of(entry: Any) -> Iterable[str]:
    conditions = entry.get("if") if isinstance(entry, Mapping) else None
    return conditions if isinstance(conditions, Mapping) else ()


def _settings(source: _Source, at: _Path, given: Mapping[str, Any]) -> dict[str, Setting]:
    result: dict[str, Setting] = {}
    for key, value in given.items():
        if key != "loss" and key not in SETTINGS:
            known = [*SETTINGS, "loss", *(() if at else ("when", "start"))]
            source.fault((*at, key), f"{key}: unknown setting{suggest_setting(key, known)}")
            continue
        setting, errors = read_setting(key, value)
        source.faults_of((*at, key), key, errors)
        if setting is None or (errors and key == "loss"):
            source.broken.add(key)
        else:
            result[key] = setting
    return result


def _branch(
    source: _Source, at: _Path, entry: Any, settings: Mapping[str, Setting], deciding: set[str]
) -> Branch | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("if"), Mapping) or not entry["if"]:
        source.fault(at, "when: an entry needs an `if`, such as {model.backbone: [resnet18]}")
        return None
    body = {key: value for key, value in entry.items() if key != "if"}
    if not body:
        source.fault(at, "when: an entry needs settings in addition to its `if`")
    conditions: dict[str, tuple[Any, ...]] = {}
    for key, wanted in entry["if"].items():
        here = (*at, "if", key)
        setting = settings.get(key)
        if key in source.broken:
            continue
        if not isinstance(setting, CategoricalDistribution):
            hint = suggest_setting(key, [k for k, s in settings.items() if isinstance(s, CategoricalDistribution)])
            source.fault(here, f"{key}: an `if` needs a setting that is searched by choice; this one is not{hint}")
            continue
        values = wanted if isinstance(wanted, list) else [wanted]
        unknown = [value for value in values if value not in setting.choices]
        for value in unknown:
            choices = [str(choice) for choice in setting.choices]
            near = suggest_setting(value, choices) if isinstance(value, str) else ""
            source.fault(here, f"{key}: expected one of its choices ({', '.join(choices)}), got {show(value)}{near}")
        if not values:
            source.fault(here, f"{key}: an `if` needs at least one of its choices")
        # Sort the values in the order of the choice, so that equal conditions have the same name.
        conditions[key] = tuple(choice for choice in setting.choices if choice in values)
    for key in body:
        if key in deciding:
            source.fault((*at, key), f"{key}: the `if` of an entry uses it, so it cannot depend on a `when` itself")
        elif key.startswith("loss."):
            source.fault((*at, key), f"{key}: in a `when`, write loss: with a name, a choice or a simplex")
        elif key in NEVER_SEARCHED and not isinstance(body[key], Mapping):
            source.fault((*at, key), f"{key}: must be the same in all trials, because {NEVER_SEARCHED[key]}")
    return Branch(conditions, _settings(source, at, body))


def _start_point(source: _Source, at: _Path, point: Any, space: Space) -> dict[str, Any]:
    """Return a start point's values in the form of the configuration, checked against the space."""
    if not isinstance(point, Mapping) or not point:
        source.fault(at, "start: expected a mapping of settings to values as a point")
        return {}
    for branch in space.when:
        depending = [key for key in point if key in branch.settings or key.partition(".")[0] in branch.settings]
        missing = [key for key in branch.conditions if key not in point]
        if depending and missing:
            key = depending[0]
            source.fault((*at, key), f"{key}: depends on {missing[0]}; give that in this start point, too")
            return {}
    active = {key: setting for key, (_, setting) in space.active_settings(point).items()}
    mixture = active.get("loss")
    result: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for key, value in point.items():
        here = (*at, key)
        if key in source.broken or (key in SETTINGS and key.startswith("loss.") and "loss" in source.broken):
            continue
        if isinstance(mixture, Simplex) and key in SETTINGS and key.startswith("loss."):
            loss = key.removeprefix("loss.")
            if loss not in mixture.losses:
                source.fault(here, f"{key}: is not in the mixture of {', '.join(mixture.losses)}")
            elif not is_number(value) or not 0 <= value <= 1:
                source.fault(here, f"{key}: expected a weight from 0 to 1, got {show(value)}")
            else:
                weights[loss] = float(value)
        elif key not in active:
            absent = "not in this space, so it cannot be set here"
            unknown = f"unknown setting{suggest_setting(key, active)}"
            source.fault(here, f"{key}: {absent if key in SETTINGS else unknown}")
        elif isinstance(active[key], Simplex):
            source.fault(here, "loss: a mixture in this space; give weights, such as loss.kl: 1")
        else:
            wrong = _why_outside(active[key], value)
            if wrong:
                source.fault(here, f"{key}: {wrong}, got {show(value)}")
                continue
            result[key], errors = read_value(key, value)
            source.faults_of(here, key, errors)
            if isinstance(active[key], IntDistribution):
                # Optuna needs an int, also if the setting accepts fractions.
                result[key] = int(value)
    total = sum(weights.values())
    if weights and abs(total - 1) > 1e-6:
        source.fault(at, f"start: the weights of the mixture must sum to 1, but their sum is {total:.6g}")
    return result | {f"loss.{loss}": w / total for loss, w in weights.items() if total > 0}


def _why_outside(setting: Setting, value: Any) -> str | None:
    """Return the reason why a value does not belong to a setting; None if it does."""
    if isinstance(setting, Fixed):
        same = value == (list(setting.value) if isinstance(setting.value, tuple) else setting.value)
        return None if same else f"is fixed to {show(setting.value)} in this space"
    if isinstance(setting, CategoricalDistribution):
        return None if value in setting.choices else f"must be one of {', '.join(map(str, setting.choices))}"
    assert isinstance(setting, FloatDistribution | IntDistribution)
    if not is_number(value) or not setting.low <= value <= setting.high:
        return f"must lie from {setting.low:g} to {setting.high:g}"
    if not is_on_grid(value, setting.low, setting.step):
        return f"must lie on the grid from {setting.low:g} by {setting.step:g}"
    return None
