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
