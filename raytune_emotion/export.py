"""Export a trial of a study, or a run of train, as a folder that timm and `predict` load: the command."""

import argparse
import sys

from raytune_emotion.cli import command_main, location, positive_integer
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.learn.export_files import FORMATS, check_formats
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import count, say
from raytune_emotion.tuning.study.spec import SPEC, spec_of
from raytune_emotion.tuning.study.trials import PARAMS, find_trial, trials_with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=location, metavar="STUDY", help="folder or URI of a study, or of a run of train")
    add("dest", type=location, metavar="DEST", help="folder or URI to write; replaces an earlier export there")
    add("--trial", metavar="ID", help="id of the trial (default: the best trial)")
    add(
        "--ensemble",
        type=positive_integer,
        metavar="K",
        help="one model: the mean prediction of at most K trials whose weights are kept (formats onnx and pt2)",
    )
    add(
        "--soup",
        action="store_true",
        help="the mean weights of the trials of the best backbone whose weights are kept",
    )
    add(
        "--format",
        type=lambda names: [name.strip() for name in names.split(",")],
        action="extend",
        metavar="A,B",
        help=f"formats to write: {', '.join(FORMATS)}; may be repeated "
        "(default: timm; for an ensemble: pt2, where it can be made)",
    )


def run(args: argparse.Namespace) -> None:
    formats = list(dict.fromkeys(args.format or ([] if args.ensemble else ["timm"])))
    _check(args, formats)
    if args.ensemble or args.soup:
        _export_combination(args, formats)
        return
    if _is_run(args.study):
        if args.trial is not None:
            raise UserError(f"--trial {args.trial}: {args.study} is a run of train, not a study; leave the option out")
        from raytune_emotion.tuning.study.trial_export import export_run

        export_run(args.study, args.dest, formats)
        say(f"the best weights of {args.study} are exported to {args.dest}")
        return
    trial_id = _find_trial(args.study, args.trial) if args.trial is not None else _best_of(args.study)
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.study.trial_export import export_trial

    export_trial(args.study, args.dest, trial_id, formats)
    say(f"trial {trial_id} is exported to {args.dest}")


def _check(args: argparse.Namespace, formats: list[str]) -> None:
    """Check the arguments, as far as that is quick.

    Raises:
        UserError: one sentence for each error.
    """
    errors: list[str] = []
    with collect_errors(errors):
        check_formats(formats)
    named = [name for name in ("trial", "ensemble", "soup") if getattr(args, name)]
    if len(named) > 1:
        errors.append(f"--{named[0]}: cannot be combined with --{named[1]}; leave one of them out")
    if args.ensemble and "timm" in formats:
        errors.append("--format timm: timm loads one network, and an ensemble is several; name onnx, pt2 or both")
    if args.ensemble or args.soup:
        with collect_errors(errors):
            spec_of(args.study)
    if errors:
        raise UserError(errors)


def _export_combination(args: argparse.Namespace, formats: list[str]) -> None:
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.study.combined_export import export_ensemble, export_soup

    if args.ensemble:
        chosen, what = export_ensemble(args.study, args.dest, args.ensemble, formats), "ensemble"
    else:
        chosen, what = export_soup(args.study, args.dest, formats), "soup"
    if len(chosen.members) == 1:
        say(f"trial {chosen.trial_ids[0]} alone is exported to {args.dest}: no other trial improves it")
    else:
        say(f"the {what} of the trials {', '.join(chosen.trial_ids)} is exported to {args.dest}")
        say(chosen.sentence(what))
    if left_out := chosen.candidates.left_out:
        size = chosen.candidates.store.image_size
        say(f"left out: {count(left_out, 'trial')} of another image size than the {size} px of the best trial")


def _find_trial(study: Location, text: str) -> str:
    """Return the id of a trial that has started.

    Raises:
        UserError: there is no study, or it has no such trial.
    """
    spec_of(study)
    return find_trial(text, trials_with(study, PARAMS), study)


def _best_of(place: Location) -> str:
    if spec_of(place).confirms is not None:
        raise UserError(f"{place}: the winner is in {place / 'best'}; name another run with --trial")
    from raytune_emotion.tuning.study.open_study import read_study

    with read_study(place) as study:
        return study.best_trial().trial_id


def _is_run(place: Location) -> bool:
    return place.exists() and place.read(SPEC) is None and place.read(PARAMS) is not None


if __name__ == "__main__":
    sys.exit(command_main("export"))
