"""A study on the console: what is looked at before it starts, how it is interrupted, and what is seen of it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from raytune_emotion.tuning.execution.cluster import Placement
from raytune_emotion.tuning.execution.runner import run_study
from raytune_emotion.tuning.execution.tune_adapter import Event
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.records import TrialRecord, read_records
from raytune_emotion.tuning.study.spec import StudySpec


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM, by which Slurm, Kubernetes and `ray job stop` end a process, do what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Called, not raised: in a Ray job SIGINT is blocked.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(number, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_shown(
    console: Console,
    folder: Path,
    spec: StudySpec,
    placement: Placement,
    *,
    uri: str | None = None,
    time_budget: timedelta | None = None,
) -> bool:
    """Runs a study as `run_study` does, with a line for each trial that ends and, in a terminal, a bar below them.

    Returns:
        Whether it was interrupted; all until then is recorded.
    """
    with _progress(console, spec, read_records(folder, load_study(folder))) as watch:
        try:
            run_study(folder, spec, placement, uri=uri, time_budget=time_budget, watch=watch)
        except KeyboardInterrupt:
            return True
    return False


@contextmanager
def _progress(console: Console, spec: StudySpec, records: list[TrialRecord]) -> Iterator[Callable[[Event], None]]:
    """A line for each trial that ends, and below them, in a terminal, a bar."""
    progress = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    running: dict[str, str] = {}
    ended = {record.trial_id for record in records if record.status != "running"}
    best = min([spec.baseline["js"], *(record.best["val_js"] for record in records if record.best)])

    def watch(event: Event) -> None:
        nonlocal best
        trial_id = event.proposal.trial_id
        if event.report is not None:
            best = min(best, event.report["best_val_js"])
            running[trial_id] = f"{trial_id} {event.report['best_val_js']:.4f}"
        if event.status != "running":
            running.pop(trial_id, None)
            ended.add(trial_id)
            progress.update(bar, completed=len(ended))
            progress.console.print(_line(event))
        progress.update(bar, description=f"best {best:.4f}  running {', '.join(running.values())}")

    with progress:
        bar = progress.add_task(f"best {best:.4f}", total=spec.trials, completed=len(ended))
        yield watch


def _line(event: Event) -> str:
    settings = event.proposal.settings
    what = [f"{settings['model.backbone']:<16}"] if "model.backbone" in settings else []
    what += [
        f"{key.rpartition('.')[2]} {settings[key]:.3g}" for key in ("optim.lr", "train.batch_size") if key in settings
    ]
    what += [f"{key.removeprefix('loss.')} {w:.2f}" for key, w in settings.items() if key.startswith("loss.") and w]
    if event.report is None:
        outcome = event.reason
    else:
        outcome = f"JS {event.report['best_val_js']:.4f} bits after {event.report['epoch']:g} epochs"
    return f"{event.proposal.trial_id}  {event.status:<8}  {outcome}  {'  '.join(what)}"
