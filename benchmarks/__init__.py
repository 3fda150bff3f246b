"""Measurements: each module here is one, and its `run` returns a table. Ratios within one run, never absolute times."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

#: Characters of a line in a file or a pipe, which would otherwise have the 80 of a small terminal, and cut numbers off.
_WIDTH = 240


@dataclass(frozen=True)
class Table:
    """What a benchmark has measured."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: list[str] = field(default_factory=list)  # sentences: what follows from the rows


def table_console() -> Console:
    """Make a console that shows tables whole: also in a file."""
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console
