"""Show progress bars on standard error if it is a terminal."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from raytune_emotion.data.parallel import Map
from raytune_emotion.terminal import plain_console


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f}/s")


def progress(*, shown: bool = True) -> Progress:
    """Make bars with rate and remaining time. They are shown if `shown` is true and standard error is a terminal."""
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=plain_console(stderr=True),
        disable=not shown or not sys.stderr.isatty(),
    )


def count_results(pmap: Map, bars: Progress, what: str, total: int) -> Map:
    """Return the same map, which counts its results on a bar, if it is ever called. The results must be lists."""

    def counting(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        bar = bars.add_task(what, total=total)
        for part in pmap(function, tasks):
            bars.advance(bar, len(part))
            yield part

    return counting
