"""Draw the plots of a study."""

import math

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytune_emotion.tuning.study.records import TrialRecord, best_first
from raytune_emotion.tuning.study.spec import StudySpec

COLOURS = {"complete": "#1f6f8b", "pruned": "#c9b79c", "running": "#7fb069", "failed": "#c8553d"}


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    # Of its own, not of pyplot: nothing global, no window system.
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_curves(spec: StudySpec, records: list[TrialRecord]) -> Figure:
    figure, (axes,) = _figure(8, 4)
    ranked = best_first(records)
    for record in reversed(ranked):
        if record.reports:
            leading = record is ranked[0]
            axes.plot(
                [report["epoch"] for report in record.reports],
                [report["val_js"] for report in record.reports],
                color="#d1495b" if leading else COLOURS[record.status],
                linewidth=2.2 if leading else 1,
                marker="o" if leading or len(record.reports) == 1 else None,
                markersize=3,
                label=f"{record.trial_id}, the best" if leading else None,
            )
    _baseline(axes, spec)
    for status in sorted({record.status for record in records}):
        axes.plot([], [], color=COLOURS[status], label=status)
    axes.set(xlabel="epoch", ylabel="validation JS, bits", title="Learning curves")
    axes.legend(frameon=False)
    return figure


def draw_progress(spec: StudySpec, records: list[TrialRecord]) -> Figure:
    figure, (axes,) = _figure(8, 3.2)
    points = [(i, record.best["val_js"], record.status) for i, record in enumerate(records) if record.best]
    axes.scatter([i for i, _, _ in points], [js for _, js, _ in points], c=[COLOURS[s] for _, _, s in points], s=18)
    least, steps = math.inf, []
    for i, js, _ in points:
        least = min(least, js)
        steps.append((i, least))
    axes.step([i for i, _ in steps], [js for _, js in steps], where="post", color="#d1495b", label="best so far")
    _baseline(axes, spec)
    axes.set(xlabel="trial", ylabel="best validation JS, bits", title="The search")
    axes.legend(frameon=False)
    return figure


def draw_settings(records: list[TrialRecord], searched: list[str]) -> Figure:
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
        axes.scatter(values, scores, c=[COLOURS[record.status] for record in with_it], s=14)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7, axis="x", rotation=30 if len(numbers) < len(values) else 0)
    for axes in grid[len(searched) :]:
        axes.set_visible(False)
    figure.supylabel("best validation JS, bits", fontsize=8)
    return figure


def _baseline(axes: Axes, spec: StudySpec) -> None:
    axes.axhline(spec.baseline["js"], color="grey", linestyle=":", label="predicting the training mean")
