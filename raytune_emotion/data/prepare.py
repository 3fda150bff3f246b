"""Find or make the packed stores for training."""

import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import numpy as np

from raytune_emotion.config import DataConfig
from raytune_emotion.data import shard_format
from raytune_emotion.data.affectnet import check_layout
from raytune_emotion.data.faces import Faces, native_size
from raytune_emotion.data.packing.pack import pack_sizes, tell_rejected
from raytune_emotion.data.shard_format import Manifest
from raytune_emotion.data.sources import list_source
from raytune_emotion.data.store import Store, find_stores, is_store, open_store, read_manifest
from raytune_emotion.data.table import is_table
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import sweep
from raytune_emotion.storage.cache import cache_folder
from raytune_emotion.storage.locations import ABANDONED_S, Folder, Location, location_of
from raytune_emotion.terminal import warn


@dataclass(frozen=True)
class Data:
    """Data to train on: packed stores, or a folder or a table of faces, which is packed on first use.

    Manifests are read, and a folder is listed, only once, on first use.
    """

    location: Location
    stores: tuple[Location, ...]  # empty for a folder or a table of faces

    @cached_property
    def manifests(self) -> Mapping[int, tuple[Location, Manifest]]:
        """Return each store with its manifest, by its image size in px."""
        read = [(store, read_manifest(store)) for store in self.stores]
        return {manifest.image_size: (store, manifest) for store, manifest in read}

    @cached_property
    def faces(self) -> Faces:
        return list_source(self.location)

    def own_size(self) -> int:
        """Return the image size of the store, px; for faces the size of their images, at most the default size.

        Raises:
            UserError: there are several stores.
        """
        packed = sorted(self.manifests)
        if len(packed) > 1:
            held = ", ".join(map(str, packed))
            one, _ = self.manifests[packed[-1]]
            advice = f"choose one with data.image_size, or name one, such as {one}"
            raise UserError(f"{self.location}: holds stores of {held} px; {advice}")
        return packed[0] if packed else native_size(self.faces, DataConfig().image_size)

    def count_rows(self) -> int:
        """Count the training images by file names and manifests, without reading images."""
        if self.manifests:
            _, manifest = next(iter(self.manifests.values()))
            return manifest.splits["train"].rows
        return len(self.faces.images["train"])


def find_data(place: Data | Location | str | PathLike[str]) -> Data:
    """Find the training data at a location.

    Raises:
        UserError: it holds no store, no table, and no folder in the layout of AffectNetFused.
    """
    if isinstance(place, Data):
        return place
    location = location_of(place)
    if is_table(location):
        data = Data(location, ())
        _ = data.faces  # read the table at once, to refuse one without the right columns here
        return data
    location.check(write=False)
    data = Data(location, tuple(find_stores(location)))
    if not data.stores:
        check_layout(location)
    return data


def prepare(
    place: Data | Location | str | PathLike[str],
    *,
    image_size: int | None,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Store:
    """Find or make one store for training, as `prepare_sizes` does.

    Args:
        place: a store or several side by side, a table, or a folder in the layout of AffectNetFused; on a disk or at
            a URI.
        image_size: side of the square images, px; None: see `Data.own_size`.
        classes: see `prepare_sizes`.
        skip_bad: see `prepare_sizes`.

    Raises:
        UserError: the place holds no such data; see `prepare_sizes`.
    """
    data = find_data(place)
    size = data.own_size() if image_size is None else image_size
    return prepare_sizes(data, (size,), classes=classes, skip_bad=skip_bad)[size]


def prepare_sizes(
    data: Data,
    image_sizes: Collection[int],
    *,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> dict[int, Store]:
    """Open stores for training. A folder or a table of faces is first packed in one pass into the cache.

    It is packed again if one of these changes: a row, the name, size or modification time of a file, the image size,
    the classes, or skip_bad.

    Args:
        data: the stores or the faces.
        image_sizes: sides of the square images, px.
        classes: names of the K values of an annotation, in order, with which a store must have been packed; None: the
            classes of the store or the table; for a folder, the 13 of this project.
        skip_bad: as in `pack`.

    Raises:
        UserError: a store has other sizes or other classes, or is damaged; see `pack`.
    """
    given = None if classes is None else tuple(map(str, classes))
    if data.manifests:
        return _open_packed(data, image_sizes, given)
    names = given or data.faces.own_classes or EMOTIONS
    files, cache = data.faces.quick_fingerprint(), cache_folder() / "stores"
    dests = {}
    for size in image_sizes:
        wanted = (shard_format.VERSION, files, size, names, skip_bad)
        key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:20]
        dests[size] = dest = Folder(cache / f"{data.location.name}-{size}px-{key}")
        if is_store(dest):
            try:
                tell_rejected(dest, open_store(dest, verify=True).rejected)
            except UserError as error:
                warn(f"{error}\n{dest}: packed again")
                shutil.rmtree(dest.path, ignore_errors=True)
    sweep(cache, ABANDONED_S)
    while missing := {size: dest for size, dest in dests.items() if not is_store(dest)}:
        for size, dest in missing.items():
            warn(f"{data.location}: packing once, at {size} px, into {dest}")
        try:
            pack_sizes(data.faces, missing, classes=names, skip_bad=skip_bad)
        except UserError:
            if not any(map(is_store, missing.values())):  # else another process was faster
                raise
    return {size: open_store(dest, verify=True) for size, dest in dests.items()}


def _open_packed(data: Data, image_sizes: Collection[int], classes: tuple[str, ...] | None) -> dict[int, Store]:
    """Open the packed stores of the wanted sizes."""
    held = ", ".join(map(str, sorted(data.manifests)))
    faults = [
        f"{data.location}: the store holds images of {held} px, but data.image_size is {size}; set data.image_size to"
        f" {held.replace(', ', ' or ')}, or pack the folder again at {size}"
        for size in image_sizes
        if size not in data.manifests
    ]
    chosen = {size: data.manifests[size] for size in image_sizes if size in data.manifests}
    found = list(dict.fromkeys(manifest.classes for _, manifest in (chosen or data.manifests).values()))
    if classes is None and len(found) > 1:
        faults.append(f"{data.location}: the stores have different classes; choose one with data.image_size")
    faults += [
        f"{data.location}: the store has the classes {', '.join(those)}, but data.classes is {', '.join(classes)};"
        f" leave data.classes out to use the classes of the store"
        for those in found
        if classes is not None and those != classes
    ]
    if faults:
        raise UserError(faults)
    stores = {size: open_store(store, verify=True) for size, (store, _) in chosen.items()}
    _refuse_other_faces(data, stores)
    return stores


def _refuse_other_faces(data: Data, stores: Mapping[int, Store]) -> None:
    """Refuse stores of several sizes that have different faces or labels: their trials could not be compared."""
    first = next(iter(stores.values()), None)
    if first and (different := [size for size, store in stores.items() if not _have_same_faces(first, store)]):
        others = " and ".join(map(str, different))
        raise UserError(
            f"{data.location}: the store of {first.image_size} px has other faces or labels than {others} px, so their "
            f"trials could not be compared; pack the faces again at all sizes, with one command"
        )


def _have_same_faces(one: Store, other: Store) -> bool:
    pairs = ((one.train, other.train), (one.val, other.val))
    return one is other or all(a.ids == b.ids and np.array_equal(a.prob_NK, b.prob_NK) for a, b in pairs)
