"""Exports a trial of a study: a folder that timm loads and that `predict` predicts with."""

import argparse
import sys
from pathlib import Path

from raytune_emotion.__main__ import command_main
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST
from raytune_emotion.learn.package import export_checkpoint
from raytune_emotion.tuning.study import best_trial_id, trial_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="folder of a study")
    add("dest", type=Path, metavar="DEST", help="folder to write; an earlier export there is replaced")
    add("--trial", metavar="ID", help="of the study (default: the best)")


def run(args: argparse.Namespace) -> None:
    trial_id = args.trial or best_trial_id(args.study)
    export_trial(args.study, args.dest, trial_id)
    print(f"trial {trial_id} is exported to {args.dest}")


def export_trial(study: Path, dest: Path, trial_id: str) -> None:
    """Exports the best weights of a trial; an earlier export at dest is replaced.

    Raises:
        UserError: the study has no weights of that trial, or dest cannot be written.
    """
    kept = sorted(file.parent.name for file in study.glob(f"trials/*/{BEST}"))
    if trial_id not in kept:
        those = (
            f"there are those of {', '.join(kept)}" if kept else "name the folder of a study whose trials have reported"
        )
        raise UserError(f"{study}: has no weights of a trial {trial_id}, as only those of the best are kept; {those}")
    name = study.resolve().name
    export_checkpoint(trial_folder(study, trial_id) / BEST, dest, [f"Trial {trial_id} of the study {name}."])


if __name__ == "__main__":
    sys.exit(command_main("export"))
