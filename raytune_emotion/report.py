"""Rebuilds the tables, the plots and the page of a study, also while it runs."""

import argparse
import sys
from pathlib import Path

from raytune_emotion.__main__ import command_main
from raytune_emotion.tuning.page import REPORT, write_report
from raytune_emotion.tuning.searcher import load_study
from raytune_emotion.tuning.study import read_records, read_spec, write_tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY", help="the folder of a study")


def run(args: argparse.Namespace) -> None:
    spec = read_spec(args.study)
    records = read_records(args.study, load_study(args.study))
    write_tables(args.study, records)
    write_report(args.study, spec, records)
    print(args.study / REPORT)


if __name__ == "__main__":
    sys.exit(command_main("report"))
