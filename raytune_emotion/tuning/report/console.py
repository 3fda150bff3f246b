"""Show a running study on the console."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.terminal import count
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.recorder import Event
from raytune_emotion.tuning.execution.runner import run_study
from raytune_emotion.tuning.study.open_study import OpenStudy


def run_with_progress(
    console: Console,
    study: OpenStudy,
    placement: Placement,
    *,
    time_budget: timedelta | None = None,
    failure: Callable[[], str] = lambda: "",
) -> None:
    """Run a study as `run_study` does, with a line for each trial that ends and, in a terminal, a bar below them."""
    with _progress(console, study) as watch:
        run_study(study, placement, time_budget=time_budget, watch=watch, say=console.print, failure=failure)


@contextmanager
def _progress(console: Console, study: OpenStudy) -> Iterator[Callable[[Event], None]]:
    """Print a line for each trial that ends, and below them, in a terminal, a bar."""
    progress = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    running: dict[str, str] = {}
    records = study.records()
    ended = {record.trial_id for record in records if record.ended}
    reached = {r.trial_id: r.best["val_js"] for r in records if r.best and r.status != "failed"}

    def text() -> str:
        if not reached:
            return "no evaluation yet"
        return f"best {min(reached.values()):.4f}  running {', '.join(running.values())}"

    def watch(event: Event) -> None:
        trial_id = event.proposal.trial_id
        if event.report is not None:
            reached[trial_id] = event.report[OBJECTIVE]
            running[trial_id] = f"{trial_id} {event.report[OBJECTIVE]:.4f}"
        if event.status != "running":
            running.pop(trial_id, None)
        if event.status == "failed":  # it is never the best
            reached.pop(trial_id, None)
        if event.status not in ("running", "paused"):
            ended.add(trial_id)
            progress.update(bar, completed=len(ended))
            progress.console.print(_line(event))
        progress.update(bar, description=text())

    with progress:
        bar = progress.add_task(text(), total=study.spec.trials, completed=len(ended))
        yield watch


def _line(event: Event) -> str:
    settings = event.proposal.settings
    what = [f"{settings['model.backbone']:<16}"] if "model.backbone" in settings else []
    what += [
        f"{key.rpartition('.')[2]} {settings[key]:.3g}" for key in ("optim.lr", "train.batch_size") if key in settings
    ]
    what += [
        f"{key.removeprefix('loss.')} {w:.2f}" for key, w in settings.items() if key.startswith("loss.") and w >= 0.005
    ]
    if event.report is None:
        outcome = event.reason
    else:
        outcome = f"JS {event.report[OBJECTIVE]:.4f} bits after {count(float(event.report['epoch']), 'epoch')}"
    return f"{event.proposal.trial_id}  {event.status:<8}  {outcome}  {'  '.join(what)}"
