"""Pack a folder of annotated faces into a store: the command."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from raytune_emotion.cli import command_main, location
from raytune_emotion.config import DataConfig, FlatConfig, RunConfig
from raytune_emotion.data.packing.pack import pack_sizes
from raytune_emotion.data.parallel import Map
from raytune_emotion.data.store import find_stores, verify_store
from raytune_emotion.data.table import is_table
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.storage.locations import Location, parse_location
from raytune_emotion.terminal import say, shell_word, typed_command, warn

_KEPT = "the packed images are kept; the same command continues"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = DataConfig()
    parser.add_argument(
        "source",
        type=location,
        metavar="SRC",
        help="AffectNetFused folder or table of faces (.csv, .parquet), as a path or URI",
    )
    parser.add_argument(
        "dest",
        type=location,
        nargs="?",
        metavar="DEST",
        help="store to write: a folder that does not exist yet, or a URI",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[default.image_size],
        metavar="N",
        help=f"side of the images, px; several sizes make a store DEST/Npx each (default: {default.image_size})",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad rows out, and list them in rejected.csv of each store",
    )
    parser.add_argument(
        "--classes",
        type=lambda names: tuple(name.strip() for name in names.split(",")),
        metavar="A,B,C",
        help="class names in the order of the annotated values "
        f"(default: those of the table, or {', '.join(default.classes)})",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="describe SRC, and list images that are in both splits, or verify a store; nothing is packed",
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", help="address of a running Ray cluster, or auto: pack on all its nodes"
    )


def run(args: argparse.Namespace) -> None:
    _check_options(args)
    if args.check:
        _check(args.source, args.classes)
        return
    started = time.perf_counter()
    # Absolute addresses, because each node of a cluster works in a folder of its own.
    source, dest = parse_location(args.source.address), parse_location(args.dest.address)
    sizes = sorted(set(args.image_size))
    dests = {sizes[0]: dest} if len(sizes) == 1 else {n: dest / f"{n}px" for n in sizes}
    with _cluster(args.address) as pmap:
        try:
            stores = pack_sizes(source, dests, classes=args.classes, skip_bad=args.skip_bad, pmap=pmap)
        except KeyboardInterrupt:
            warn(_KEPT)
            raise
    seconds = time.perf_counter() - started
    splits = stores[sizes[0]].splits
    images = {name: split.rows for name, split in splits.items()}
    say(f"{dest}: {images['train']} images to train on and {images['val']} to validate on")
    for store in stores.values():
        megabytes = sum(shard.bytes for split in store.splits.values() for shard in split.shards) / 1e6
        what = f"{store.image_size} px, {len(store.classes)} classes, {megabytes:,.1f} MB"
        say(f"{what}, rejected rows: {store.rejected}")
    say(f"{seconds:.1f} s, {sum(images.values()) / seconds:,.0f} images/s")
    # One of several stores is named. A space that chooses among the sizes needs their common folder instead.
    command = f"{typed_command('search')} --data {shell_word(str(dests[sizes[0]]))}"
    say(f"next: {command}  # --dry-run estimates how long it takes")


def _check_options(args: argparse.Namespace) -> None:
    """Check the options of which errors would otherwise name a setting.

    Raises:
        UserError: all errors at once.
    """
    faults: list[str] = []
    if args.check:
        for_packing = {"DEST": args.dest, "--skip-bad": args.skip_bad, "--address": args.address}
        faults += [f"--check: packs nothing; leave {name} out" for name, value in for_packing.items() if value]
    elif args.dest is None:
        faults.append("DEST: name the store to write, or only inspect SRC with --check")
    for size in dict.fromkeys(args.image_size):
        faults += _faults_of("--image-size", {"data.image_size": size})
    if args.classes is not None:
        if not all(args.classes):
            given = ",".join(args.classes)
            faults.append(f"--classes: expected a name before and after each comma, got {given!r}; name each class")
        else:
            faults += _faults_of("--classes", {"data.classes": args.classes})
    if faults:
        raise UserError(faults)


def _faults_of(option: str, settings: FlatConfig) -> list[str]:
    """Return the errors of settings that an option gives, under the name of the option."""
    faults: list[str] = []
    with collect_errors(faults):
        RunConfig.from_flat(settings)
    return [f"{option}: {fault.partition(': ')[2]}" for fault in faults]


def _check(source: Location, classes: tuple[str, ...] | None) -> None:
    """Describe a set of faces, or verify packed stores."""
    if is_table(source) or not (stores := find_stores(source)):
        from raytune_emotion.data.packing.inspection import inspect, show

        show(inspect(source, classes))
        return
    for place in stores:
        verify_store(place)
        say(f"{place}: all images and labels are unchanged since packing")


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Map | None]:
    """Yield a map over all nodes of a Ray cluster; None without an address.

    Raises:
        UserError: there is no cluster at the address.
        ClusterLost: the cluster has died.
    """
    if address is None:
        yield None
        return
    # Imported only now, so that packing on this machine does not wait for Ray.
    from raytune_emotion.tuning.execution.cluster import check_cluster, ray_session
    from raytune_emotion.tuning.execution.cluster_map import cluster_map
    from raytune_emotion.tuning.execution.cluster_watch import ClusterLost

    check_cluster(address)
    try:
        with ray_session(address) as watch, cluster_map(watch) as pmap:
            yield pmap
    except ClusterLost as error:
        raise ClusterLost(f"{error}; {_KEPT}") from error


if __name__ == "__main__":
    sys.exit(command_main("pack"))
