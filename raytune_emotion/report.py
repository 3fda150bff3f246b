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
    from raytune_emotion.tuning.report.publication import publish_report
    from raytune_emotion.tuning.study.open_study import read_study
    from raytune_emotion.tuning.study.tables import CURVES, write_tables

    with read_study(place) as study:
        records = study.records()
        write_tables(study.folder, records)
        place.push(study.folder, [CURVES])
        publish_report(study, records)
    return all(record.ended for record in records)


if __name__ == "__main__":
    sys.exit(command_main("report"))
