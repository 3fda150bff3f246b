"""Draw the plots of a study as PNG files, for papers and slides."""

import math
from collections.abc import Iterator, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raytune_emotion.learn.figures import make_figure
from raytune_emotion.learn.predictions import Predictions
from raytune_emotion.tuning.report.axes import Axis
from raytune_emotion.tuning.report.page_data import COSTS, StudyData, began_at, costs_of
from raytune_emotion.tuning.report.results import loss_weights
from raytune_emotion.tuning.report.winner import extreme_rows
from raytune_emotion.tuning.study.records import TrialRecord, best_first

COLOURS = {
    "complete": "#1f7a8c", "pruned": "#b08d57", "running": "#5c940d", "paused": "#7048e8", "failed": "#c92a2a",
}  # fmt: skip
_WINNER = "#d6336c"
_JS = "validation JS, bits"
#: Style of the box behind text that is drawn over lines.
_BEHIND_TEXT = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}


def draw_all(data: StudyData, predictions: Predictions | None) -> Iterator[tuple[str, Figure]]:
    """Draw each plot that has data, and yield it with the name of its file."""
    yield "curves", draw_curves(data)
    yield "progress", draw_progress(data)
    if data.axes:
        yield "settings", draw_settings(data)
        yield "parallel", draw_parallel(data)
    if data.importances:
        yield "importance", draw_importance(data)
    if data.losses:
        yield "simplex", draw_simplex(data)
    if data.winner:
        yield "cost", draw_cost(data)
    if data.analysis and predictions:
        yield "calibration", draw_calibration(data)
        yield "confusion", draw_confusion(data)
        yield "entropy", draw_entropy(data)
        yield "faces", draw_faces(predictions)


def draw_curves(data: StudyData) -> Figure:
    figure, (axes,) = make_figure(8, 4)
    for record in reversed(best_first(data.records)):
        if record.reports:
            leading = record is data.winner
            axes.plot(
                [report["epoch"] for report in record.reports],
                [report["val_js"] for report in record.reports],
                color=_colour(data, record),
                linewidth=2.2 if leading else 1,
                marker="o" if leading or len(record.reports) == 1 else None,
                markersize=3,
                label=f"{record.trial_id}, the best" if leading else None,
            )
            stop = record.reports[-1]
            axes.plot(stop["epoch"], stop["val_js"], "x" if record.status == "pruned" else ".", c=_colour(data, record))
    _baseline(axes, data)
    _legend(axes, data)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epochs", ylabel=_JS, title="Learning curves")
    return figure


def draw_progress(data: StudyData) -> Figure:
    figure, (axes,) = make_figure(8, 3.2)
    begin = began_at(data.records)
    shown = [((r.best["time"] - begin) / 60, r) for r in data.records if r.best]
    axes.scatter([t for t, _ in shown], [_js(r) for _, r in shown], c=[_colour(data, r) for _, r in shown], s=18)
    minutes = [t / 60 for t, _, _ in data.steps]
    axes.step(minutes, [js for _, js, _ in data.steps], where="post", color=_WINNER, label="best so far")
    _baseline(axes, data)
    _legend(axes, data)
    axes.set(xlabel="minutes since the first trial began", ylabel=_JS, title="Best JS against time")
    return figure


def draw_settings(data: StudyData) -> Figure:
    columns = min(4, len(data.axes))
    rows = math.ceil(len(data.axes) / columns)
    figure, grid = make_figure(2.8 * columns, 2.3 * rows, columns, rows)
    for axes, axis in zip(grid, data.axes, strict=False):
        points = [(axis.position(r.settings.get(axis.name)), r) for r in data.records if r.best]
        there = [(place, record) for place, record in points if place is not None]
        # Choices are drawn at whole numbers, in the order of the space.
        x = [axis.choices.index(p) if isinstance(p, str) else p for p, _ in there]
        axes.scatter(x, [_js(record) for _, record in there], c=[_colour(data, r) for _, r in there], s=14)
        _set_scale(axes, axis)
        axes.set_title(axis.name, fontsize=8)
    for axes in grid[len(data.axes) :]:
        axes.set_visible(False)
    figure.supylabel(_JS, fontsize=8)
    return figure


