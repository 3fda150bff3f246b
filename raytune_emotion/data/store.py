"""The packed store: every picture decoded once, in files that all trials of a machine map into memory.

A store lies in a folder, or at a URI, from which each machine fetches it once, into its cache. Stores of several sizes
may lie side by side, as `pack` leaves them: in a place's folders 64px, 96px, ...
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_emotion.config import DataConfig, RunConfig
from raytune_emotion.data import affectnet, shards
from raytune_emotion.data.bars import progress
from raytune_emotion.data.blocks import pack_elsewhere
from raytune_emotion.data.images import pixels_digest
from raytune_emotion.data.packing import MORE_ROOM, check_space, pack_into
from raytune_emotion.data.pool import Map, processes
from raytune_emotion.data.shards import MANIFEST, Manifest, open_shard, parse_manifest
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import resumable_folder, sweep, write_text
from raytune_emotion.storage.locations import Source, shown

#: Names of stores of several sizes that lie side by side.
_SIDE_BY_SIDE = "[0-9]*px"
_ABANDONED_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of their ids."""

    ids: Sequence[str] = field(repr=False)
    prob_NK: npt.NDArray[np.float32] = field(repr=False)
    shards: tuple[npt.NDArray[np.uint8], ...] = field(repr=False)  # [n, H, W, 3] each, in order

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Copies images out of the map of the files.

        Args:
            rows: [B], from 0 to len(self) - 1, in any order.
            out: [B, H, W, 3], C-contiguous, written in place of a new array.

        Returns:
            [B, H, W, 3], uint8: out, where it is given.

        Raises:
            IndexError: a row is not in the split.
        """
        if rows.size and rows.view(np.uint64).max() >= len(self):  # where those below zero are the largest
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a split of {len(self)}")
        if out is None:
            out = np.empty((len(rows), *self.shards[0].shape[1:]), np.uint8)
        if len(self.shards) == 1:
            # The rows are in range; any other mode than clip copies through a buffer as large as out.
            return self.shards[0].take(rows, axis=0, out=out, mode="clip")
        begins, files = self._begins, self._bytes
        shard_of = np.searchsorted(begins, rows, side="right") - 1
        length = self.shards[0][0].size
        starts, to = (rows - begins[shard_of]) * length, out.reshape(-1).data
        # As bytes: for numpy, to assign a row takes half as long again as to copy its pixels at 96 px.
        for i, shard, start in zip(range(0, out.size, length), shard_of.tolist(), starts.tolist(), strict=True):
            to[i : i + length] = files[shard][start : start + length]
        return out

    @cached_property
    def _begins(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.shards[:-1])])

    @cached_property
    def _bytes(self) -> tuple[memoryview, ...]:
        return tuple(shard.reshape(-1).data for shard in self.shards)


@dataclass(frozen=True)
class Store:
    path: Path
    place: str  # by which other machines open it: the folder, or the URI that it was fetched from
    image_size: int
    classes: tuple[str, ...]
    fingerprint: str  # of the content: classes, ids, pixels, probabilities
    train: Split
    val: Split
    rejected: int  # rows of the source that were set aside when it was packed

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return open_store, (self.place,)


def is_store(place: Path | str) -> bool:
    """Whether there is a store, or several side by side, in a folder or at a URI.

    Raises:
        UserError: the URI cannot be read, or has credentials in it.
    """
    place = remote.place(place) if isinstance(place, str) else place
    if isinstance(place, str):
        _refuse_credentials(place)
        remote.check(place, write=False)
    return bool(_found(place))


def check_data(place: Path | str) -> None:
    """Whether there is something to train on: a store, or a folder of images.

    Raises:
        UserError: there is neither.
    """
    if not is_store(place):
        affectnet.check_layout(place)


def own_size(data: Path | str) -> int:
    """The image size of a store, px; of a folder that of its images, but no more than the default.

    Raises:
        UserError: there are several stores.
    """
    packed = sorted(packed_sizes(data))
    if len(packed) > 1:
        held = ", ".join(map(str, packed))
        raise UserError(f"{shown(data)}: holds stores of {held} px; choose by data.image_size")
    if packed:
        return packed[0]
    return affectnet.native_size(data, DataConfig().image_size)


def count_rows(data: Path | str) -> int:
    """How many images there are to train on, by names and descriptions alone."""
    if found := _found(data):
        return read_manifest(found[0]).splits["train"].rows
    return affectnet.count_images(data)


def packed_sizes(place: Path | str) -> dict[int, Path | str]:
    """Where there is a store of each image size, px, in a folder or at a URI; nothing where there is none.

    Raises:
        UserError: what describes one of them is damaged.
    """
    return {read_manifest(store).image_size: store for store in _found(place)}


def read_manifest(place: Path | str) -> Manifest:
    """What describes the store in a folder or at a URI.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if isinstance(place, Path):
        name, raw = str(place), (place / MANIFEST).read_bytes() if (place / MANIFEST).is_file() else None
    else:
        name, raw = remote.shown(place), remote.read(place, MANIFEST)
    if raw is None:
        raise UserError(f"{name}: no packed store, for it has no {MANIFEST}")
    return parse_manifest(raw, f"{name}/{MANIFEST}")


