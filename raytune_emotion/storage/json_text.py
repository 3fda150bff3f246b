"""Read JSON that may be anything."""

import json
import sys
from typing import Any, TypeGuard


def load_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no valid JSON, or nested without end.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value is a finite number that a float can hold; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_setting(value: Any) -> bool:
    """Tell whether a value is what a setting can be: text, a number, a truth value, nothing, or a list of these."""
    if isinstance(value, list):
        return all(is_setting(item) and not isinstance(item, list) for item in value)
    return value is None or isinstance(value, str | bool) or is_number(value)


def are_settings(value: Any) -> bool:
    """Tell whether a value is a mapping of names to settings, with a number as the weight of each loss."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and (is_number(item) if key.startswith("loss.") else is_setting(item))
        for key, item in value.items()
    )
