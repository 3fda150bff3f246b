"""Find or make the packed stores that a run trains from."""

import hashlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from raytune_emotion.config import DataConfig
from raytune_emotion.data import affectnet, shard_format
from raytune_emotion.data.packing.pack import pack_sizes, tell_rejected
from raytune_emotion.data.store import (
    ABANDONED_S,
    Store,
    is_store,
    open_store,
    packed_sizes,
    read_manifest,
    stores_at,
)
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import sweep
from raytune_emotion.storage.cache import cache_folder
from raytune_emotion.storage.locations import shown
from raytune_emotion.terminal import warn


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
    if found := stores_at(data):
        return read_manifest(found[0]).splits["train"].rows
    return affectnet.count_images(data)


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
        wanted = (shard_format.VERSION, files, size, classes, skip_bad)
        key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:20]
        dests[size] = dest = cache / f"{name}-{size}px-{key}"
        if is_store(dest):
            try:
                tell_rejected(dest, open_store(dest).rejected)
            except UserError as error:
                warn(f"{error}\n{dest}: packed again")
                shutil.rmtree(dest, ignore_errors=True)
    sweep(cache, ABANDONED_S)
    while missing := {size: dest for size, dest in dests.items() if not is_store(dest)}:
        for size, dest in missing.items():
            warn(f"{shown(data)}: packed once, at {size} px, into {dest}")
        try:
            pack_sizes(data, missing, classes=classes, skip_bad=skip_bad)
        except UserError:
            if not any(map(is_store, missing.values())):  # else another process was faster
                raise
    return {size: open_store(dest) for size, dest in dests.items()}


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
