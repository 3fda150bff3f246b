"""Define the words of a search space: which settings take them, in which form, and the distributions that they make.

The form of a word is a type. Pydantic checks files by it, and makes the JSON Schema of the format from it.
"""

import math
import re
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Annotated, Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator, conlist

from raytune_emotion.config import SETTINGS, suggest_setting
from raytune_emotion.errors import UserError, show, suggest
from raytune_emotion.learn.backbones import check_architecture, split_source
from raytune_emotion.tuning.space.space import LOSSES, Fixed, Setting, Simplex

#: Settings that must be equal in all trials of a study, with the reason. A space may fix them.
NEVER_SEARCHED: Mapping[str, str] = {
    "data.classes": "they belong to the data",
    "model.weights_dir": "it names a folder of this machine",
    "train.epochs": "trials of unequal length cannot be compared",
    "train.evals_per_epoch": "trials are compared report by report",
    "train.compile": "it changes only the speed of a trial",
    "train.seed": "a lucky seed is not a better setting",
}

#: Largest number of steps in a range: a float tells no more of them apart, and Optuna cannot divide by smaller steps.
_MOST_STEPS = 2**53

#: The errors in the value of a setting, by their positions in it.
Errors = dict[tuple[str | int, ...], str]


def value_type(key: str) -> Any:
    """Return the type of a single value of a setting."""
    if key == "loss":
        literal: Any = Literal
        return literal[LOSSES]
    setting: Any = SETTINGS[key]
    checks = [*setting.default.metadata, *([AfterValidator(_check_backbone)] if key == "model.backbone" else ())]
    return Annotated[(setting.type, *checks)] if checks else setting.type


@cache
def word_types(key: str) -> Mapping[str, Any]:
    """Return the words that a setting takes, each with the type of what follows it; its description says its form."""
    if key in NEVER_SEARCHED or key.startswith("loss."):
        return {}
    unique = Field(json_schema_extra={"uniqueItems": True}, description="a list of values, such as [a, b]")
    several: Any = Annotated[(conlist(value_type(key), min_length=1), unique, WrapValidator(_check_distinct))]
    choice = {"choice": Annotated[(several, AfterValidator(CategoricalDistribution))]}
    if key == "loss":
        two = Field(min_length=2, description="a list of two or more losses, such as [mse, kl]")
        return {"simplex": Annotated[(several, two, AfterValidator(lambda names: Simplex(tuple(names))))], **choice}
    kind = SETTINGS[key].type if key != "data.image_size" else None
    return choice | {w: its for w, its in RANGES.items() if kind is float or (kind is int and w.startswith("int"))}


def _range_type(word: str) -> Any:
    form = "[low, high]" if "log" in word else "[low, high] or [low, high, step]"
    ends = conlist(int if word.startswith("int") else float, min_length=2, max_length=2 if "log" in word else 3)
    return Annotated[(ends, Field(description=form), AfterValidator(partial(_range, word)))]


def _range(word: str, ends: list[Any]) -> BaseDistribution:
    low, high, *step = ends
    if max(map(abs, ends)) >= 1e300:
        raise ValueError(f"{word} needs smaller numbers, got {show(ends)}")
    if low >= high:
        raise ValueError(f"the lower bound must be below the upper, got {show(ends)}")
    if "log" in word and low <= 0:
        raise ValueError(f"the bounds of {word} must be above 0, got {show(ends)}")
    if step and not is_on_grid(high, low, step[0]):
        raise ValueError(f"the step must be above 0 and lead from the lower bound to the upper, got {show(ends)}")
    if step and (high - low) / step[0] > _MOST_STEPS:
        raise ValueError(f"the step is too small for numbers from {low:g} to {high:g}, got {show(ends)}")
    if word.startswith("int"):
        return IntDistribution(low, high, log="log" in word, step=step[0] if step else 1)
    return FloatDistribution(low, high, log="log" in word, step=step[0] if step else None)


#: Words for ranges of numbers, each with the type of what follows it.
RANGES = {word: _range_type(word) for word in ("uniform", "log_uniform", "int_uniform", "int_log_uniform")}


def is_on_grid(value: float, low: float, step: float | None) -> bool:
    """Tell whether a value is a whole number of steps above a bound. Without a step, every value is."""
    if step is None:
        return True
    steps = (value - low) / step if step > 0 else math.nan
    return math.isfinite(steps) and abs(steps - round(steps)) < 1e-8


