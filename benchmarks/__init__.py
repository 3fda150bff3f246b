"""Measurements: each module here is one, and its `run` returns a table. Ratios within one run, never absolute times."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """What a benchmark has measured."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: list[str] = field(default_factory=list)  # sentences: what follows from the rows
