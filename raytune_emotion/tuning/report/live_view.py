"""Draw a running study in a terminal, without markup, because texts come from spaces, names and machines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.terminal import byte_size, escape
from raytune_emotion.tuning.report.live_state import Disk, Snapshot, StudyProgress, TrialAtWork
from raytune_emotion.tuning.report.summary import Summary, duration, gain_text, rate_text, sparkline, value_text
from raytune_emotion.tuning.study.optuna_study import ENDED

#: Width of the labels, columns.
_LABEL = 12
#: Width of the bar of a trial's epochs, columns.
_BAR = 16
#: Width above which a trial's row also names its process, columns.
_WIDE = 80
#: Largest width of the sparkline, columns.
_SPARKS = 48
#: Number of lines other than the rows of trials and settings, with one spare line.
_OTHER_LINES = 14
_COLOURS = {"complete": "green", "pruned": "yellow", "failed": "red", "paused": "blue", "running": "cyan"}


class LiveView:
    """A renderable of rich, which is redrawn while a study runs."""

    def __init__(self, progress: StudyProgress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn = draw(self._progress.snapshot(), self._progress.disk(), options.max_width, console.height)
        # A plain console lets the terminal wrap lines, but this view has fixed lines.
        yield from console.render(drawn, options.update(no_wrap=False, overflow="ellipsis"))


def draw(snapshot: Snapshot, disk: Disk, width: int, height: int) -> Table:
    """Draw a study.

    Args:
        snapshot: snapshot of the study.
        disk: disk space that the study uses, and free space.
        width: width of the screen, columns.
        height: height of the screen, lines. Rows of trials and settings that do not fit are left out.
    """
    body = max(20, width - _LABEL)
    view = Table.grid(padding=0)
    view.add_column(width=_LABEL, no_wrap=True, style="bold")
    view.add_column(width=body, no_wrap=True, overflow="ellipsis")
    view.add_row()
    view.add_row("trials", _trials(snapshot, body))
    view.add_row("", _counts(snapshot.summary))
    view.add_row("time", _time(snapshot))
    sizes = {"used": disk.used, "free": disk.free}
    known = [f"{byte_size(size)} {what}" for what, size in sizes.items() if size is not None]
    view.add_row("disk", _text(", ".join(known) or "unknown"))
    _add_best(view, snapshot.summary, body, height)
    _add_work(view, snapshot, body, height)
    return view


def _text(*parts: str | tuple[str, str]) -> Text:
    """Join parts, each a text, or a text with its style."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        words, style = (part, "") if isinstance(part, str) else part
        text.append(escape(words), style)
    return text


def _trials(snapshot: Snapshot, width: int) -> Text:
    """Draw the numbers of trials by status, as parts of a bar."""
    planned = max(1, snapshot.summary.trials_planned, sum(snapshot.summary.trials.values()))
    label = f"  {snapshot.ended} of {snapshot.summary.trials_planned} ended"
    cells = max(8, width - len(label) - 1)
    text, so_far, drawn = Text(), 0, 0
    for status, colour in _COLOURS.items():
        so_far += snapshot.summary.trials[status]
        until = round(cells * so_far / planned)
        text.append(("━" if status in ENDED else "╍") * (until - drawn), colour)
        drawn = until
    text.append("─" * (cells - drawn), "bright_black")
    return text.append(label)


def _counts(summary: Summary) -> Text:
    text = Text()
    for status, colour in _COLOURS.items():
        if summary.trials[status]:
            text.append("● ", colour).append(f"{summary.trials[status]} {status}   ")
    return text if text else Text("none has begun", "bright_black")


def _time(snapshot: Snapshot) -> Text:
    parts = [duration(snapshot.session_seconds)]
    rate = snapshot.summary.trials_per_hour
    if rate is not None:
        parts.append(f"{rate_text(rate)} trials an hour")
    if snapshot.end_in is not None:
        parts.append(f"about {duration(snapshot.end_in)} left")
    return _text("  ·  ".join(parts))


