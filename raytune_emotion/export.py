"""Exports a trial of a study: a folder that timm loads and that `predict` predicts with."""

import argparse
import sys
from pathlib import Path

from raytune_emotion.cli import command_main
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST, HISTORY
from raytune_emotion.learn.export_folder import export_checkpoint
from raytune_emotion.storage import remote
from raytune_emotion.terminal import say, short
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.records import opened, trial_folder
from raytune_emotion.tuning.study.spec import SPEC, read_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=remote.place, metavar="STUDY", help="folder or URI of a study")
    add("dest", type=Path, metavar="DEST", help="folder to write; an earlier export there is replaced")
    add("--trial", metavar="ID", help="of the study (default: the best)")


def run(args: argparse.Namespace) -> None:
    with opened(args.study, JOURNAL, f"trials/*/{HISTORY}") as folder:
        if args.trial is None and (folder / SPEC).exists() and read_spec(folder).confirms is not None:
            raise UserError(f"{folder}: its winner is in {folder / 'best'}; name another of its runs with --trial")
        trial_id = args.trial or load(folder).best_trial().trial_id
        export_trial(folder, args.dest, trial_id, args.study if isinstance(args.study, str) else None)
    say(f"trial {trial_id} is exported to {short(args.dest)}")


def export_trial(study: Path, dest: Path, trial_id: str, uri: str | None = None) -> None:
    """Exports the best weights of a trial; an earlier export at dest is replaced.

    Args:
        study: its folder.
        dest: the folder to write.
        trial_id: of the trial.
        uri: of the study's mirror, if it has one: the weights are there.

    Raises:
        UserError: the study has no weights of that trial, or dest cannot be written.
    """
    if uri is None:
        kept = sorted(file.parent.name for file in study.glob(f"trials/*/{BEST}"))
    else:
        kept = [Path(name).parent.name for name in remote.names(uri, f"trials/*/{BEST}")]
    if trial_id not in kept:
        those = (
            f"there are those of {', '.join(kept)}" if kept else "name the folder of a study whose trials have reported"
        )
        raise UserError(f"{study}: has no weights of a trial {trial_id}, as only those of the best are kept; {those}")
    if uri is not None:
        remote.pull(uri, study, [f"trials/{trial_id}/{BEST}"])
    name = study.resolve().name
    export_checkpoint(trial_folder(study, trial_id) / BEST, dest, [f"Trial {trial_id} of the study {name}."])


if __name__ == "__main__":
    sys.exit(command_main("export"))
