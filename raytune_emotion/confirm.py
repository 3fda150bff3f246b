"""Runs the best configurations of a study again, with fresh seeds, and exports the one that is best in the mean."""

import argparse
import dataclasses
import sys
from pathlib import Path

from rich.console import Console

from raytune_emotion.cli import command_main, gpu_share, positive
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.checkpoint import BEST, read_best
from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.storage import remote
from raytune_emotion.terminal import plain_console, plain_table
from raytune_emotion.tuning.execution.cluster import check_cluster, fit_to_cluster, ray_session
from raytune_emotion.tuning.report.console import run_shown, terminated_as_interrupted
from raytune_emotion.tuning.report.page import REPORT, write_report
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.confirmation import (
    CONFIRMED,
    HEADINGS,
    STANDINGS,
    Standing,
    best_configurations,
    enqueue,
    fresh_seeds,
    standings,
    write_standings,
)
from raytune_emotion.tuning.study.optuna_study import JOURNAL, create_study, load_study, sole_driver
from raytune_emotion.tuning.study.records import TrialRecord, read_records, trial_folder
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, check_stores, read_spec, write_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=remote.place, metavar="STUDY", help="the folder of a study")
    add("--top", type=positive, default=3, metavar="K", help="of the study's configurations, the best (default: 3)")
    add("--seeds", type=positive, default=5, metavar="N", help="runs of each, with a seed of its own (default: 5)")
    add("--concurrency", type=positive, metavar="N", help="runs at once (default: as in the search)")
    add("--workers-per-trial", type=positive, metavar="N", help="processes a run (default: as in the search)")
    add("--gpus-per-worker", type=gpu_share, metavar="X", help="may be a fraction (default: as in the search)")
    add("--address", metavar="ADDRESS", help="of a running Ray cluster, or auto (default: start Ray here)")


def run(args: argparse.Namespace) -> None:
    if isinstance(args.study, str):
        raise UserError(f"{remote.shown(args.study)}: a study at a URI cannot be confirmed there; copy it to a folder")
    study: Path = args.study.absolute()
    chosen, spec = _asked(args, study)
    folder, console = study / CONFIRMED, plain_console()
    folder.mkdir(exist_ok=True)
    with sole_driver(folder), ray_session(args.address), terminated_as_interrupted():
        placement = fit_to_cluster(
            workers=spec.workers_per_trial, gpus_per_worker=spec.gpus_per_worker, concurrency=spec.concurrency
        )
        spec = _begun(folder, spec, chosen, fresh_seeds(spec.seed, args.seeds))
        console.print(
            f"confirmation {folder}: {len(spec.confirms or ())} configurations, {spec.trials} runs of "
            f"{spec.epochs} epochs, {placement.concurrency} at once"
        )
        interrupted = run_shown(console, folder, spec, placement)
    _conclude(console, folder, spec, interrupted=interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _asked(args: argparse.Namespace, study: Path) -> tuple[list[TrialRecord], StudySpec]:
    """The trials to be confirmed, and how; all of it is looked at before Ray is started."""
    searched = read_spec(study)
    if searched.confirms is not None:
        raise UserError(f"{study}: is a confirmation itself; name the study that it lies in")
    check_cluster(args.address)
    resume = f"python -m raytune_emotion.search --resume --results {study.parent} --name {study.name} --data DIR"
    check_stores(searched, f"tell where they are by `{resume}`")
    chosen = best_configurations(read_records(study, load_study(study)), args.top)
    if not chosen:
        raise UserError(f"{study}: no trial of this study has reported yet")
    folder = study / CONFIRMED
    before = read_spec(folder) if (folder / SPEC).exists() else None
    if before is not None and before.epochs != searched.epochs:
        raise UserError(
            f"{folder}: its runs are of {before.epochs} epochs, and trials of the study now of {searched.epochs}; move "
            f"it away to confirm the study anew"
        )
    confirms = {record.trial_id: record.best["val_js"] for record in chosen if record.best}
    given = {name: getattr(args, name) for name in ("concurrency", "workers_per_trial", "gpus_per_worker")}
    return chosen, dataclasses.replace(
        searched,
        name=f"{searched.name}, confirmed",
        space={key: value for key, value in searched.space.items() if key != "start"},
        confirms={**(before.confirms or {} if before else {}), **confirms},
        **{name: value for name, value in given.items() if value is not None},
    )


def _begun(folder: Path, spec: StudySpec, chosen: list[TrialRecord], seeds: list[int]) -> StudySpec:
    """Begins a confirmation, or goes on with it: what it has stays, what it lacks is added."""
    if not (folder / SPEC).exists():
        (folder / JOURNAL).unlink(missing_ok=True)  # of a beginning that was cut short
        create_study(folder, parse_space(spec.space, SPEC))
    study = load_study(folder)
    enqueue(study, chosen, seeds)
    spec = dataclasses.replace(spec, trials=len(study.get_trials(deepcopy=False)))
    write_spec(folder, spec)
    return spec


def _conclude(console: Console, folder: Path, spec: StudySpec, *, interrupted: bool) -> None:
    """Says how the configurations stand, and exports the winner once all is done."""
    records = read_records(folder, load_study(folder))
    found = standings(spec, records)
    write_standings(folder, found)
    write_report(folder, spec, records)
    table = plain_table(*HEADINGS)
    for standing in found:
        table.add_row(*standing.cells)
    console.print(table)
    if interrupted:
        console.print(f"the same command goes on: python -m raytune_emotion.confirm {folder.parent}")
        return
    winner = found[0]
    if not winner.runs:
        raise Breakdown(f"{folder}: no run has come to its end; why is in the last column of {folder / 'trials.csv'}")
    _export(folder, winner, len(found))
    console.print(
        f"""best mean   {winner.in_words}, trial {winner.trial_id} of the search
exported    {folder / "best"}, the run in the middle ({winner.median.trial_id})
table       {folder / STANDINGS}
page        {folder / REPORT}"""
    )


def _export(folder: Path, winner: Standing, configurations: int) -> None:
    """Exports the run of the winner that is in the middle, lest the luck of a seed be exported."""
    run = winner.median
    best = read_best(trial_folder(folder, run.trial_id) / BEST)
    confirmed = {
        "confirmed_mean_js": winner.mean,
        "confirmed_standard_error": winner.standard_error,
        "confirmed_seeds": len(winner.runs),
    }
    notes = [
        f"The configuration of trial {winner.trial_id} of the study {folder.parent.name}, the best of {configurations} "
        f"with fresh seeds: JS {winner.in_words}.",
        f"These weights are of the run in the middle, trial {run.trial_id} of the confirmation.",
    ]
    write_package(folder / "best", dataclasses.replace(best, report={**best.report, **confirmed}), notes)


if __name__ == "__main__":
    sys.exit(command_main("confirm"))
