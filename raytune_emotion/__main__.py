"""Search hyperparameters of models that predict a distribution over emotions from a face."""

import sys

from raytune_emotion import __version__
from raytune_emotion.cli import COMMANDS, CommandParser, command_main
from raytune_emotion.terminal import SCRIPT


def main(argv: list[str] | None = None) -> int:
    """Run `raytune-emotion VERB …`."""
    parser = CommandParser(prog=SCRIPT, description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in COMMANDS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    args, rest = parser.parse_known_args(argv)
    return command_main(args.verb, rest)


if __name__ == "__main__":
    sys.exit(main())
