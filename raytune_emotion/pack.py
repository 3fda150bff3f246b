"""The command pack: a folder of annotated faces becomes a packed store."""

import argparse
import sys
import time
from pathlib import Path

from raytune_emotion.__main__ import command_main
from raytune_emotion.config import DataConfig
from raytune_emotion.data.store import pack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = DataConfig()
    parser.add_argument("source", type=Path, metavar="SRC", help="folder in the layout of AffectNetFused")
    parser.add_argument("dest", type=Path, metavar="DEST", help="the store, a folder that does not exist yet")
    parser.add_argument(
        "--image-size", type=int, default=default.image_size, metavar="N", help="side in px (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="set faulty rows aside, listed in DEST/rejected.csv",
    )
    parser.add_argument(
        "--classes",
        type=lambda names: tuple(name.strip() for name in names.split(",")),
        default=default.classes,
        metavar="A,B,C",
        help=f"what the values of an annotation stand for (default: {','.join(default.classes)})",
    )


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    store = pack(args.source, args.dest, image_size=args.image_size, classes=args.classes, skip_bad=args.skip_bad)
    seconds = time.perf_counter() - started
    images = len(store.train) + len(store.val)
    size = sum(file.stat().st_size for file in store.path.iterdir())
    print(f"{store.path}: {len(store.train)} images to train on and {len(store.val)} to validate on")
    print(f"{store.image_size} px, {len(store.classes)} classes, {size / 1e6:,.1f} MB, rejected rows: {store.rejected}")
    print(f"{seconds:.1f} s, {images / seconds:,.0f} images/s")
    print(f"next: python -m raytune_emotion.search --data {store.path}")


if __name__ == "__main__":
    sys.exit(command_main("pack"))
