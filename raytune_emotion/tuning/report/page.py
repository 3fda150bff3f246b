"""A study for people: `report.html`, with its plots as PNG files beside it."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from raytune_emotion.storage.atomic import whole, write_text
from raytune_emotion.tuning.policy.objective import BY_SIZE, OBJECTIVES, Objective
from raytune_emotion.tuning.report.plots import COLOURS, draw_curves, draw_progress, draw_settings
from raytune_emotion.tuning.study.confirmation import HEADINGS, standings
from raytune_emotion.tuning.study.records import TrialRecord, best_first, frontier
from raytune_emotion.tuning.study.spec import StudySpec

REPORT = "report.html"
FRONT = ("trial", "backbone", "parameters, millions", "trained, images/s", "JS, bits")
_ROWS = 20


def write_report(folder: Path, spec: StudySpec, records: list[TrialRecord]) -> None:
    """Draws the plots of a study and writes its page."""
    plots = {"curves": draw_curves(spec, records), "progress": draw_progress(spec, records)}
    searched = _searched(records)
    if searched:
        plots["settings"] = draw_settings(records, searched)
    for name, figure in plots.items():
        with whole(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    ranked = best_first(records)
    objective = OBJECTIVES[spec.objective] if OBJECTIVES[spec.objective].front else OBJECTIVES[BY_SIZE]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("raytune_emotion.tuning.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("page.html.j2")
    images = {name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in plots}
    rows = [[_cell(value) for value in _row(record, searched)] for record in ranked[:_ROWS]]
    counts = {status: sum(record.status == status for record in records) for status in COLOURS}
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
    best: Mapping[str, Any] = record.best or {}
    last: Mapping[str, Any] = record.reports[-1] if record.reports else {}
    metrics = [best.get("val_js"), best.get("val_kl"), best.get("val_accuracy")]
    settings = [record.settings.get(name) for name in searched]
    return [record.trial_id, record.status, last.get("epoch"), *metrics, last.get("seconds"), *settings]


def front_rows(records: list[TrialRecord], objective: Objective) -> list[list[str]]:
    """The cells of the table that stands below `FRONT`: the trials that no cheaper one has bettered, best first."""
    rows = []
    for record in frontier(records, objective):
        best: Mapping[str, Any] = record.best or {}
        values = [best.get(name) for name in ("params_millions", "images_per_second", "val_js")]
        rows.append([record.trial_id, _cell(record.settings.get("model.backbone")), *map(_cell, values)])
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
