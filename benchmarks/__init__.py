"""Benchmarks: each module is one, and its `run` returns a table. Only ratios within a run count, not absolute times.

A `run` that may be killed yields tables, each with more results than the one before.
"""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

#: Width of lines in a file or a pipe, characters. With the default of 80, numbers would be cut off.
_WIDTH = 240


@dataclass(frozen=True)
class Table:
    """The results of a benchmark."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: list[str] = field(default_factory=list)  # sentences about the rows


def table_console() -> Console:
    """Make a console that shows complete tables, also in a file."""
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console
