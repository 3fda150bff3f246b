"""Run a study, and show its progress on the console."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from raytune_emotion.tuning.execution.recorder import Event, Watch
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.report.live_console import say, show_events
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.report.ray_metrics import study_metrics


def run_with_progress(console: Console, run: StudyRun, watches: Sequence[Watch] = ()) -> None:
    """Run a study as `run_study` does, and show its progress.

    Args:
        console: console for the progress.
        run: run of the study; its `watch` and `say` are set here.
        watches: further receivers of all events of trials.
    """
    progress = StudyProgress(run.study, time_budget=run.time_budget)
    with show_events(console, progress) as show, study_metrics(progress):

        def watch(event: Event) -> None:
            for hear in (show, *watches):
                hear(event)

        run_study(dataclasses.replace(run, watch=watch, say=partial(say, console)))
