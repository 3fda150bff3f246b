"""Pack a folder of annotated faces into stores, each of one image size: every picture is decoded once, into shards."""

import contextlib
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from typing import Any

from raytune_emotion.config import RunConfig
from raytune_emotion.data.affectnet import Faces, Scan
from raytune_emotion.data.decode import picture_bytes
from raytune_emotion.data.packing.blocks import Digest, pack_block, split_into_blocks
from raytune_emotion.data.packing.validate import read_rows, validate_rows, write_manifest
from raytune_emotion.data.parallel import Map, process_map
from raytune_emotion.data.progress import progress
from raytune_emotion.data.shard_format import MANIFEST, REJECTED, Manifest, ShardEntry
from raytune_emotion.data.sources import list_source
from raytune_emotion.data.store import Store, find_stores, open_store, read_manifest
from raytune_emotion.data.table import is_table
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.known_errors import is_disk_full
from raytune_emotion.storage.atomic import EXISTS
from raytune_emotion.storage.locations import Location, check_space, location_of
from raytune_emotion.terminal import warn

#: What to do about a disk that is full.
MORE_ROOM = "choose a disk with room (cache: XDG_CACHE_HOME; on the way to a URI: TMPDIR) or a smaller image size"
#: What attempts may have left beside the files of a store.
_LEFT = re.compile(r"(train|val)-\d+\.arrow|\..*(done|tmp)")


def pack(
    source: Location | str | PathLike[str],
    dest: Location | str | PathLike[str],
    *,
    image_size: int,
    classes: tuple[str, ...] | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
) -> Store:
    """Check and decode every row of an AffectNetFused folder or of a table, once, and write them as a store.

    The content depends on the source alone, not on the number of workers. There is no store at dest unless all of it
    is. What breaks off or is killed keeps whole shards, hidden beside a folder or at a URI, and the next attempt goes
    on with them.

    Args:
        source: the folder or the table, or its URI.
        dest: the store, which must not exist yet.
        image_size: side of the square images, px.
        classes: names of the K values of an annotation, in order; None: those of the table, or the 13 of this project.
        skip_bad: leave out the rows at fault, listed in rejected.csv, instead of refusing them all.
        workers: processes; by default one a core, or none where there is little to do.

    Raises:
        UserError: a sentence for every kind of fault; dest exists.
        Breakdown: the disk is too small, or full; a URI fails again and again.
    """
    location = location_of(dest)
    pack_sizes(location_of(source), {image_size: location}, classes=classes, skip_bad=skip_bad, workers=workers)
    return open_store(location)


def pack_sizes(
    source: Location | Faces,
    dests: Mapping[int, Location],
    *,
    classes: tuple[str, ...] | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    pmap: Map | None = None,
) -> dict[int, Manifest]:
    """Pack a folder or a table at several image sizes, px, in one pass over its images, each as `pack` does.

    Args:
        source: the folder or the table, maybe listed already.
        dests: by image size.
        classes: as in `pack`.
        skip_bad: as in `pack`.
        workers: as in `pack`.
        pmap: in place of workers, runs the tasks, on machines that all see the locations.

    Raises:
        UserError: see `pack`.
        Breakdown: see `pack`; a machine does not see one of the folders.
    """
    for size in dests:
        RunConfig.from_flat({"data.image_size": size, **({"data.classes": classes} if classes else {})})
    faces = source if isinstance(source, Faces) else list_unpacked(source)
    classes = classes or faces.own_classes or EMOTIONS
    RunConfig.from_flat({"data.classes": classes})
    for note in faces.notes():
        warn(note)
    for dest in list(dests.values())[:1]:
        dest.check(write=True)
    if there := [dest for dest in dests.values() if not dest.can_be_built()]:
        raise UserError(f"{dest}: {EXISTS}" for dest in there)
    with contextlib.ExitStack() as stack:
        pmap = pmap or stack.enter_context(process_map(workers))
        with progress() as bars:
            # First of all: a source or an option that is wrong by now costs nothing that attempts have packed.
            scan = read_rows(faces, classes, _check_on_each_node([faces.location], pmap), bars)
        # In the same order by whoever packs: else two might wait for each other.
        built = {size: stack.enter_context(dests[size].build()) for size in sorted(dests)}
        run = _check_on_each_node([faces.location, *built.values()], pmap)
        try:
            records = _pack(faces, scan, built, classes, skip_bad=skip_bad, pmap=run)
        except UserError:
            for dest in built.values():
                _delete_leftovers(dest)
            raise
        except OSError as error:
            if not is_disk_full(error):
                raise
            where = ", ".join(map(str, dests.values()))
            # No UserError, which deletes what is packed.
            raise Breakdown(
                f"{where}: {error.strerror} while packing; make room, and the same command goes on; or {MORE_ROOM}"
            ) from error
    # Only now that the stores are ended: whatever broke off before is gone on with by the records.
    dests[min(dests)].delete(records)
    packed = {size: read_manifest(dest) for size, dest in dests.items()}
    for size, dest in dests.items():
        tell_rejected(dest, packed[size].rejected)
    return packed


