"""Parse YAML from untrusted files: too large, nested too deeply, or expanded by aliases."""

import itertools
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line

_MOST_BYTES = 4_000_000
#: Largest number of values in a file. Aliases can expand a few lines to billions of values.
MOST_VALUES = 100_000
NESTED = "is nested too deeply"
TOO_MANY = f"holds more than {MOST_VALUES:,} values, including those that aliases repeat"


def read_text(file: Path, what: str) -> str:
    """Read a text file.

    Args:
        file: the file.
        what: name of its content for errors, such as "the search space".

    Raises:
        UserError: the file cannot be read, is too large, or is not text in UTF-8.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)  # a device such as /dev/zero has no end
        if len(content) > _MOST_BYTES:
            raise UserError(f"{file}: {what} is larger than {_MOST_BYTES / 1e6:.0f} MB; name another file")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: {what} cannot be read: {error.strerror}; name a readable file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: {what} is not text in UTF-8; save it in UTF-8") from None


def load_yaml(text: str | bytes, *, pure: bool = True) -> Any:
    """Parse a YAML text into plain values.

    Args:
        text: one document.
        pure: parse it as YAML 1.2, in which 1e-5 is a number; False: use the faster parser.

    Raises:
        YAMLError, ValueError: the text is not valid YAML, or holds too many values.
    """
    try:
        value = YAML(typ="safe", pure=pure).load(text)
    except RecursionError:
        raise ValueError(NESTED) from None
    if sum(1 for _ in itertools.islice(_values_in(value), MOST_VALUES + 1)) > MOST_VALUES:
        raise ValueError(TOO_MANY)
    return value


def invalid_yaml(name: Path | str, error: Exception) -> UserError:
    """Return the error for a text that is not valid YAML, with the line if it is known.

    Args:
        name: name of the text, such as its file.
        error: what the parser has raised.
    """
    if isinstance(error, MarkedYAMLError) and error.problem:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return UserError(f"{name}:{line}: not valid YAML: {error.problem}; correct the file")
    return UserError(f"{name}: not valid YAML: {first_line(error)}; correct the file")


def _values_in(value: Any) -> Any:
    """Iterate over all values within a value, depth first. The iteration never ends if a value contains itself."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
