"""Pack a folder of annotated faces into stores, each of one image size."""

import contextlib
import errno
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raytune_emotion.config import RunConfig
from raytune_emotion.data import shard_format
from raytune_emotion.data.packing.local import pack_into
from raytune_emotion.data.packing.remote import pack_elsewhere
from raytune_emotion.data.parallel import Map, processes
from raytune_emotion.data.shard_format import MORE_ROOM, Manifest
from raytune_emotion.data.store import (
    Store,
    is_store,
    open_store,
    read_manifest,
    refuse_credentials,
    stores_at,
)
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import resumable_folder
from raytune_emotion.storage.locations import Source, shown
from raytune_emotion.terminal import warn


def pack(
    source: Source,
    dest: Path,
    *,
    image_size: int,
    classes: tuple[str, ...] = EMOTIONS,
    skip_bad: bool = False,
    workers: int | None = None,
) -> Store:
    """Checks and decodes every row of an AffectNetFused folder, once, and writes them as a store.

    The content depends on the source alone, not on the number of workers. There is nothing at dest unless all of it
    is. What breaks off or is killed leaves a hidden folder beside dest, and the next attempt goes on with that.

    Args:
        source: the folder, or its URI.
        dest: the store, which must not exist yet.
        image_size: side of the square images, px.
        classes: names of the K values of an annotation, in order.
        skip_bad: leave out the rows at fault, listed in rejected.csv, in place of refusing them all.
        workers: processes; by default one a core, or none where there is little to do.

    Raises:
        UserError: a sentence for every kind of fault; dest exists; the disk is too small.
        Breakdown: a URI fails again and again.
    """
    pack_sizes(source, {image_size: dest}, classes=classes, skip_bad=skip_bad, workers=workers)
    return open_store(dest)


def pack_sizes(
    source: Source,
    dests: Mapping[int, Path | str],
    *,
    classes: tuple[str, ...] = EMOTIONS,
    skip_bad: bool = False,
    workers: int | None = None,
    pmap: Map | None = None,
) -> dict[int, Manifest]:
    """Packs a folder at several image sizes, px, in one pass over its files; each store is as `pack` makes it.

    Args:
        source: as in `pack`.
        dests: by image size; also URIs, at which what breaks off leaves whole shards, but no manifest.
        classes: as in `pack`.
        skip_bad: as in `pack`.
        workers: as in `pack`.
        pmap: in place of workers, runs tasks of whole shards, on machines that all have the folders.

    Raises:
        UserError: see `pack`.
        Breakdown: a URI fails again and again; a machine has not one of the folders.
    """
    for size in dests:
        RunConfig.from_flat({"data.image_size": size, "data.classes": classes})
    if is_store(source):
        raise UserError(f"{shown(source)}: is a packed store already")
    folders = {size: dest for size, dest in dests.items() if isinstance(dest, Path)}
    uris = {size: dest for size, dest in dests.items() if isinstance(dest, str)}
    for uri in uris.values():
        refuse_credentials(uri)
    for uri in list(uris.values())[:1]:
        remote.check(uri, write=True)
    if there := [uri for uri in uris.values() if stores_at(uri)]:
        raise UserError(f"{shown(uri)}: exists already; name another destination" for uri in there)
    with contextlib.ExitStack() as stack:
        # In the same order by whoever packs: else two might wait for each other.
        parts = {size: stack.enter_context(resumable_folder(folders[size])) for size in sorted(folders)}
        try:
            if uris or pmap:
                run = pmap or stack.enter_context(processes(workers, least=2))
                pack_elsewhere({**parts, **uris}, source, classes, skip_bad=skip_bad, pmap=run)
            else:
                run = stack.enter_context(processes(workers))
                pack_into(parts, source, classes, skip_bad=skip_bad, pmap=run)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # What is for a URI is first made in files.
                where = ", ".join(sorted({str(folder.parent) for folder in folders.values()})) or tempfile.gettempdir()
                raise UserError(f"{where}: {error.strerror} while packing; {MORE_ROOM}") from error
            raise
    packed = {size: read_manifest(dest) for size, dest in dests.items()}
    for size, folder in folders.items():
        tell_rejected(folder, packed[size].rejected)
    return packed


def tell_rejected(path: Path, rejected: int) -> None:
    if rejected:
        warn(f"{path}: rejected rows: {rejected}, see {path / shard_format.REJECTED}")