def tell_rejected(store: Location, rejected: int) -> None:
    if rejected:
        warn(f"{store}: rejected rows: {rejected}, see {store / REJECTED}")


def list_unpacked(source: Location) -> Faces:
    """List a source of faces.

    Raises:
        UserError: there is none, or it is a packed store already.
    """
    if not is_table(source):
        source.check(write=False)
        if find_stores(source):
            raise UserError(f"{source}: is a packed store already")
    return list_source(source)


def _pack(
    faces: Faces, scan: Scan, dests: Mapping[int, Location], classes: tuple[str, ...], *, skip_bad: bool, pmap: Map
) -> list[str]:
    """Pack the rows, and return the names of the records that lie beside the shards of the smallest size."""
    digests: dict[str, list[Digest]] = {}
    entries: dict[int, dict[str, list[ShardEntry]]] = {size: {} for size in dests}
    for dest in dests.values():
        # An attempt may have broken off after it wrote these; nobody is to read a store that changes.
        dest.delete([MANIFEST, REJECTED])
    with progress() as bars:
        rows = sum(map(len, scan.rows.values()))
        check_space({dest: rows * picture_bytes(size) for size, dest in dests.items()}, MORE_ROOM)
        bar = bars.add_task("packing images", total=rows)
        blocks = [
            block for split, own in scan.rows.items() for block in split_into_blocks(faces.location, split, own, dests)
        ]
        for block, packed in zip(blocks, pmap(pack_block, blocks), strict=True):
            bars.advance(bar, len(block.rows))
            digests.setdefault(block.split, []).extend(packed.digests)
            for size in dests:
                entries[size].setdefault(block.split, []).extend(packed.entries[size])
        content = validate_rows(faces, classes, scan, digests, pmap, bars, skip_bad=skip_bad)
    for i, (size, dest) in enumerate(dests.items()):
        write_manifest(dest, content, i, size, entries[size])
    records = [block.record for block in blocks]
    for size, dest in dests.items():
        _delete_leftovers(dest, kept={*records, *(entry.file for own in entries[size].values() for entry in own)})
    return records


def _delete_leftovers(dest: Location, kept: Collection[str] = ()) -> None:
    """Delete what attempts have left, but for files that are kept."""
    names = [file.name for file in dest.list_files()]
    dest.delete([name for name in names if _LEFT.fullmatch(name) and name not in kept])
    dest.delete_parts()


def _check_on_each_node(locations: Sequence[Location], pmap: Map) -> Map:
    """Return the same map, whose tasks break off on a machine that does not see one of the locations."""
    return lambda function, tasks: pmap(_check_and_run, ((locations, function, task) for task in tasks))


def _check_and_run(task: tuple[Sequence[Location], Callable[[Any], Any], Any]) -> Any:
    locations, function, own = task
    for location in locations:
        if not location.is_reachable():
            raise Breakdown(
                f"{location}: is not there on {socket.gethostname()}; share it under this path with every node, or have"
                " SRC and DEST at URIs"
            )
    return function(own)
