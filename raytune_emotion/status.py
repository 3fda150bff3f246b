"""Show what a running or finished study has reached."""

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.text import Text

from raytune_emotion.cli import command_main, location, positive_integer
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import escape, plain_console, say
from raytune_emotion.tuning.study.spec import spec_of

if TYPE_CHECKING:
    from raytune_emotion.tuning.report.summary import Summary

_SECONDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=location, metavar="STUDY", help="folder or URI of a study, running or not")
    add("--json", action="store_true", help="one line of JSON, for scripts")
    add(
        "--watch",
        type=positive_integer,
        nargs="?",
        const=_SECONDS,
        metavar="SECONDS",
        help=f"repeat after this number of seconds, until Ctrl-C (without a number: {_SECONDS})",
    )


def run(args: argparse.Namespace) -> None:
    spec_of(args.study)  # raises an error at once if it is not a study
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.report.summary import describe

    if args.json or args.watch is None or not sys.stdout.isatty():
        while True:
            summary = read_summary(args.study)
            say(json.dumps(dataclasses.asdict(summary)) if args.json else "\n".join(describe(summary)))
            sys.stdout.flush()
            if args.watch is None:
                return
            time.sleep(args.watch)
    with Live(_lines(read_summary(args.study)), console=plain_console(), auto_refresh=False) as live:
        while True:
            time.sleep(args.watch)
            live.update(_lines(read_summary(args.study)), refresh=True)


def read_summary(place: Location) -> "Summary":
    """Summarise a study as it is now.

    Raises:
        UserError: there is no study, or it is damaged.
    """
    from raytune_emotion.tuning.report.summary import summarize
    from raytune_emotion.tuning.study.open_study import read_study

    with read_study(place) as study:
        return summarize(study, study.records(), now=time.time(), name=str(place))


def _lines(summary: "Summary") -> Group:
    from raytune_emotion.tuning.report.summary import describe

    return Group(*(Text(escape(line)) for line in describe(summary)))


if __name__ == "__main__":
    sys.exit(command_main("status"))