def draw_parallel(data: StudyData) -> Figure:
    figure, (axes,) = make_figure(max(6.0, 1.15 * len(data.axes) + 2), 4)
    scored = list(reversed(best_first(record for record in data.records if record.best)))
    for rank, record in enumerate(scored):
        points = [(i, _share(axis, record)) for i, axis in enumerate(data.axes)]
        there = [(i, y) for i, y in points if y is not None]
        shade = mpl.colormaps["viridis_r"](1 - rank / max(1, len(scored) - 1))
        won = record is data.winner
        axes.plot(*zip(*there, strict=True), color=_WINNER if won else shade, linewidth=2.4 if won else 0.9, alpha=0.8)
    for i, axis in enumerate(data.axes):
        axes.axvline(i, color="black", linewidth=0.5)
        ends = axis.choices if axis.kind == "choice" else (f"{axis.low:g}", f"{axis.high:g}")
        for j, text in enumerate(ends):
            y = (j + 0.5) / len(ends) if axis.kind == "choice" else j
            axes.text(i, y, f" {text}", fontsize=6, va="center", in_layout=False, bbox=_BEHIND_TEXT)
    axes.set_xticks(range(len(data.axes)), [axis.name for axis in data.axes], rotation=30, ha="right", fontsize=7)
    axes.set_xlim(-0.3, len(data.axes) - 0.3)
    axes.set_yticks([])
    axes.set_title("Settings of all trials; dark is a high JS, the winner is red")
    return figure


def draw_importance(data: StudyData) -> Figure:
    figure, (axes,) = make_figure(6, 0.8 + 0.3 * len(data.importances))
    found = list(reversed(data.importances))
    means = [importance.mean for importance in found]
    spans = [[max(0.0, i.mean - i.low) for i in found], [max(0.0, i.high - i.mean) for i in found]]
    axes.barh([i.name for i in found], means, xerr=spans, color=COLOURS["complete"], ecolor="black", capsize=2)
    axes.scatter([i.chance for i in found], [i.name for i in found], marker="d", color=_WINNER, s=16, zorder=3)
    axes.set(
        xlabel="share in the variation that all settings explain (PED-ANOVA); diamond: by chance",
        title="Which settings matter",
    )
    return figure


def draw_simplex(data: StudyData) -> Figure:
    figure, (axes,) = make_figure(5, 5)
    angles = [2 * math.pi * i / len(data.losses) + math.pi / 2 for i in range(len(data.losses))]
    corners = {name: (math.cos(a), math.sin(a)) for name, a in zip(data.losses, angles, strict=True)}
    outline = [*corners.values(), next(iter(corners.values()))]
    axes.plot(*zip(*outline, strict=True), color="grey", linewidth=0.8)
    scored = [record for record in data.records if record.best]
    mixtures = [loss_weights(record).items() for record in scored]
    x, y = ([sum(w * corners[name][k] for name, w in mixture) for mixture in mixtures] for k in (0, 1))
    points = axes.scatter(x, y, c=[_js(record) for record in scored], cmap="viridis_r", s=22)
    for name, corner in corners.items():
        axes.text(1.1 * corner[0], 1.1 * corner[1], name, ha="center", va="center")
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.colorbar(points, label=_JS, shrink=0.6)
    return figure


def draw_cost(data: StudyData) -> Figure:
    figure, grid = make_figure(10, 3.2, len(COSTS))
    for axes, (key, name, _) in zip(grid, COSTS, strict=True):
        shown = [(cost, r) for r in data.records if r.best and (cost := costs_of(r)[key]) is not None]
        axes.scatter(
            [cost for cost, _ in shown], [_js(r) for _, r in shown], c=[_colour(data, r) for _, r in shown], s=16
        )
        front = sorted((cost, _js(r)) for cost, r in shown if r.trial_id in data.fronts[key])
        axes.plot([cost for cost, _ in front], [js for _, js in front], color=_WINNER, linewidth=1)
        axes.set(xlabel=name)
    grid[0].set_ylabel(_JS)
    return figure


