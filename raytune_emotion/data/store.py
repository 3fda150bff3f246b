"""Open a packed store: its decoded pictures are in files that all trials of a machine map into memory.

A store is in a folder, or at a URI, from which each machine fetches it once into its cache. Stores of several sizes may
be side by side in the folders 64px, 96px, ... of one location, as `pack` writes them.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_emotion.data import shard_format
from raytune_emotion.data.decode import pixels_digest
from raytune_emotion.data.progress import progress
from raytune_emotion.data.shard_format import MANIFEST, Manifest, may_be_manifest, open_shard, parse_manifest
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.cache import cache_folder
from raytune_emotion.storage.locations import Folder, Location, check_disk_space, location_of

#: Pattern of the folder names of stores side by side.
_SIDE_BY_SIDE = "[0-9]*px"


@dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of their ids."""

    ids: Sequence[str] = field(repr=False)
    prob_NK: npt.NDArray[np.float32] = field(repr=False)
    shards: tuple[npt.NDArray[np.uint8], ...] = field(repr=False)  # [n, H, W, 3] each, in order

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def side(self) -> int:
        """Side of the images, px."""
        return int(self.shards[0].shape[1])

    def gather(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Copy images out of the mapped files.

        Args:
            rows: [B], from 0 to len(self) - 1, in any order.
            out: [B, H, W, 3], C-contiguous, written instead of a new array.

        Returns:
            [B, H, W, 3], uint8; `out`, if it is given.

        Raises:
            IndexError: a row is not in the split.
        """
        if rows.size and rows.view(np.uint64).max() >= len(self):  # as unsigned numbers, negative rows are the largest
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a split of {len(self)}")
        if out is None:
            out = np.empty((len(rows), *self.shards[0].shape[1:]), np.uint8)
        if len(self.shards) == 1:
            # The rows are in range. Modes other than "clip" copy through a buffer as large as `out`.
            return self.shards[0].take(rows, axis=0, out=out, mode="clip")
        begins, files = self._begins, self._bytes
        shard_of = np.searchsorted(begins, rows, side="right") - 1
        length = self.shards[0][0].size
        starts, to = (rows - begins[shard_of]) * length, out.reshape(-1).data
        # Copy bytes: at 96 px, numpy's assignment of a row takes 1.5 times as long as the copy of its pixels.
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
    address: str  # for other machines: the folder, or the URI from which it was fetched
    image_size: int
    classes: tuple[str, ...]
    fingerprint: str  # hash of the content: classes, ids, pixels, probabilities
    train: Split
    val: Split
    rejected: int  # number of rows of the source that were left out by packing

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return open_store, (self.address,)


def is_store(place: Location | str | PathLike[str]) -> bool:
    """Tell whether there is a store, or several side by side, at a location.

    Raises:
        UserError: the location cannot be read, or contains credentials.
    """
    location = location_of(place)
    location.check(write=False)
    return bool(find_stores(location))


def find_stores(location: Location) -> list[Location]:
    """Find the stores at a location: the location itself, or stores side by side in it."""
    # Other subfolders are not searched, because the location may be a folder of images.
    beside = sorted(name for name in location.list_folders() if fnmatch(name, _SIDE_BY_SIDE))
    places = [location, *(location / name for name in beside)]
    found = ((place, place.read(MANIFEST)) for place in places)
    return [place for place, raw in found if raw is not None and may_be_manifest(raw)]


def read_manifest(location: Location) -> Manifest:
    """Read the manifest of the store at a location.

    Raises:
        UserError: there is none, or it is damaged.
    """
    raw = location.read(MANIFEST)
    if raw is None:
        raise UserError(f"{location}: not a packed store, because it has no {MANIFEST}; name a store")
    return parse_manifest(raw, location / MANIFEST)


def open_store(place: Location | str | PathLike[str], *, verify: bool = False) -> Store:
    """Map a store into memory. Its pixels are read only when they are gathered. A store at a URI is fetched first.

    Args:
        place: location of the store.
        verify: read all of it and compare it with the fingerprint of its manifest, unless this machine has done so
            since its files changed. Nothing else detects a flipped bit on a disk.

    Raises:
        UserError: a sentence for everything that is missing, damaged or of another version.
        Breakdown: all attempts to read a URI failed; the disk of the cache is too small.
    """
    location = location_of(place)
    manifest = read_manifest(location)
    key = _cache_key(location, manifest.image_size, manifest.fingerprint)
    check = _map_verified if verify else _map
    path = location.cache_here(key, check=check, fetch=lambda folder: _fetch(location, manifest, folder))
    return dataclasses.replace(check(path), address=location.address)


def open_if_here(address: str, image_size: int, fingerprint: str) -> Store | None:
    """Open a store if it, or its copy in the cache, is on this machine with all its files; return None otherwise.

    Nothing is fetched. A folder may hold a store with another fingerprint by now, which is not opened.

    Args:
        address: address of the store.
        image_size: image size of the store, px.
        fingerprint: fingerprint of its content.
    """
    try:
        location = location_of(address)
        path = location.find_here(_cache_key(location, image_size, fingerprint))
        store = None if path is None else dataclasses.replace(_map(path), address=location.address)
    except (UserError, OSError):
        return None
    return store if store is not None and store.fingerprint == fingerprint else None


def _cache_key(location: Location, image_size: int, fingerprint: str) -> str:
    return f"{location.name}-{image_size}px-{fingerprint[:20]}"


def _map(path: Path) -> Store:
    manifest = read_manifest(Folder(path))
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


def _fetch(location: Location, manifest: Manifest, folder: Path) -> None:
    """Copy a store into a folder of this machine, and validate its content."""
    sizes = _sizes_of_shards(manifest)
    check_disk_space({Folder(folder): sum(sizes.values())}, "choose another disk for the cache with XDG_CACHE_HOME")
    here = {file.name: file.stat().st_size for file in folder.iterdir()}
    wanted = [file for file, size in sizes.items() if here.get(file) != size]
    with progress() as bars:
        for file in bars.track(wanted, description="fetching files"):
            location.pull(folder, [file])
    location.pull(folder, [shard_format.REJECTED])
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    store = _map(folder)
    verify_content(store, location)
    _note_verified(store)


def _sizes_of_shards(manifest: Manifest) -> dict[str, int]:
    return {shard.file: shard.bytes for entry in manifest.splits.values() for shard in entry.shards}


def verify_store(location: Location) -> None:
    """Read all of a store at its location, and compare it with the fingerprint of its manifest.

    For a URI, a new temporary copy is read: the copy in the cache may be correct while the store is damaged.

    Raises:
        UserError: see `verify_content`.
        Breakdown: the disk is too small for the copy.
    """
    sizes = _sizes_of_shards(read_manifest(location))
    with location.copy_here() as folder:
        here = location.is_here(folder)
        if not here:
            # The copy has a folder of its own. The error names the parent of the folder that is passed here.
            check_disk_space({Folder(folder.parent): sum(sizes.values())}, "choose another disk with TMPDIR")
            location.pull(folder, [MANIFEST, *sizes])
        store = _map(folder)
        verify_content(store, location)
        if here:
            _note_verified(store)


def _map_verified(path: Path) -> Store:
    store = _map(path)
    if not _verified_mark(store).exists():
        verify_content(store, Folder(path))
        _note_verified(store)
    return store


def verify_content(store: Store, name: Location) -> None:
    """Read all of a store, and compare it with the fingerprint of its manifest.

    Raises:
        UserError: a file was damaged after it was written. The error names the store by `name`.
    """
    splits = (("train", store.train), ("val", store.val))
    with progress() as bars:
        rows = (
            (split_name, id_, pixels_digest(image.data), prob_K)
            for split_name, split in splits
            for id_, image, prob_K in bars.track(
                zip(split.ids, itertools.chain(*split.shards), split.prob_NK, strict=True),
                total=len(split),
                description=f"verifying the packed images ({split_name})",
            )
        )
        content = shard_format.fingerprint(store.image_size, store.classes, rows)
    if content != store.fingerprint:
        _verified_mark(store).unlink(missing_ok=True)
        raise UserError(
            f"{name}: the files do not match {MANIFEST}; a copy or a disk may have failed; copy the store there again, "
            f"or pack the folder again"
        )


def _note_verified(store: Store) -> None:
    mark = _verified_mark(store)
    with contextlib.suppress(OSError):  # if the cache cannot be written, the store is verified again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _verified_mark(store: Store) -> Path:
    """Return the file that marks the shards in their present state on this disk as verified."""
    stats = [file.stat() for file in sorted(store.path.glob("*.arrow"))]
    files = [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = hashlib.sha256(repr((store.fingerprint, files)).encode()).hexdigest()[:32]
    return cache_folder() / "verified" / key
