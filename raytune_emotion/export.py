"""Export a trial of a study as a folder that timm and `predict` load: the command."""

import argparse
import sys

from raytune_emotion.cli import command_main, location
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import HISTORY
from raytune_emotion.terminal import say
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.records import opened
from raytune_emotion.tuning.study.spec import SPEC, read_spec
from raytune_emotion.tuning.study.trial_export import export_trial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=location, metavar="STUDY", help="folder or URI of a study")
    add("dest", type=location, metavar="DEST", help="folder or URI to write; an earlier export there is replaced")
    add("--trial", metavar="ID", help="id of the trial (default: the best trial)")


def run(args: argparse.Namespace) -> None:
    with opened(args.study, JOURNAL, f"trials/*/{HISTORY}") as folder:
        if args.trial is None and (folder / SPEC).exists() and read_spec(folder).confirms is not None:
            raise UserError(f"{folder}: its winner is in {folder / 'best'}; name another of its runs with --trial")
        trial_id = args.trial or load(folder).best_trial().trial_id
    export_trial(args.study, args.dest, trial_id)
    say(f"trial {trial_id} is exported to {args.dest}")


if __name__ == "__main__":
    sys.exit(command_main("export"))
