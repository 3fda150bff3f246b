"""Pack annotated faces into stores, each of one image size. Every picture is decoded only once."""

import contextlib
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from typing import Any

from raytune_emotion.config import RunConfig
from raytune_emotion.data.decode import picture_bytes
from raytune_emotion.data.faces import Faces, Scan
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
from raytune_emotion.storage.locations import Location, check_disk_space, location_of
from raytune_emotion.terminal import warn

#: Advice on a full disk.
MORE_ROOM = "choose a disk with room (cache: XDG_CACHE_HOME; on the way to a URI: TMPDIR) or a smaller image size"
#: Pattern of files that interrupted attempts may have left in the folder of a store.
_LEFT = re.compile(r"(train|val)-\d+\.arrow|\..*(done|tmp)")


def pack(
    source: Location | str | PathLike[str],
    dest: Location | str | PathLike[str],
    *,
    image_size: int,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
) -> Store:
    """Check and decode every row of an AffectNetFused folder or of a table once, and write them as a store.

    The content depends only on the source, not on the number of workers. The store at dest appears only when it is
    complete. An interrupted or killed attempt keeps its whole shards, hidden beside a folder or at a URI. The next
    attempt continues with them.

    Args:
        source: the folder or the table, or its URI.
        dest: the store, which must not exist yet.
        image_size: side of the square images, px.
        classes: names of the K values of an annotation, in order; None: those of the table, or the 13 of this project.
        skip_bad: leave out faulty rows, and list them in rejected.csv, instead of refusing the source.
        workers: number of processes; default: one per core, or none for few tasks.

    Raises:
        UserError: a sentence for every kind of fault; dest exists.
        Breakdown: the disk is too small, or full; all requests to a URI failed.
    """
    location = location_of(dest)
    pack_sizes(location_of(source), {image_size: location}, classes=classes, skip_bad=skip_bad, workers=workers)
    return open_store(location)


def pack_sizes(
    source: Location | Faces,
    dests: Mapping[int, Location],
    *,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    pmap: Map | None = None,
) -> dict[int, Manifest]:
    """Pack a folder or a table at several image sizes in one pass over its images, each as `pack` does.

    Args:
        source: the folder or the table, which may be listed already.
        dests: destination of each image size, px.
        classes: as in `pack`.
        skip_bad: as in `pack`.
        workers: as in `pack`.
        pmap: map that runs the tasks instead of workers, on machines that can all access the locations.

    Raises:
        UserError: see `pack`.
        Breakdown: see `pack`; a machine cannot access one of the folders.
    """
    given = () if classes is None else tuple(map(str, classes))
    for size in dests:
        RunConfig.from_flat({"data.image_size": size, **({"data.classes": given} if given else {})})
    faces = source if isinstance(source, Faces) else list_unpacked(source)
    names = given or faces.own_classes or EMOTIONS
    RunConfig.from_flat({"data.classes": names})
    for note in faces.notes():
        warn(note)
    next(iter(dests.values())).check(write=True)  # the others are beside it
    if there := [dest for dest in dests.values() if not dest.can_be_built()]:
        raise UserError(f"{dest}: {EXISTS}" for dest in there)
    # The processes end before the locks are released: they write what the locks protect.
    with contextlib.ExitStack() as locks, contextlib.ExitStack() as processes:
        pmap = pmap or processes.enter_context(process_map(workers))
        with progress() as bars:
            # This comes before `build`: an error in the source or an option must not delete shards of earlier attempts.
            scan = read_rows(faces, names, _check_on_each_node([faces.location], pmap), bars, skip_bad=skip_bad)
        # All processes take the locks in the same order; otherwise two might wait for each other.
        built = {size: locks.enter_context(dests[size].build()) for size in sorted(dests)}
        run = _check_on_each_node([faces.location, *built.values()], pmap)
        try:
            records = _pack(faces, scan, built, names, skip_bad=skip_bad, pmap=run)
        except UserError:
            for dest in built.values():
                _delete_leftovers(dest)
            raise
        except OSError as error:
            if not is_disk_full(error):
                raise
            where = ", ".join(map(str, dests.values()))
            # Not a UserError, which would delete the finished shards.
            raise Breakdown(
                f"{where}: {error.strerror} while packing; free some space, and the same command continues; or "
                f"{MORE_ROOM}"
            ) from error
    # Delete the records last: an interrupted packing resumes from them.
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
        UserError: it does not exist, or is already a packed store.
    """
    if not is_table(source):
        source.check(write=False)
        if find_stores(source):
            raise UserError(f"{source}: is already a packed store; name a folder or a table of faces")
    return list_source(source)


def _pack(
    faces: Faces, scan: Scan, dests: Mapping[int, Location], classes: tuple[str, ...], *, skip_bad: bool, pmap: Map
) -> list[str]:
    """Pack the rows, and return the names of the records, which are beside the shards of the smallest size."""
    digests: dict[str, list[Digest]] = {}
    entries: dict[int, dict[str, list[ShardEntry]]] = {size: {} for size in dests}
    for dest in dests.values():
        # An attempt may have been interrupted after it wrote these files. A changing store must not look complete.
        dest.delete([MANIFEST, REJECTED])
    with progress() as bars:
        rows = sum(map(len, scan.rows.values()))
        check_disk_space({dest: rows * picture_bytes(size) for size, dest in dests.items()}, MORE_ROOM)
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
    """Delete files of interrupted attempts, except those to keep."""
    names = [file.name for file in dest.list_files()]
    dest.delete([name for name in names if _LEFT.fullmatch(name) and name not in kept])
    dest.delete_parts()


def _check_on_each_node(locations: Sequence[Location], pmap: Map) -> Map:
    """Return the same map, whose tasks raise Breakdown on a machine that cannot access one of the locations."""
    return lambda function, tasks: pmap(_check_and_run, ((locations, function, task) for task in tasks))


def _check_and_run(task: tuple[Sequence[Location], Callable[[Any], Any], Any]) -> Any:
    locations, function, own = task
    for location in locations:
        if not location.is_reachable():
            raise Breakdown(
                f"{location}: not found on {socket.gethostname()}; share it under this path with every node, or use"
                " URIs for SRC and DEST"
            )
    return function(own)
