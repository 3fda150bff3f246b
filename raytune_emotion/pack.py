"""The command pack: a folder of annotated faces becomes a packed store."""

import argparse
import sys
import time
from pathlib import Path

from raytune_emotion import mirror
from raytune_emotion.__main__ import command_main
from raytune_emotion.config import DataConfig
from raytune_emotion.data.store import is_store, pack_sizes, prepare_sizes, push_store
from raytune_emotion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = DataConfig()
    parser.add_argument("source", type=Path, metavar="SRC", help="folder in the layout of AffectNetFused")
    parser.add_argument(
        "dest", type=mirror.place, metavar="DEST", help="the store: a folder that does not exist yet, or a URI"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[default.image_size],
        metavar="N",
        help=f"side in px; a store DEST/Npx for each of several (default: {default.image_size})",
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
    dest, sizes = args.dest, sorted(set(args.image_size))
    options = {"classes": args.classes, "skip_bad": args.skip_bad}
    if isinstance(dest, str):
        # By way of the cache, which also lets another attempt go on with what this one has done.
        places = dict.fromkeys(sizes, dest) if len(sizes) == 1 else {n: mirror.join(dest, f"{n}px") for n in sizes}
        if there := [mirror.shown(place) for place in places.values() if is_store(place)]:
            raise UserError(f"{place}: exists already; name another destination" for place in there)
        mirror.check(dest, write=True)
        stores = prepare_sizes(args.source, sizes, **options)
        for size, store in stores.items():
            push_store(store, places[size])
    else:
        try:
            dests = {sizes[0]: dest} if len(sizes) == 1 else {n: dest / f"{n}px" for n in sizes}
            stores = pack_sizes(args.source, dests, **options)
        except KeyboardInterrupt:
            print("what is packed is kept; the same command goes on with it", file=sys.stderr)
            raise
    seconds = time.perf_counter() - started
    shown, first = mirror.shown(str(dest)), stores[sizes[0]]
    images = len(first.train) + len(first.val)
    print(f"{shown}: {len(first.train)} images to train on and {len(first.val)} to validate on")
    for store in stores.values():
        megabytes = sum(file.stat().st_size for file in store.path.iterdir()) / 1e6
        what = f"{store.image_size} px, {len(store.classes)} classes, {megabytes:,.1f} MB"
        print(f"{what}, rejected rows: {store.rejected}")
    print(f"{seconds:.1f} s, {images / seconds:,.0f} images/s")
    print(f"next: python -m raytune_emotion.search --data {shown}")


if __name__ == "__main__":
    sys.exit(command_main("pack"))
