"""Write the report of a study: `report.html`, one file that needs no network, with plots and tables beside it."""

import base64
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from raytune_emotion.errors import UserError
from raytune_emotion.learn.predictions import Predictions
from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.storage.atomic import atomic_write, write_text
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.terminal import count, shell_word
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.policy.objective import OBJECTIVES, Objective
from raytune_emotion.tuning.report.combination_gain import HEADINGS as COMBINATIONS
from raytune_emotion.tuning.report.combination_gain import TEXTS as COMBINATION_TEXTS
from raytune_emotion.tuning.report.combination_gain import MeasuredCombination, measure_combinations
from raytune_emotion.tuning.report.importance import MIN_TRIALS
from raytune_emotion.tuning.report.page_data import (
    COSTS,
    StudyData,
    as_json,
    fixed_rows,
    gather,
    searched_rows,
)
from raytune_emotion.tuning.report.plots import draw_all
from raytune_emotion.tuning.report.results import MIXTURE, Result, mixture_of, write_results
from raytune_emotion.tuning.report.summary import count_statuses, duration, gain_source
from raytune_emotion.tuning.report.winner import (
    Face,
    extreme_faces,
    js_interval,
    predict_winner,
    predictions_table,
    rivals_of,
)
from raytune_emotion.tuning.study.confirmation import (
    CONFIRMED,
    HEADINGS,
    ConfirmedConfiguration,
    rank_confirmed,
)
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.records import TrialRecord, best_first, frontier, trained_settings, winner
from raytune_emotion.tuning.study.spec import SPEC, StudySpec

REPORT = "report.html"
#: Files that a report leaves out if they would show nothing. Those of an earlier report show an earlier state.
OPTIONAL = (
    *(f"{name}.csv" for name in ("classes", "predictions", "combinations")), "faces.png",
    *(f"{name}.{kind}" for name in ("calibration", "confusion", "entropy", "importance") for kind in ("csv", "png")),
)  # fmt: skip
FRONT = ("trial", "backbone", "parameters, millions", "trained, images/s", "JS, bits")
_RESULTS = ("model", "loss", "trials", "trial", "MSE", "KL", "TVD", "JS", "s/epoch")
_CLASSES = ("class", "mean target", "mean prediction", "mean absolute error", "calibration error",
            "images where it is most probable", "share of these predicted so")  # fmt: skip
_METRICS = (
    ("val_js", "JS, bits"), ("val_kl", "KL, nats"), ("val_tvd", "total variation distance (TVD)"),
    ("val_mse", "mean squared error (MSE)"), ("val_emd", "earth mover's distance (EMD)"),
    ("val_accuracy", "accuracy of the most probable class"), ("params_millions", "parameters, millions"),
    ("images_per_second", "training speed, images/s"),
)  # fmt: skip
#: Headings of the page's parts, by their anchors. The list of contents has the same headings.
_HEADINGS = {
    "search": "What was searched", "winner": "The winner", "results": "Results", "time": "Best JS against time",
    "curves": "Learning curves", "parallel": "Settings, trial by trial", "importance": "Which settings matter",
    "slices": "JS by each setting", "costs": "JS against cost", "errors": "Where the winner is right and wrong",
    "faces": "Faces", "trials": "Trials", "combine": "Combinations of trials", "failures": "Failures",
}  # fmt: skip
_AIMS = {
    "val_js": "the lowest validation JS",
    "val_js per hour": "the lowest validation JS per hour",
}


