"""Run the best configurations of a study again with new seeds, and export the one with the best mean."""

import argparse
import sys

from raytune_emotion.cli import add_address_option, command_main, gpu_share, location, positive_integer
from raytune_emotion.tuning.session.run_confirmation import run_confirmation
from raytune_emotion.tuning.study.request import ConfirmRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=location, metavar="STUDY", help="folder or URI of a study")
    add(
        "--top",
        type=positive_integer,
        default=3,
        metavar="K",
        help="number of best configurations to train again (default: 3)",
    )
    add(
        "--seeds",
        type=positive_integer,
        default=5,
        metavar="N",
        help="runs per configuration, each with a new seed (default: 5)",
    )
    add("--concurrency", type=positive_integer, metavar="N", help="runs at the same time (default: as in the search)")
    add(
        "--workers-per-trial",
        type=positive_integer,
        metavar="N",
        help="processes that train one run together (default: as in the search)",
    )
    add(
        "--gpus-per-worker",
        type=gpu_share,
        metavar="X",
        help="GPUs per worker: 0, a fraction or 1 (default: as in the search)",
    )
    add_address_option(parser)


def run(args: argparse.Namespace) -> None:
    run_confirmation(ConfirmRequest(**vars(args)))


if __name__ == "__main__":
    sys.exit(command_main("confirm"))