def draw_calibration(data: StudyData) -> Figure:
    assert data.analysis is not None
    columns = 5
    figure, grid = make_figure(10, 2 * math.ceil(len(data.analysis.classes) / columns), columns, math.ceil(
        len(data.analysis.classes) / columns))  # fmt: skip
    for axes, found in zip(grid, data.analysis.classes, strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
        x, y, error = ([getattr(b, name) for b in found.bins] for name in ("x", "y", "error"))
        axes.errorbar(x, y, error, color=COLOURS["complete"], marker="o", markersize=3)
        top = max(0.2, *x, *y) * 1.05
        axes.set(xlim=(0, top), ylim=(0, top))
        axes.set_title(found.name, fontsize=8)
    for axes in grid[len(data.analysis.classes) :]:
        axes.set_visible(False)
    figure.supxlabel("predicted probability", fontsize=8)
    figure.supylabel("mean target", fontsize=8)
    return figure


def draw_confusion(data: StudyData) -> Figure:
    assert data.analysis is not None
    figure, (axes,) = make_figure(6, 6)
    counts_KK = np.array(data.analysis.confusion_KK)
    names = [found.name for found in data.analysis.classes]
    axes.imshow(counts_KK / np.maximum(1, counts_KK.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts_KK):
        if n:
            axes.text(j, i, str(n), ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="most probable class of the prediction", ylabel="most probable class of the target")
    axes.set_title("Counts of images; the darker, the larger the share of its row", fontsize=9)
    return figure


def draw_entropy(data: StudyData) -> Figure:
    assert data.analysis is not None
    figure, (axes,) = make_figure(6, 3.2)
    x, y, error = ([getattr(b, name) for b in data.analysis.entropy] for name in ("x", "y", "error"))
    axes.errorbar(x, y, error, color=COLOURS["complete"], marker="o", capsize=2)
    axes.set(xlabel="entropy of the target, bits", ylabel="mean JS, bits", ylim=(0, None))
    return figure


def draw_faces(predictions: Predictions) -> Figure:
    best, worst = extreme_rows(predictions)
    figure, grid = make_figure(1.9 * max(1, len(best)), 7.2, max(1, len(best)), 4)
    for row, chosen in enumerate((worst, best)):
        for column, i in enumerate(chosen):
            picture, bars = grid[2 * row * len(best) + column], grid[(2 * row + 1) * len(best) + column]
            picture.imshow(predictions.split.gather(predictions.rows_N[i : i + 1])[0])
            picture.set_title(f"{predictions.ids[i][:16]}\nJS {predictions.js_N[i]:.3f}", fontsize=7)
            picture.set_axis_off()
            places = np.arange(len(predictions.classes))
            bars.barh(places - 0.2, predictions.true_NK[i], 0.4, color="black", label="target")
            bars.barh(places + 0.2, predictions.predicted_NK[i], 0.4, color=COLOURS["complete"], label="prediction")
            bars.set_yticks(places, predictions.classes if column == 0 else [""] * len(places), fontsize=6)
            bars.invert_yaxis()
            bars.tick_params(axis="x", labelsize=6)
    figure.suptitle("Worst predictions, and below the best ones: target (black) and prediction", fontsize=9)
    return figure


def _set_scale(axes: Axes, axis: Axis) -> None:
    axes.tick_params(labelsize=7)
    if axis.kind == "choice":
        long = sum(map(len, axis.choices)) > 20
        texts = [choice if len(choice) < 19 else f"{choice[:18]}…" for choice in axis.choices]
        axes.set_xticks(range(len(texts)), texts, rotation=25 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.6, len(texts) - 0.4)
        return
    axes.set_xscale(axis.kind)
    margin = 0.03 * (axis.high - axis.low)
    axes.set_xlim(
        *((axis.low / 1.1, axis.high * 1.1) if axis.kind == "log" else (axis.low - margin, axis.high + margin))
    )
    if axis.kind == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return
    decades = math.log10(axis.high / axis.low)
    ticks = [step * 10.0**power for power in range(-12, 13) for step in ((1,) if decades > 2 else (1, 2, 5))]
    inside = [tick for tick in ticks if axis.low * 0.999 <= tick <= axis.high * 1.001] or [axis.low, axis.high]
    shown = inside[:: math.ceil(len(inside) / 4)]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()


def _share(axis: Axis, record: TrialRecord) -> float | None:
    place = axis.position(record.settings.get(axis.name))
    if place is None:
        return None
    if isinstance(place, str):
        return (axis.choices.index(place) + 0.5) / len(axis.choices)
    scale = math.log if axis.kind == "log" else float
    return (scale(place) - scale(axis.low)) / (scale(axis.high) - scale(axis.low))


def _js(record: TrialRecord) -> float:
    return record.best["val_js"] if record.best else math.nan


def _colour(data: StudyData, record: TrialRecord) -> str:
    return _WINNER if record is data.winner else COLOURS[record.status]


def _baseline(axes: Axes, data: StudyData) -> None:
    axes.axhline(data.spec.baseline["js"], color="grey", linestyle=":", label="predicting the training mean")


def _legend(axes: Axes, data: StudyData) -> None:
    statuses: Sequence[str] = sorted({record.status for record in data.records})
    for status in statuses:
        axes.plot([], [], color=COLOURS[status], label=status)
    axes.legend(frameon=False, fontsize=7)
