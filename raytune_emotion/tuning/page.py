"""A study for people: `report.html`, with its plots as PNG files beside it."""

import base64
import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytune_emotion.storage.atomic import whole, write_text
from raytune_emotion.tuning.confirmation import HEADINGS, standings
from raytune_emotion.tuning.objective import BY_SIZE, OBJECTIVES, Objective
from raytune_emotion.tuning.study import StudySpec, TrialRecord, best_first, frontier

REPORT = "report.html"
FRONT = ("trial", "backbone", "parameters, millions", "trained, images/s", "JS, bits")
_COLOURS = {"complete": "#1f6f8b", "pruned": "#c9b79c", "running": "#7fb069", "failed": "#c8553d"}
_ROWS = 20


def write_report(folder: Path, spec: StudySpec, records: list[TrialRecord]) -> None:
    """Draws the plots of a study and writes its page."""
    plots = {"curves": _curves(spec, records), "progress": _progress(spec, records)}
    searched = _searched(records)
    if searched:
        plots["settings"] = _settings(records, searched)
    for name, figure in plots.items():
        with whole(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    ranked = best_first(records)
    objective = OBJECTIVES[spec.objective] if OBJECTIVES[spec.objective].front else OBJECTIVES[BY_SIZE]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("raytune_emotion.tuning", "."), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("page.html.j2")
    images = {name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in plots}
    rows = [[_cell(value) for value in _row(record, searched)] for record in ranked[:_ROWS]]
    counts = {status: sum(record.status == status for record in records) for status in _COLOURS}
    text = template.render(
        spec=spec,
        best=ranked[0] if ranked and ranked[0].best else None,
        counts={status: n for status, n in counts.items() if n},
        hours=sum(record.reports[-1]["seconds"] for record in records if record.reports) / 3600,
        columns=["trial", "status", "epochs", "JS, bits", "KL, nats", "accuracy", "seconds", *searched],
        rows=rows,
        left_out=max(0, len(ranked) - _ROWS),
        cheaper=objective.cheaper,
        front_headings=FRONT,
        front=front_rows(records, objective),
        images=images,
        headings=HEADINGS,
        standings=standings(spec, records),
    )
    write_text(folder / REPORT, text)


def _searched(records: list[TrialRecord]) -> list[str]:
    """The settings in which the trials differ."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    return [name for name in names if len({repr(record.settings.get(name)) for record in records}) > 1]


def _row(record: TrialRecord, searched: list[str]) -> list[Any]:
    best = record.best or {}
    last = record.reports[-1] if record.reports else {}
    metrics = [best.get("val_js"), best.get("val_kl"), best.get("val_accuracy")]
    settings = [record.settings.get(name) for name in searched]
    return [record.trial_id, record.status, last.get("epoch"), *metrics, last.get("seconds"), *settings]


def front_rows(records: list[TrialRecord], objective: Objective) -> list[list[str]]:
    """The cells of the table that stands below `FRONT`: the trials that no cheaper one has bettered, best first."""
    rows = []
    for record in frontier(records, objective):
        best = record.best or {}
        values = [best.get(name) for name in ("params_millions", "images_per_second", "val_js")]
        rows.append([record.trial_id, _cell(record.settings.get("model.backbone")), *map(_cell, values)])
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    # Of its own, not of pyplot: nothing global, no window system.
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _curves(spec: StudySpec, records: list[TrialRecord]) -> Figure:
    figure, (axes,) = _figure(8, 4)
    ranked = best_first(records)
    for record in reversed(ranked):
        if record.reports:
            leading = record is ranked[0]
            axes.plot(
                [report["epoch"] for report in record.reports],
                [report["val_js"] for report in record.reports],
                color="#d1495b" if leading else _COLOURS[record.status],
                linewidth=2.2 if leading else 1,
                marker="o" if leading or len(record.reports) == 1 else None,
                markersize=3,
                label=f"{record.trial_id}, the best" if leading else None,
            )
    _baseline(axes, spec)
    for status in sorted({record.status for record in records}):
        axes.plot([], [], color=_COLOURS[status], label=status)
    axes.set(xlabel="epoch", ylabel="validation JS, bits", title="Learning curves")
    axes.legend(frameon=False)
    return figure


def _progress(spec: StudySpec, records: list[TrialRecord]) -> Figure:
    figure, (axes,) = _figure(8, 3.2)
    points = [(i, record.best["val_js"], record.status) for i, record in enumerate(records) if record.best]
    axes.scatter([i for i, _, _ in points], [js for _, js, _ in points], c=[_COLOURS[s] for _, _, s in points], s=18)
    least, steps = math.inf, []
    for i, js, _ in points:
        least = min(least, js)
        steps.append((i, least))
    axes.step([i for i, _ in steps], [js for _, js in steps], where="post", color="#d1495b", label="best so far")
    _baseline(axes, spec)
    axes.set(xlabel="trial", ylabel="best validation JS, bits", title="The search")
    axes.legend(frameon=False)
    return figure


def _settings(records: list[TrialRecord], searched: list[str]) -> Figure:
    columns = min(4, len(searched))
    rows = math.ceil(len(searched) / columns)
    figure, grid = _figure(2.6 * columns, 2.2 * rows, columns, rows)
    seen = [record for record in records if record.best]
    for axes, name in zip(grid, searched, strict=False):
        with_it = [record for record in seen if name in record.settings]
        values = [record.settings[name] for record in with_it]
        # Words and truths are categories to matplotlib; numbers that span orders of magnitude want a log axis.
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < len(values):
            values = [str(value) for value in values]
        elif numbers and min(numbers) > 0 and max(numbers) > 30 * min(numbers):
            axes.set_xscale("log")
        scores = [record.best["val_js"] for record in with_it if record.best]
        axes.scatter(values, scores, c=[_COLOURS[record.status] for record in with_it], s=14)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7, axis="x", rotation=30 if len(numbers) < len(values) else 0)
    for axes in grid[len(searched) :]:
        axes.set_visible(False)
    figure.supylabel("best validation JS, bits", fontsize=8)
    return figure


def _baseline(axes: Axes, spec: StudySpec) -> None:
    axes.axhline(spec.baseline["js"], color="grey", linestyle=":", label="predicting the training mean")
