"""Runs the best configurations of a study again, with fresh seeds, and exports the one that is best in the mean."""

import argparse
import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import cast

from rich.console import Console

from raytune_emotion.cli import command_main, gpu_share, location, positive
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.interruption import finishing
from raytune_emotion.learn.checkpoint import BEST, read_best
from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.learn.report import Report
from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.terminal import plain_console, plain_table
from raytune_emotion.tuning.execution.cluster import check_cluster, ray_session
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
from raytune_emotion.tuning.execution.placement import fit_to_cluster
from raytune_emotion.tuning.report.console import run_shown
from raytune_emotion.tuning.report.page import REPORT, write_report
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
from raytune_emotion.tuning.study.open_study import OpenStudy, load, make_study, open_study
from raytune_emotion.tuning.study.optuna_study import sole_driver
from raytune_emotion.tuning.study.records import TrialRecord, trial_folder
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, check_stores, read_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=location, metavar="STUDY", help="folder of a study")
    add(
        "--top", type=positive, default=3, metavar="K", help="number of best configurations to train again (default: 3)"
    )
    add(
        "--seeds",
        type=positive,
        default=5,
        metavar="N",
        help="runs per configuration, each with a new seed (default: 5)",
    )
    add("--concurrency", type=positive, metavar="N", help="runs at the same time (default: as in the search)")
    add(
        "--workers-per-trial",
        type=positive,
        metavar="N",
        help="processes that train one run together (default: as in the search)",
    )
    add(
        "--gpus-per-worker",
        type=gpu_share,
        metavar="X",
        help="GPUs per worker, 1 or a fraction (default: as in the search)",
    )
    add(
        "--address",
        metavar="ADDRESS",
        help="address of a running Ray cluster, or auto (default: start Ray on this machine)",
    )


def run(args: argparse.Namespace) -> None:
    study: Path = args.study.require_folder("copy the study to a folder, and confirm it there").absolute()
    chosen, spec = _asked(args, study)
    folder, console = study / CONFIRMED, plain_console()
    # Until all is written, the confirmation's folder is this process's alone.
    with contextlib.ExitStack() as held:
        if not (folder / SPEC).exists():
            if folder.exists():
                _remove_lock_alone(folder)
            make_study(folder, spec)
        confirmation = held.enter_context(open_study(folder))
        ended = None
        try:
            with ray_session(args.address) as cluster:
                placement = fit_to_cluster(
                    workers=spec.workers_per_trial, gpus_per_worker=spec.gpus_per_worker, concurrency=spec.concurrency
                )
                confirmation = _with_runs(confirmation, spec, chosen, fresh_seeds(spec.seed, args.seeds))
                console.print(
                    f"confirmation {folder}: {len(spec.confirms or ())} configurations, {confirmation.spec.trials} runs"
                    f" of {spec.epochs} epochs, {placement}"
                )
                run_shown(console, confirmation, placement, failure=cluster.failure)
        except (KeyboardInterrupt, ClusterLost) as why:
            ended = why
        with finishing():
            _conclude(console, confirmation, whole=ended is None)
        if ended is not None:
            raise ended


def _remove_lock_alone(folder: Path) -> None:
    """Remove a folder in which nothing but a lock is left, so that a confirmation can be made there.

    Raises:
        UserError: there is more in it, or another process is at work in it.
    """
    with sole_driver(folder):
        if others := sorted({path.name for path in folder.iterdir()} - {LOCK}):
            raise UserError(f"{folder}: holds {', '.join(others[:5])} and is no confirmation; move that away")
        shutil.rmtree(folder)


def _asked(args: argparse.Namespace, study: Path) -> tuple[list[TrialRecord], StudySpec]:
    """Return the trials to be confirmed, and how; all of it is looked at before Ray is started."""
    searched = read_spec(study)
    if searched.confirms is not None:
        raise UserError(f"{study}: is a confirmation itself; name the study that it lies in")
    check_cluster(args.address)
    resume = f"python -m raytune_emotion.search --resume --results {study.parent} --name {study.name} --data DIR"
    check_stores(searched, f"tell where they are by `{resume}`")
    chosen = best_configurations(load(study).records(), args.top)
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


def _with_runs(study: OpenStudy, spec: StudySpec, chosen: list[TrialRecord], seeds: list[int]) -> OpenStudy:
    """Enqueue the runs that a confirmation lacks; those that it has stay."""
    enqueue(study.optuna, chosen, seeds)
    return study.with_spec(dataclasses.replace(spec, trials=len(study.optuna.get_trials(deepcopy=False))))


def _conclude(console: Console, study: OpenStudy, *, whole: bool) -> None:
    """Say how the configurations stand, and export the winner once all is done."""
    folder, spec, records = study.folder, study.spec, study.records()
    found = standings(spec, records)
    write_standings(folder, found)
    write_report(folder, spec, records)
    table = plain_table(*HEADINGS)
    for standing in found:
        table.add_row(*standing.cells)
    console.print(table)
    if not whole:
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
    report = cast("Report", {**best.report, **confirmed})
    write_package(folder / "best", dataclasses.replace(best, report=report), notes)


if __name__ == "__main__":
    sys.exit(command_main("confirm"))
