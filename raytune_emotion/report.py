"""Rebuild the tables and the report of a study, also while it runs: the command."""

import argparse
import sys

from raytune_emotion.cli import command_main, location
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import say
from raytune_emotion.tuning.study.spec import spec_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=location, metavar="STUDY", help="folder or URI of a study")


def run(args: argparse.Namespace) -> None:
    spec_of(args.study)  # whether it is a study shows at once
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.report.page import REPORT
    from raytune_emotion.tuning.study.open_study import read_study
    from raytune_emotion.tuning.study.optuna_study import ENDED, list_trials

    while not _write_files(args.study):
        with read_study(args.study) as study:
            if not all(trial.status in ENDED for trial in list_trials(study.optuna)):
                break
        # The study has ended meanwhile: its last files may have been replaced by older ones.
    say(str(args.study / REPORT))


def _write_files(place: Location) -> bool:
    """Write the tables and the report of a study, and return whether all of its trials had ended before."""
    from raytune_emotion.tuning.report.page import report_files, write_report
    from raytune_emotion.tuning.study.combination import pull_for_report
    from raytune_emotion.tuning.study.confirmation import rank_confirmed, write_confirmed
    from raytune_emotion.tuning.study.open_study import read_study
    from raytune_emotion.tuning.study.optuna_study import expected_gain
    from raytune_emotion.tuning.study.tables import CURVES, write_tables

    with read_study(place) as study:
        folder, spec, records = study.folder, study.spec, study.records()
        write_tables(folder, records)
        pull_for_report(place, folder, records)
        write_report(folder, spec, records, gain=expected_gain(study.optuna), place=place)
        if spec.confirms is not None:
            write_confirmed(folder, rank_confirmed(spec, records))
        place.push(folder, [CURVES, *report_files(folder)])
    return all(record.ended for record in records)


if __name__ == "__main__":
    sys.exit(command_main("report"))