def open_store(place: Path | str) -> Store:
    """Maps a store into memory; its pixels are not read before they are gathered. One at a URI is first fetched.

    Raises:
        UserError: with a sentence for everything that is missing, damaged or of another version.
        Breakdown: a URI cannot be read again and again.
    """
    place = remote.place(place) if isinstance(place, str) else place
    return _fetched(place) if isinstance(place, str) else _map(place)


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
        _refuse_credentials(uri)
    for uri in list(uris.values())[:1]:
        remote.check(uri, write=True)
    if there := [uri for uri in uris.values() if _found(uri)]:
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
        _tell_rejected(folder, packed[size].rejected)
    return packed


def prepare(
    data: Path | str, *, image_size: int | None, classes: tuple[str, ...] = EMOTIONS, skip_bad: bool = False
) -> Store:
    """One store to train from, as `prepare_sizes` has them.

    Args:
        data: see `prepare_sizes`.
        image_size: side of the square images, px; None: the store's own, or that of the folder's images, but no more
            than the default.
        classes: see `prepare_sizes`.
        skip_bad: see `prepare_sizes`.
    """
    sizes = () if image_size is None else (image_size,)
    (store,) = prepare_sizes(data, sizes, classes=classes, skip_bad=skip_bad).values()
    return store


def prepare_sizes(
    data: Path | str,
    image_sizes: Collection[int],
    *,
    classes: tuple[str, ...] = EMOTIONS,
    skip_bad: bool = False,
) -> dict[int, Store]:
    """Stores to train from: those at data, or packed in one pass from the folder at data and kept in the cache.

    A folder is packed again when a name, a size or a modification time in it, the image size, the classes or
    skip_bad is another.

    Args:
        data: a store or several side by side, or a folder in the layout of AffectNetFused; on a disk or at a URI.
        image_sizes: sides of the square images, px; none: the one as in `prepare`.
        classes: names of the K values of an annotation, in order; a store must have been packed with them.
        skip_bad: as in `pack`.

    Raises:
        UserError: data is neither; a store is of other sizes or other classes; see `pack`.
    """
    if packed := packed_sizes(data):
        return _chosen(data, packed, image_sizes or (own_size(data),), classes)
    check_data(data)
    image_sizes = image_sizes or (own_size(data),)
    name = data.resolve().name if isinstance(data, Path) else remote.name_of(data)
    files, cache = affectnet.quick_fingerprint(data), cache_folder() / "stores"
    dests = {}
    for size in image_sizes:
        wanted = (shards.VERSION, files, size, classes, skip_bad)
        key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:20]
        dests[size] = dest = cache / f"{name}-{size}px-{key}"
        if is_store(dest):
            try:
                _tell_rejected(dest, open_store(dest).rejected)
            except UserError as error:
                print(f"{error}\n{dest}: packed again", file=sys.stderr)
                shutil.rmtree(dest, ignore_errors=True)
    sweep(cache, _ABANDONED_S)
    while missing := {size: dest for size, dest in dests.items() if not is_store(dest)}:
        for size, dest in missing.items():
            print(f"{shown(data)}: packed once, at {size} px, into {dest}", file=sys.stderr)
        try:
            pack_sizes(data, missing, classes=classes, skip_bad=skip_bad)
        except UserError:
            if not any(map(is_store, missing.values())):  # else another process was faster
                raise
    return {size: open_store(dest) for size, dest in dests.items()}


