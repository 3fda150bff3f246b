"""Export a trial of a study, or a run of train, as a folder that timm and `predict` load: the command."""

import argparse
import sys

from raytune_emotion.cli import command_main, location
from raytune_emotion.errors import UserError
from raytune_emotion.learn.export_files import FORMATS, check_formats
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import say
from raytune_emotion.tuning.study.spec import SPEC, read_spec
from raytune_emotion.tuning.study.trials import PARAMS, as_trial_id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=location, metavar="STUDY", help="folder or URI of a study")
    add("dest", type=location, metavar="DEST", help="folder or URI to write; an earlier export there is replaced")
    add("--trial", metavar="ID", help="id of the trial (default: the best trial)")
    add(
        "--format",
        type=lambda names: [name.strip() for name in names.split(",")],
        action="extend",
        metavar="A,B",
        help=f"formats to write, of {', '.join(FORMATS)}; may be repeated (default: timm)",
    )


def run(args: argparse.Namespace) -> None:
    formats = args.format or ["timm"]
    check_formats(formats)
    if _is_run(args.study):
        if args.trial is not None:
            raise UserError(f"--trial {args.trial}: {args.study} is a run of train, not a study; leave the option out")
        from raytune_emotion.tuning.study.trial_export import export_run

        export_run(args.study, args.dest, formats)
        say(f"the best weights of {args.study} are exported to {args.dest}")
        return
    trial_id = as_trial_id(args.trial) if args.trial is not None else _best_of(args.study)
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.study.trial_export import export_trial

    export_trial(args.study, args.dest, trial_id, formats)
    say(f"trial {trial_id} is exported to {args.dest}")


def _best_of(study: Location) -> str:
    with study.copy_here(SPEC) as folder:
        if read_spec(folder).confirms is not None:
            raise UserError(f"{study}: its winner is in {study / 'best'}; name another of its runs with --trial")
    from raytune_emotion.learn.checkpoint import HISTORY
    from raytune_emotion.tuning.study.open_study import load
    from raytune_emotion.tuning.study.optuna_study import JOURNAL
    from raytune_emotion.tuning.study.records import study_files

    with study_files(study, JOURNAL, f"trials/*/{HISTORY}") as folder:
        return load(folder).best_trial().trial_id


def _is_run(place: Location) -> bool:
    return place.exists() and place.read(SPEC) is None and place.read(PARAMS) is not None


if __name__ == "__main__":
    sys.exit(command_main("export"))
