"""Read YAML that may be anything: too large, nested without end, or grown by aliases."""

import itertools
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from raytune_emotion.errors import UserError

_MOST_BYTES = 4_000_000
#: A file of more values is no file of settings. Aliases can make billions of a few lines.
MOST_VALUES = 100_000
NESTED = "is nested too deeply"
TOO_MANY = f"holds more than {MOST_VALUES:,} values, counted where aliases repeat them"


def read_text(file: Path, what: str) -> str:
    """Read a file of text, such as "the search space".

    Raises:
        UserError: it cannot be read, is larger than a text that people write, or no text.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)  # a device such as /dev/zero has no end
        if len(content) > _MOST_BYTES:
            raise UserError(f"{file}: {what} is larger than {_MOST_BYTES / 1e6:.0f} MB; name another file")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: {what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: {what} is not text in UTF-8") from None


def load_yaml(text: str | bytes, *, pure: bool = True) -> Any:
    """Return what a YAML text holds, as plain values.

    Args:
        text: of one document.
        pure: whether to read it as YAML 1.2, in which 1e-5 is a number; else by the faster parser.

    Raises:
        YAMLError, ValueError: it is no valid YAML, or holds too much.
    """
    try:
        value = YAML(typ="safe", pure=pure).load(text)
    except RecursionError:
        raise ValueError(NESTED) from None
    if sum(1 for _ in itertools.islice(_values_in(value), MOST_VALUES + 1)) > MOST_VALUES:
        raise ValueError(TOO_MANY)
    return value


def _values_in(value: Any) -> Any:
    """Iterate over all values within a value, depth first; without an end where it contains itself."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
