"""Show a running study on the console: as a live view in a terminal, as lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.terminal import count, is_screen
from raytune_emotion.tuning.execution.recorder import Event, Watch
from raytune_emotion.tuning.report.live_state import Snapshot, StudyProgress
from raytune_emotion.tuning.report.live_view import LiveView
from raytune_emotion.tuning.report.summary import duration, gain_text, rate_text, value_text

#: Seconds between two lines on the progress of a study, on a console that cannot redraw.
_EVERY_S = 60.0
_REFRESHES_PER_S = 4


@contextmanager
def show_events(console: Console, progress: StudyProgress) -> Iterator[Watch]:
    """Show a study until the block ends, with a line for each ended trial."""

    def hear(event: Event) -> None:
        progress.watch(event)
        if event.status not in ("running", "paused") or event.reason:
            say(console, line_of(event))

    if is_screen(console):
        with Live(LiveView(progress), console=console, refresh_per_second=_REFRESHES_PER_S):
            yield hear
        return
    due = time.monotonic() + _EVERY_S

    def hear_and_sum_up(event: Event) -> None:
        nonlocal due
        hear(event)
        if time.monotonic() >= due:
            say(console, sum_up(progress.snapshot()))
            due = time.monotonic() + _EVERY_S

    yield hear_and_sum_up


def say(console: Console, line: str) -> None:
    """Print a line, as far as the console accepts it."""
    # The study continues even if the terminal has closed, or the disk of the log is full.
    with contextlib.suppress(OSError):
        console.print(line)


def line_of(event: Event) -> str:
    """Return a line on the ending of a trial, or on the reason of its restart."""
    settings = event.proposal.settings
    what = [f"{settings['model.backbone']:<16}"] if "model.backbone" in settings else []
    named = [key for key in ("optim.lr", "train.batch_size") if key in settings]
    what += [f"{key.rpartition('.')[2]} {value_text(settings[key])}" for key in named]
    what += [
        f"{key.removeprefix('loss.')} {w:.2f}" for key, w in settings.items() if key.startswith("loss.") and w >= 0.005
    ]
    if event.report is None or event.status in ("running", "failed"):
        outcome = event.reason or "was paused, and was not resumed"
    else:
        outcome = f"JS {event.report[OBJECTIVE]:.4f} bits after {count(float(event.report['epoch']), 'epoch')}"
    if event.proposal.continues is not None:
        outcome += f", continues {event.proposal.continues}"
    return f"{event.proposal.trial_id}  {event.status:<8}  {outcome}  {'  '.join(what)}"


def sum_up(snapshot: Snapshot) -> str:
    """Return a line on the progress of a study."""
    summary, paused = snapshot.summary, snapshot.summary.trials["paused"]
    best = summary.best
    parts = [
        f"{snapshot.ended} of {count(summary.trials_planned, 'trial')} ended, {len(snapshot.at_work)} at work"
        + (f", {paused} paused" if paused else ""),
        f"best JS {best.val_js:.4f} bits, trial {best.trial_id}" if best else "no evaluation yet",
    ]
    if summary.trials_per_hour is not None:
        parts.append(f"{rate_text(summary.trials_per_hour)} trials an hour")
    if summary.expected_gain is not None:
        parts.append(gain_text(summary.expected_gain))
    if snapshot.end_in is not None:
        parts.append(f"about {duration(snapshot.end_in)} left")
    return f"after {duration(snapshot.session_seconds)}: {'; '.join(parts)}"
