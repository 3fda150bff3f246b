"""Check the trials of a journal: Optuna accepts any JSON, and a journal may come from a stranger."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from raytune_emotion.storage.json_text import is_number
from raytune_emotion.tuning.policy.trial_attributes import (
    CONFIRMS,
    CONTINUES,
    COST,
    DRIVER,
    PAUSED,
    REASON,
    RESUMED_IN,
    SECONDS,
    SETTINGS,
    START,
    TAKEN_UP,
)
from raytune_emotion.tuning.space.space import are_settings, is_setting
from raytune_emotion.tuning.study.trials import trial_id_of


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and 0 <= value < 2**31


_ATTRIBUTES: Mapping[str, Callable[[Any], bool]] = {
    SETTINGS: are_settings,
    COST: is_number,
    SECONDS: is_number,
    RESUMED_IN: is_number,
    PAUSED: lambda value: isinstance(value, bool),
    START: lambda value: isinstance(value, bool),
    TAKEN_UP: _is_count,
    DRIVER: lambda value: isinstance(value, int),
    REASON: lambda value: isinstance(value, str),
    CONFIRMS: lambda value: isinstance(value, str),
    "fixed_params": are_settings,
}


def check_trials(trials: Sequence[FrozenTrial]) -> None:
    """Check the trials of a journal.

    Raises:
        ValueError: a trial contains values that this project does not write.
    """
    ids = {trial_id_of(number) for number in range(len(trials))}
    for number, trial in enumerate(trials):
        attributes = {**trial.system_attrs, **trial.user_attrs}
        wrong = [name for name, fits in _ATTRIBUTES.items() if name in attributes and not fits(attributes[name])]
        continued = attributes.get(CONTINUES)
        if continued is not None and continued not in ids:
            wrong.append(CONTINUES)
        reported = trial.intermediate_values
        if not all(_is_count(step) and is_number(value) for step, value in reported.items()):
            wrong.append("its reports")
        if not all(map(is_setting, trial.params.values())):
            wrong.append("its parameters")
        if not all(map(is_number, trial.values or ())):
            wrong.append("its value")
        if wrong:
            raise ValueError(f"trial {number}: {wrong[0]}: not in the format of a search")
