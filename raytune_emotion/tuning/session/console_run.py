"""Run a study, and show its progress on the console."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

from rich.console import Console

from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.ray_metrics import study_metrics
from raytune_emotion.tuning.execution.recorder import Event, Watch
from raytune_emotion.tuning.execution.runner import run_study
from raytune_emotion.tuning.report.live_console import say, show_events
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.study.open_study import OpenStudy


def run_with_progress(
    console: Console,
    study: OpenStudy,
    placement: Placement,
    *,
    time_budget: timedelta | None = None,
    until_gain: float | None = None,
    failure: Callable[[], str] = lambda: "",
    watches: Sequence[Watch] = (),
) -> None:
    """Run a study as `run_study` does, and show its progress.

    Args:
        console: console for the progress.
        study: study to run.
        placement: placement of its trials.
        time_budget: see `run_study`.
        until_gain: see `run_study`.
        failure: see `run_study`.
        watches: further receivers of all events of trials.
    """
    with ExitStack() as stack:
        show = stack.enter_context(show_events(console, StudyProgress(study, time_budget=time_budget)))
        measure = stack.enter_context(study_metrics(study))

        def watch(event: Event) -> None:
            for hear in (show, measure, *watches):
                hear(event)

        run_study(
            study,
            placement,
            time_budget=time_budget,
            until_gain=until_gain,
            watch=watch,
            say=partial(say, console),
            failure=failure,
        )
