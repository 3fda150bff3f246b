"""Parse JSON from untrusted files."""

import json
import sys
from typing import Any, TypeGuard


def load_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Tell whether a value is a finite number that a float can hold; a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