def _add_best(view: Table, summary: Summary, width: int, height: int) -> None:
    best = summary.best
    view.add_row()
    if best is None:
        view.add_row("best JS", Text("no evaluation yet", "bright_black"))
        return
    text = _text((f"{best.val_js:.4f} bits", "bold green"), f"  trial {best.trial_id}, epoch {best.epoch:g}")
    if summary.baseline_js:
        text.append_text(_text((f"   the training mean has {summary.baseline_js:.4f}", "bright_black")))
    view.add_row("best JS", text)
    points = summary.best_js_by_time
    if len(points) > 1:
        ends = f"{points[0][1]:.4f} → {points[-1][1]:.4f}"
        sparks = sparkline(points, min(_SPARKS, width - len(ends) - 3))
        view.add_row("over time", _text((sparks, "green"), "  ", (ends, "bright_black")))
    if summary.expected_gain is not None:
        view.add_row("gain", _text(gain_text(summary.expected_gain)))
    view.add_row("settings", _settings(best.settings, width, max(2, (height - _OTHER_LINES) // 2)))


def _settings(settings: Mapping[str, Any], width: int, most: int) -> Table:
    """Arrange settings in as many columns as fit, in the order of the space. Losses without weight are left out."""
    cells = [
        (name, value_text(value))
        for name, value in settings.items()
        if not (name.startswith("loss.") and value < 0.005)
    ]
    longest = max((len(name) + len(value) for name, value in cells), default=0)
    columns = max(1, min(len(cells), width // (longest + 4)))
    rows = -(-len(cells) // columns)
    grid = Table.grid(padding=(0, 3, 0, 0))
    for _ in range(columns):
        grid.add_column(no_wrap=True, overflow="ellipsis")
    parts = [_columned(cells[start : start + rows]) for start in range(0, len(cells), rows)]
    for row in range(min(rows, most)):
        grid.add_row(*(part[row] for part in parts if row < len(part)))
    return grid


def _columned(cells: Sequence[tuple[str, str]]) -> list[Text]:
    """Align the names and values of one column."""
    longest = max(len(name) for name, _ in cells)
    return [_text((f"{name:<{longest}} ", "bright_black"), value) for name, value in cells]


def _add_work(view: Table, snapshot: Snapshot, width: int, height: int) -> None:
    if not snapshot.at_work:
        return
    view.add_row()
    most = max(2, (height - _OTHER_LINES) // 2)
    # Show all rows, or one less than fit and a count of the others.
    work = snapshot.at_work if len(snapshot.at_work) <= most else snapshot.at_work[: most - 1]
    hosts = {trial.worker.rpartition(":")[0] for trial in work if trial.worker}
    for number, trial in enumerate(work):
        row = _row(trial, snapshot, width, one_host=len(hosts) <= 1)
        view.add_row("at work" if number == 0 else "", row)
    if len(work) < len(snapshot.at_work):
        view.add_row("", _text((f"and {len(snapshot.at_work) - len(work)} more", "bright_black")))


def _row(trial: TrialAtWork, snapshot: Snapshot, width: int, *, one_host: bool) -> Text:
    """Write the row of a running trial. Its last parts are cut off on a narrow screen."""
    backbone = (f"  {trial.proposal.settings.get('model.backbone', '')}", "bright_black")
    if trial.report is None:
        waits = f"  no evaluation yet, {duration(snapshot.session_seconds - trial.since)}"
        return _text((trial.proposal.trial_id, "cyan"), " ", _bar(0.0), waits, backbone)
    report, epochs = trial.report, snapshot.epochs
    host, _, pid = trial.worker.rpartition(":")
    where = f"process {pid}" if one_host and pid else f"{host}, process {pid}" if pid else ""
    return _text(
        (trial.proposal.trial_id, "cyan"),
        " ",
        _bar(report["epoch"] / epochs),
        f"  {report['epoch']:>4.3g} of {epochs}",
        (f"  {report[OBJECTIVE]:.4f}", "bold"),
        f"  {report['images_per_second']:>7,.0f} img/s",
        backbone,
        *(((f"  {where}", "bright_black"),) if width > _WIDE else ()),
    )


def _bar(share: float) -> tuple[str, str]:
    full = min(_BAR, round(_BAR * share))
    return "━" * full + "─" * (_BAR - full), "cyan"
