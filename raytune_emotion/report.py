"""Rebuild the tables and the report of a study, also while it runs: the command."""

import argparse
import sys

from raytune_emotion.cli import command_main, location
from raytune_emotion.terminal import say
from raytune_emotion.tuning.study.spec import spec_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=location, metavar="STUDY", help="folder or URI of a study")


def run(args: argparse.Namespace) -> None:
    spec_of(args.study)  # whether it is a study shows at once
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.report.page import REPORT, report_files, write_report
    from raytune_emotion.tuning.study.combination import pull_for_report
    from raytune_emotion.tuning.study.confirmation import rank_confirmed, write_confirmed
    from raytune_emotion.tuning.study.open_study import read_study
    from raytune_emotion.tuning.study.optuna_study import expected_gain
    from raytune_emotion.tuning.study.tables import CURVES, write_tables

    with read_study(args.study) as study:
        folder, spec, records = study.folder, study.spec, study.records()
        write_tables(folder, records)
        pull_for_report(args.study, folder, records)
        write_report(folder, spec, records, gain=expected_gain(study.optuna), place=args.study)
        if spec.confirms is not None:
            write_confirmed(folder, rank_confirmed(spec, records))
        args.study.push(folder, [CURVES, *report_files(folder)])
    say(str(args.study / REPORT))


if __name__ == "__main__":
    sys.exit(command_main("report"))
