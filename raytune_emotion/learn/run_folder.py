"""Name the files of a run's folder, and read its reports, without importing PyTorch.

`checkpoint` describes the content of the files.
"""

from pathlib import Path
from typing import Any, cast

from raytune_emotion.errors import UserError
from raytune_emotion.learn.report import DRIVER_KEYS, Report
from raytune_emotion.storage.json_text import is_number, load_json

LAST, BEST, HISTORY = "last.safetensors", "best.safetensors", "history.jsonl"
PREDICTIONS = "predictions.safetensors"

#: Keys of the numbers with which a study computes, and their bound. Other metrics of a diverged run can be larger.
_BOUNDED, _LARGEST = {*DRIVER_KEYS, "val_js", "time"}, 2**53


def read_history(folder: Path) -> list[Report]:
    """Read the reports of the run in a folder, in order. An incomplete last line is left out.

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
            f"{folder / HISTORY}: a damaged line ({error}); delete the file: a run that continues writes it "
            f"again, the reports of an ended one are lost"
        ) from error


def _report(line: Any) -> Report:
    """Check that a line of a history is a report: it has the keys that a study reads, and only numbers and `finished`.

    Raises:
        ValueError: it is not a report.
    """
    numbers: dict[str, Any] = dict.fromkeys((*DRIVER_KEYS, "val_js", "time"))
    numbers |= line if isinstance(line, dict) else {}
    if not isinstance(numbers.pop("finished"), bool):
        raise ValueError("'finished' is not a boolean")
    if wrong := [key for key, value in numbers.items() if not (key.isidentifier() and _is_number(key, value))]:
        raise ValueError(f"{wrong[0]!r} is not a number")
    if not isinstance(numbers["report"], int) or numbers["report"] < 1:
        raise ValueError("'report' is not a positive integer")
    return cast("Report", line)


def _is_number(key: str, value: Any) -> bool:
    """Tell whether a value is a number that a report can have under a key."""
    # Larger integers are not exact as floats, which the tables hold.
    bounded = key in _BOUNDED or isinstance(value, int)
    return is_number(value) and (not bounded or abs(value) < _LARGEST)
