"""Export a trial of a study as a folder that timm and `predict` load: the command."""

import argparse
import sys

from raytune_emotion.cli import command_main, location
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST, HISTORY
from raytune_emotion.learn.export_folder import check_replaceable, export_checkpoint
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import say
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.records import opened, trial_folder
from raytune_emotion.tuning.study.spec import SPEC, read_spec


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


def export_trial(study: Location, dest: Location, trial_id: str) -> None:
    """Export the best weights of a trial; an earlier export at dest is replaced.

    Raises:
        UserError: the study has no weights of that trial, or dest cannot be written.
    """
    kept = [name.split("/")[1] for name in study.find(f"trials/*/{BEST}")]
    if trial_id not in kept:
        those = (
            f"there are those of {', '.join(kept)}" if kept else "name the folder of a study whose trials have reported"
        )
        raise UserError(f"{study}: has no weights of a trial {trial_id}, as only those of the best are kept; {those}")
    check_replaceable(dest)
    with study.copy_here(f"trials/{trial_id}/{BEST}") as folder, dest.publish() as package:
        notes = [f"Trial {trial_id} of the study {study.name}."]
        export_checkpoint(trial_folder(folder, trial_id) / BEST, package, notes)


if __name__ == "__main__":
    sys.exit(command_main("export"))
