"""Convert FER+ to the layout of AffectNetFused: python -m raytune_emotion.ferplus PIXELS VOTES DEST.

It is not a verb of the console script, because few users need it.
"""

import argparse
import sys

from raytune_emotion.cli import local_path, run_guarded
from raytune_emotion.data.ferplus import SIDE, convert
from raytune_emotion.interruption import handle_signals
from raytune_emotion.terminal import say, shell_word, typed_command


def run(args: argparse.Namespace) -> None:
    counts = convert(args.pixels, args.votes, args.dest)
    say(f"{args.dest}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    say(f"next: {typed_command('pack')} {shell_word(args.dest)} DEST --image-size {SIDE}")


def main(argv: list[str] | None = None) -> int:
    """Run the conversion from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m raytune_emotion.ferplus",
        description="convert FER+ to a folder in the layout of AffectNetFused",
    )
    parser.add_argument("pixels", type=local_path, help="fer2013.csv, or the folder of FER+'s PNG files")
    parser.add_argument("votes", type=local_path, help="fer2013new.csv")
    parser.add_argument("dest", type=local_path, help="the new folder")
    args = parser.parse_args(argv)
    with handle_signals():
        return run_guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