def _check_distinct(values: Any, check: Callable[[Any], Any]) -> Any:
    """Report values that occur twice, together with the errors of single values."""
    seen: set[Any] = set()
    errors: list[Any] = []
    for i, value in enumerate(values if isinstance(values, list) else []):
        # A list or a mapping is no value of a choice, which is an error of its own.
        pair = (isinstance(value, bool), value if isinstance(value, Hashable) else show(value))
        if pair in seen:
            errors.append(
                {"type": "value_error", "loc": (i,), "input": pair, "ctx": {"error": f"{show(value)} occurs twice"}}
            )
        seen.add(pair)
    try:
        values = check(values)
    except ValidationError as error:
        errors += error.errors()
    if errors:
        raise ValidationError.from_exception_data("values", errors)
    return values


def _check_backbone(name: str) -> str:
    try:
        check_architecture(name)
        if "." in name and not split_source(name)[0]:
            # Only timm knows the tags, and its import takes seconds.
            from raytune_emotion.learn.model import check_backbone

            check_backbone(name)
    except UserError as error:
        raise ValueError(str(error).removeprefix("model.backbone: ")) from None
    return name


def read_setting(key: str, given: Any) -> tuple[Setting | None, Errors]:
    """Make a setting of a value or `{word: ...}`, and return its errors. None: it has not the form of a setting.

    Wrong values of a choice and wrong bounds are kept, so that a reference to them causes no misleading error.
    """
    if isinstance(given, list) and key != "data.classes":
        return None, {(): "expected a single value, got a list; write {choice: [a, b]} to search it"}
    if not isinstance(given, Mapping):
        value, errors = read_value(key, given)
        return Fixed(value), errors
    if len(given) != 1 or not given.keys() <= word_types(key).keys():
        return None, {(): _why_not(key, *given)}
    ((word, listed),) = given.items()
    setting, errors = _check(key, word, listed)
    if word in RANGES and not errors:
        errors = {(i,): wrong for i, end in enumerate(listed[:2]) for wrong in read_value(key, end)[1].values()}
    elif word == "choice" and errors and () not in errors:
        values = [read_value(key, value)[0] for value in listed if isinstance(value, str | int | float)]
        distinct = [*dict.fromkeys(values)]
        setting = CategoricalDistribution(distinct) if distinct else None
    return setting, {(word, *at): sentence for at, sentence in errors.items()}


def read_value(key: str, given: Any) -> tuple[Any, Errors]:
    """Return a value in the form of the configuration, and its errors. `given` itself is returned if it has any."""
    value, errors = _check(key, "", tuple(given) if isinstance(given, list) else given)
    return given if errors else value, errors


def _check(key: str, word: str, given: Any) -> tuple[Any, Errors]:
    adapter = _adapter(key, word)
    try:
        return adapter.validate_python(given), {}
    except ValidationError as error:
        return None, {e["loc"]: _sentence(e, word, adapter) for e in error.errors()}


@cache
def _adapter(key: str, word: str) -> TypeAdapter[Any]:
    kind = word_types(key)[word] if word else value_type(key)
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _sentence(error: Any, word: str, adapter: TypeAdapter[Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if word and not error["loc"]:
        return f"{word} needs {adapter.json_schema()['description']}, got {show(error['input'])}"
    known = re.findall("'(.*?)'", error["msg"]) if error["type"] == "literal_error" else ()
    near = suggest(error["input"], known) if isinstance(error["input"], str) else ""
    return f"{error['msg'].replace('Input should', 'should')}, got {show(error['input'])}{near}"


def _why_not(key: str, *given: str) -> str:
    """Return the reason why a setting does not take these words."""
    words = ("simplex", "choice") if key == "loss" else ("choice", *RANGES)
    if key in NEVER_SEARCHED:
        return f"cannot be searched, because {NEVER_SEARCHED[key]}; give one value"
    if key.startswith("loss."):
        return "a single weight cannot be searched; write loss: {simplex: [mse, kl]}"
    if len(given) != 1:
        return f"expected one word of a distribution, such as {{{words[0]}: …}}, got {len(given)}"
    if given[0] not in words:
        return f"expected a distribution ({', '.join(words)}), got `{given[0]}`{suggest_setting(given[0], words)}"
    if key == "data.image_size":
        return "each size needs its own packed store; list the sizes with choice"
    if SETTINGS[key].type is int:
        return f"a whole number; write int_{given[0]} instead of {given[0]}"
    return "not a number; write {choice: [a, b]} to search it"
