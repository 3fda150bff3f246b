"""Name the files that a run leaves in its folder, and read its reports: what a study's record needs, without PyTorch.

`checkpoint` says what the files hold.
"""

from pathlib import Path
from typing import Any, cast

from raytune_emotion.errors import UserError
from raytune_emotion.learn.report import HEARD, Report
from raytune_emotion.storage.json_text import is_number, load_json

LAST, BEST, HISTORY = "last.safetensors", "best.safetensors", "history.jsonl"
PREDICTIONS = "predictions.safetensors"

#: Larger integers are not exact as floats.
_LARGEST = 2**53


def read_history(folder: Path) -> list[Report]:
    """Read the reports of the run in a folder, in order, without a last line that is not written to its end.

    Raises:
        UserError: another line is damaged.
    """
    try:
        lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        return [_report(load_json(line)) for line in lines]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(
            f"{folder / HISTORY}: a damaged line ({error}); delete the file, and resuming the run restores it"
        ) from error


def _report(line: Any) -> Report:
    """Take a line of a history for a report if it holds what a study looks at, and numbers alone but for `finished`.

    Raises:
        ValueError: it does not.
    """
    numbers: dict[str, Any] = dict.fromkeys((*HEARD, "val_js", "time"))
    numbers |= line if isinstance(line, dict) else {}
    if not isinstance(numbers.pop("finished"), bool):
        raise ValueError("no truth value as 'finished'")
    if wrong := [key for key, value in numbers.items() if not (key.isidentifier() and _is_number(value))]:
        raise ValueError(f"no number as {wrong[0]!r}")
    if not isinstance(numbers["report"], int) or numbers["report"] < 1:
        raise ValueError("no positive integer as 'report'")
    return cast("Report", line)


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number that any table can hold."""
    return is_number(value) and abs(value) < _LARGEST
