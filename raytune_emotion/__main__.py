"""The console script: one verb a command, and what all commands share."""

import argparse
import importlib
import sys
from collections.abc import Callable

from raytune_emotion import __version__
from raytune_emotion.errors import Breakdown, UserError

#: verb: what it does. Each is the module of that name, with `add_arguments` and `run`.
COMMANDS = {
    "search": "find the best model for a set of annotated faces: a study",
    "pack": "turn a folder of annotated faces into a packed store",
    "train": "train one configuration, without a search",
    "report": "rebuild the tables and plots of a study",
    "export": "export a trial's best checkpoint",
    "predict": "predict the distribution of emotions of images",
}


def guarded(action: Callable[[], None]) -> int:
    """Runs an action and returns the exit code: 0 done, 2 wrong input, 1 a breakdown (both said), 130 interrupted."""
    try:
        action()
    except UserError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except Breakdown as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def command_main(verb: str, argv: list[str] | None = None) -> int:
    """Runs one command as `python -m raytune_emotion.<verb>` does."""
    parser = argparse.ArgumentParser(prog=f"raytune-emotion {verb}", description=COMMANDS[verb])
    return _run(verb, parser, sys.argv[1:] if argv is None else argv)


def main(argv: list[str] | None = None) -> int:
    """Runs `raytune-emotion VERB …`."""
    parser = argparse.ArgumentParser(prog="raytune-emotion", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in COMMANDS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    args, rest = parser.parse_known_args(argv)
    return command_main(args.verb, rest)


def _run(verb: str, parser: argparse.ArgumentParser, argv: list[str]) -> int:
    # Imported only now: `predict` need not wait for Ray.
    module = importlib.import_module(f"raytune_emotion.{verb}")
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    return guarded(lambda: module.run(args))


if __name__ == "__main__":
    sys.exit(main())