def cache_folder() -> Path:
    """Where this project keeps what it can make again: a folder of the user's, by the XDG base directory rules."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "raytune_emotion"


def _tell_rejected(path: Path, rejected: int) -> None:
    if rejected:
        print(f"{path}: rejected rows: {rejected}, see {path / shards.REJECTED}", file=sys.stderr)


def _found(place: Path | str) -> list[Path | str]:
    """The stores at a place: itself, or those side by side in it."""
    if isinstance(place, Path):
        files = [place / MANIFEST, *sorted(place.glob(f"{_SIDE_BY_SIDE}/{MANIFEST}"))]
        return [file.parent for file in files if file.is_file()]
    # Not by all that is below, for it may be a folder of images.
    infos = remote.listed(place)
    stores = [remote.join(place, info.base_name) for info in infos if fnmatch(info.base_name, _SIDE_BY_SIDE)]
    return [uri for uri in (place, *sorted(stores)) if remote.sizes(uri, [MANIFEST]) != [None]]


def _map(path: Path) -> Store:
    manifest = read_manifest(path)
    faults: list[str] = []
    splits: dict[str, Split] = {}
    for name, entry in manifest.splits.items():
        opened = [open_shard(path, shard, manifest, faults) for shard in entry.shards]
        if faults:
            continue
        read = [shard for shard in opened if shard is not None]
        prob_NK = read[0].prob_NK if len(read) == 1 else np.concatenate([shard.prob_NK for shard in read])
        prob_NK.flags.writeable = False
        ids = tuple(id_ for shard in read for id_ in shard.ids)
        splits[name] = Split(ids, prob_NK, tuple(shard.image_NHWC for shard in read))
    if faults:
        raise UserError(faults)
    return Store(
        path,
        str(path.absolute()),
        manifest.image_size,
        manifest.classes,
        manifest.fingerprint,
        splits["train"],
        splits["val"],
        manifest.rejected,
    )


def _fetched(uri: str) -> Store:
    """The copy in this machine's cache of the store at a URI; made once, by whichever process comes first."""
    _refuse_credentials(uri)
    manifest = read_manifest(uri)
    name = f"{remote.name_of(uri)}-{manifest.image_size}px-{manifest.fingerprint[:20]}"
    dest = cache_folder() / "stores" / name
    if is_store(dest):
        try:
            return dataclasses.replace(_map(dest), place=uri)
        except UserError as error:
            print(f"{error}\n{dest}: fetched again", file=sys.stderr)
            shutil.rmtree(dest, ignore_errors=True)
    sweep(dest.parent, _ABANDONED_S)
    try:
        with resumable_folder(dest) as folder:
            print(f"{remote.shown(uri)}: fetched once, into {dest}", file=sys.stderr)
            _fetch(uri, manifest, folder)
    except UserError:
        if not is_store(dest):  # else another process was faster
            raise
    return dataclasses.replace(_map(dest), place=uri)


def _fetch(uri: str, manifest: Manifest, folder: Path) -> None:
    sizes = {shard.file: shard.bytes for entry in manifest.splits.values() for shard in entry.shards}
    check_space(folder, sum(sizes.values()))
    here = {file.name: file.stat().st_size for file in folder.iterdir()}
    wanted = [file for file, size in sizes.items() if here.get(file) != size]
    with progress() as bars:
        for file in bars.track(wanted, description="fetching files"):
            remote.pull(uri, folder, [file])
    remote.pull(uri, folder, [shards.REJECTED])
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    store = _map(folder)
    rows = (
        (name, id_, pixels_digest(image.data), prob_K)
        for name, split in (("train", store.train), ("val", store.val))
        for id_, image, prob_K in zip(split.ids, itertools.chain(*split.shards), split.prob_NK, strict=True)
    )
    if shards.fingerprint(store.image_size, store.classes, rows) != store.fingerprint:
        raise UserError(f"{remote.shown(uri)}: its files are not those of its {MANIFEST}; copy the store there again")


def _chosen(
    data: Path | str, packed: Mapping[int, Path | str], image_sizes: Collection[int], classes: tuple[str, ...]
) -> dict[int, Store]:
    """Those of the stores at a place that are asked for."""
    name, held = shown(data), ", ".join(map(str, sorted(packed)))
    faults = [
        f"{name}: the store holds images of {held} px, and data.image_size is {size}; set data.image_size to"
        f" {held.replace(', ', ' or ')}, or pack the folder again at {size}"
        for size in image_sizes
        if size not in packed
    ]
    chosen = {size: packed[size] for size in image_sizes if size in packed}
    faults += [
        f"{name}: the store has the classes {', '.join(found)}, and data.classes is {', '.join(classes)}"
        for found in dict.fromkeys(read_manifest(place).classes for place in chosen.values() or packed.values())
        if found != classes
    ]
    if faults:
        raise UserError(faults)
    return {size: open_store(place) for size, place in chosen.items()}


def _refuse_credentials(uri: str) -> None:
    address = uri.partition("?")[0]
    if remote.shown(address) != address:
        raise UserError(
            f"{remote.shown(uri)}: has credentials in it, which would be written into studies; leave them to the"
            f" environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
