"""The packed store: every picture decoded once, in files that all trials of a machine map into memory.

A store lies in a folder, or at a URI, from which each machine fetches it once, into its cache. Stores of several sizes
may lie side by side, as `pack` leaves them: in a place's folders 64px, 96px, ...
"""

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_emotion.data import shard_format
from raytune_emotion.data.decode import pixels_digest
from raytune_emotion.data.progress import progress
from raytune_emotion.data.shard_format import MANIFEST, Manifest, check_space, open_shard, parse_manifest
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import resumable_folder, sweep, write_text
from raytune_emotion.storage.cache import cache_folder
from raytune_emotion.terminal import warn

#: Names of stores of several sizes that lie side by side.
_SIDE_BY_SIDE = "[0-9]*px"
ABANDONED_S = 7 * 24 * 3600.0


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
        refuse_credentials(place)
        remote.check(place, write=False)
    return bool(stores_at(place))


def packed_sizes(place: Path | str) -> dict[int, Path | str]:
    """Where there is a store of each image size, px, in a folder or at a URI; nothing where there is none.

    Raises:
        UserError: what describes one of them is damaged.
    """
    return {read_manifest(store).image_size: store for store in stores_at(place)}


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


def stores_at(place: Path | str) -> list[Path | str]:
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
    refuse_credentials(uri)
    manifest = read_manifest(uri)
    name = f"{remote.name_of(uri)}-{manifest.image_size}px-{manifest.fingerprint[:20]}"
    dest = cache_folder() / "stores" / name
    if is_store(dest):
        try:
            return dataclasses.replace(_map(dest), place=uri)
        except UserError as error:
            warn(f"{error}\n{dest}: fetched again")
            shutil.rmtree(dest, ignore_errors=True)
    sweep(dest.parent, ABANDONED_S)
    try:
        with resumable_folder(dest) as folder:
            warn(f"{remote.shown(uri)}: fetched once, into {dest}")
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
    remote.pull(uri, folder, [shard_format.REJECTED])
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    store = _map(folder)
    rows = (
        (name, id_, pixels_digest(image.data), prob_K)
        for name, split in (("train", store.train), ("val", store.val))
        for id_, image, prob_K in zip(split.ids, itertools.chain(*split.shards), split.prob_NK, strict=True)
    )
    if shard_format.fingerprint(store.image_size, store.classes, rows) != store.fingerprint:
        raise UserError(f"{remote.shown(uri)}: its files are not those of its {MANIFEST}; copy the store there again")


def refuse_credentials(uri: str) -> None:
    address = uri.partition("?")[0]
    if remote.shown(address) != address:
        raise UserError(
            f"{remote.shown(uri)}: has credentials in it, which would be written into studies; leave them to the"
            f" environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