def write_report(
    folder: Path,
    spec: StudySpec,
    records: list[TrialRecord],
    *,
    gain: Gain | None = None,
    place: Location | None = None,
) -> list[str]:
    """Write the page of a study, and its plots and tables as PNG and CSV files.

    Args:
        folder: folder of the study.
        spec: spec of the study.
        records: records of its trials.
        gain: expected gain of further training; None if unknown.
        place: location of the study, for its commands; None: the folder.

    Returns:
        The trials of other configurations that may be as good as the best one, judged by the validation images.
    """
    place = place or Folder(folder)
    found = rank_confirmed(spec, records)
    leader = found[0].median if found and found[0].runs else winner(records)
    predictions, reason = predict_winner(folder, spec, leader.trial_id) if leader else (None, "")
    data = gather(spec, records, leader, predictions)
    rivals: list[str] = []
    if leader is not None and predictions is not None and spec.confirms is None:
        rivals = rivals_of(leader, records, predictions)
    combinations = measure_combinations(folder, records, place)
    for name, table in (_tables(data, predictions) | _table_of_combinations(combinations)).items():
        write_text(folder / f"{name}.csv", table)
    for name, figure in draw_all(data, predictions):
        with atomic_write(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    page = _render(folder, place, data, found, predictions, reason, combinations, gain, rivals)
    write_text(folder / REPORT, page)
    return rivals


def report_files(folder: Path) -> list[str]:
    """Return the names of the page, the plots and the tables in a study's folder."""
    return [file.name for pattern in (REPORT, "*.png", "*.csv") for file in sorted(folder.glob(pattern))]


def front_rows(records: list[TrialRecord], objective: Objective) -> list[list[str]]:
    """Return the cells of the table with the headings `FRONT`: the trials of the Pareto front, best first."""
    rows = []
    for record in frontier(records, objective):
        best: Mapping[str, Any] = record.best or {}
        values = [best.get(name) for name in ("params_millions", "images_per_second", "val_js")]
        rows.append([record.trial_id, _cell(record.settings.get("model.backbone")), *map(_cell, values)])
    return rows


def _render(
    folder: Path,
    place: Location,
    data: StudyData,
    found: Sequence[ConfirmedConfiguration],
    predictions: Predictions | None,
    reason: str,
    combinations: Sequence[MeasuredCombination],
    gain: Gain | None,
    rivals: Sequence[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raytune_emotion.tuning.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    def part(name: str) -> Markup:
        assert environment.loader is not None
        # Only files of this package may contain markup.
        return Markup(environment.loader.get_source(environment, name)[0])

    scripts = [part(name) for name in ("vendor/d3.min.js", "vendor/plot.min.js", "page.js")]
    objective = OBJECTIVES[data.spec.objective]
    columns = _columns(data)
    return environment.get_template("page.html.j2").render(
        **_winner_parts(folder, data, found, predictions),
        not_closer=reason,
        policy=_policy(scripts),
        css=part("page.css"),
        scripts=scripts,
        data=as_json(data),
        spec=data.spec,
        records=data.records,
        aim=_AIMS.get(data.spec.objective, f"the front of {data.spec.objective}"),
        gain=gain,
        gain_source=gain_source(gain) if gain is not None and gain.bits else "",
        counts={status: n for status, n in count_statuses(r.status for r in data.records).items() if n},
        duration=duration(_seconds_trained(data.records)),
        searched=searched_rows(data.space),
        fixed=fixed_rows(data.space),
        axes=data.axes,
        importances=data.importances,
        least=MIN_TRIALS,
        losses=data.losses,
        costs=COSTS,
        results=[{"trial_id": result.trial_id, "cells": _result_cells(result)} for result in data.results],
        result_headings=_RESULTS,
        class_headings=_CLASSES,
        columns=columns,
        short_columns=_short_names(columns),
        text_columns={"trial", "status", "continues", "loss", *(axis.name for axis in data.axes if axis.holds_text)},
        rows=[_row(record, data, columns) for record in best_first(data.records)],
        failures=[record for record in data.records if record.status == "failed"],
        cheaper=objective.cheaper,
        front_headings=FRONT,
        front=front_rows(list(data.records), objective) if objective.front else [],
        configurations=found,
        configuration_headings=HEADINGS,
        combinations=combinations,
        combination_headings=COMBINATIONS,
        combination_texts=COMBINATION_TEXTS,
        headings=_HEADINGS,
        contents=_contents(data, combinations),
        rivals=rivals,
        slice_columns=_columns_of_plots(len(data.axes)),
        confirm=f"raytune-emotion confirm {shell_word(str(place))}",
    )


def _seconds_trained(records: Sequence[TrialRecord]) -> float:
    """Return the seconds of training and evaluation of all trials together."""
    reports_of = {record.trial_id: record.reports for record in records}
    seconds = 0.0
    for record in records:
        # The first reports of a continuation belong to the trial that it continues.
        others = reports_of.get(record.continues or "", ())
        seconds += max((report["seconds"] for report in record.reports), default=0.0)
        seconds -= max((report["seconds"] for report in record.reports if report in others), default=0.0)
    return seconds


def _winner_parts(
    folder: Path,
    data: StudyData,
    found: Sequence[ConfirmedConfiguration],
    predictions: Predictions | None,
) -> dict[str, Any]:
    leader = data.winner
    best: Mapping[str, Any] = leader.best if leader and leader.best else {}
    confirmed = _confirmed_mean(folder, data, found)
    worst: list[Face] = []
    finest: list[Face] = []
    closer = None
    if predictions is not None and data.analysis is not None:
        finest, worst = extreme_faces(predictions)
        closer = {
            "count": len(predictions.ids),
            "total": len(predictions.split),
            "js": float(predictions.js_N.mean()),
            "classes": data.analysis.classes,
        }
    return {
        "best": leader if best else None,
        "confirmed": confirmed,
        "note": f"The median of the {len(found[0].runs)} runs of its configuration" if found and found[0].runs else "",
        "settings": trained_settings(Folder(folder), leader) if leader else {},
        "epochs_of_best": count(best.get("epoch", 0), "epoch"),
        "interval": None if predictions is None else js_interval(predictions),
        "metrics": [(name, _cell(best[key])) for key, name in _METRICS if best.get(key) is not None],
        "closer": closer,
        "worst": worst,
        "finest": finest,
    }


def _confirmed_mean(folder: Path, data: StudyData, found: Sequence[ConfirmedConfiguration]) -> dict[str, Any] | None:
    """Return the mean of the best configuration over seeds, from this confirmation or the one in a study's folder.

    Runs of other epochs than the study has now do not count.
    """
    if not found and (folder / CONFIRMED / SPEC).exists():
        # Read the record, not its table, which people may edit. A damaged confirmation is not an error of this study.
        with contextlib.suppress(UserError):
            confirmation = load(folder / CONFIRMED)
            if confirmation.spec.epochs == data.spec.epochs:
                found = rank_confirmed(confirmation.spec, confirmation.records())
    best = next((configuration for configuration in found if configuration.mean is not None), None)
    if best is None:
        return None
    settings_of = {record.trial_id: record.settings for record in data.records}
    leader = data.winner.settings if data.winner is not None else None
    return {
        "trial_id": best.trial_id,
        "mean": best.mean,
        "error": best.standard_error,
        "seeds": len(best.runs),
        "has_winner": any(settings_of.get(configuration.trial_id) == leader for configuration in found),
    }


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy that allows only these scripts, and no requests."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def _contents(data: StudyData, combinations: Sequence[MeasuredCombination]) -> list[tuple[str, str]]:
    best, axes, closer = data.winner is not None, bool(data.axes), data.analysis is not None
    there = {
        "search": True, "winner": best, "results": bool(data.results), "time": best, "curves": best,
        "parallel": best and axes, "importance": best and axes, "slices": best and axes, "costs": best,
        "errors": closer, "faces": closer, "trials": True, "combine": bool(combinations),
        "failures": any(record.status == "failed" for record in data.records),
    }  # fmt: skip
    return [(anchor, _HEADINGS[anchor]) for anchor, shown in there.items() if shown]


def _columns_of_plots(plots: int) -> int:
    """Return the number of columns that leaves the fewest empty places among these small plots."""
    return min((4, 5, 3), key=lambda columns: -plots % columns / columns)


def _columns(data: StudyData) -> list[str]:
    names = [axis.name for axis in data.axes if not axis.name.startswith("loss.")]
    loss = ["loss"] if any(axis.name.startswith("loss.") for axis in data.axes) else []
    continues = ["continues"] if any(record.continues for record in data.records) else []
    return ["trial", "status", *continues, "epochs", "JS, bits", "KL, nats", "accuracy", "seconds", *loss, *names]


def _short_names(names: Sequence[str]) -> list[str]:
    """Leave out the section of settings whose own name is unique."""
    own = [name.rpartition(".")[2] for name in names]
    return [
        short if own.count(short) == 1 and short != "name" else name for short, name in zip(own, names, strict=True)
    ]


def _row(record: TrialRecord, data: StudyData, columns: Sequence[str]) -> dict[str, Any]:
    best: Mapping[str, Any] = record.best or {}
    last: Mapping[str, Any] = record.reports[-1] if record.reports else {}
    known = {
        "trial": record.trial_id, "status": record.status, "continues": record.continues, "epochs": last.get("epoch"),
        "JS, bits": best.get("val_js"), "KL, nats": best.get("val_kl"), "accuracy": best.get("val_accuracy"),
        "seconds": last.get("seconds"), "loss": mixture_of(record),
    }  # fmt: skip
    cells = []
    for name in columns:
        value = known[name] if name in known else record.settings.get(name)
        short = isinstance(value, float) and name not in known
        cells.append((f"{value:.3g}" if short else _cell(value), "" if value is None else value))
    won = data.winner is not None and record.trial_id == data.winner.trial_id
    return {"trial_id": record.trial_id, "status": record.status, "cells": cells, "won": won}


def _result_cells(result: Result) -> list[tuple[str, Any]]:
    loss = f"{MIXTURE}: {result.weights}" if result.loss == MIXTURE else result.loss
    values = [result.model, loss, result.trials, result.trial_id, result.val_mse, result.val_kl]
    values += [result.val_tvd, result.val_js, result.seconds_per_epoch]
    return [(_cell(value), "" if value is None else value) for value in values]


def _tables(data: StudyData, predictions: Predictions | None) -> dict[str, str]:
    """Return the tables of the plots as CSV, by file name. The table of trials is written elsewhere."""
    steps = pd.DataFrame(data.steps, columns=["seconds", OBJECTIVE, "trial_id"])
    tables = {"results": write_results(data.results), "progress": steps.to_csv(index=False)}
    if data.importances:
        tables["importance"] = pd.DataFrame(data.importances).to_csv(index=False)
    if predictions is not None and data.analysis is not None:
        names = predictions.classes
        matrix = pd.DataFrame(data.analysis.confusion_KK, index=pd.Index(names, name="target"), columns=list(names))
        bins = [{"class": c.name, **vars(b)} for c in data.analysis.classes for b in c.bins]
        tables |= {
            "classes": pd.DataFrame(data.analysis.classes).drop(columns="bins").to_csv(index=False),
            "calibration": pd.DataFrame(bins).to_csv(index=False),
            "confusion": matrix.to_csv(),
            "entropy": pd.DataFrame(data.analysis.entropy).to_csv(index=False),
            "predictions": predictions_table(predictions).to_csv(index=False, float_format="%.6f"),
        }
    return tables


def _table_of_combinations(combinations: Sequence[MeasuredCombination]) -> dict[str, str]:
    """Return the gains of combinations as CSV; an empty dict if none was measured."""
    return {"combinations": pd.DataFrame(combinations).to_csv(index=False)} if combinations else {}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
