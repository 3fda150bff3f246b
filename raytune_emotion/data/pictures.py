"""List and decode the named pictures in order: files, folders and packed stores, on this machine or at URIs."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytune_emotion.data.cores import usable_cores
from raytune_emotion.data.decode import UndecodableImage, decode_at_sizes, ignore_decoder_warnings
from raytune_emotion.data.store import find_stores, open_store, read_manifest
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.storage.locations import Location

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

#: Name of a picture with its pixels, [H, W, 3], or with the reason why it cannot be decoded.
Picture = tuple[str, npt.NDArray[np.uint8] | UndecodableImage]


@dataclass(frozen=True)
class PredictedBatch:
    """Predictions for the readable pictures of a batch, and errors for the others."""

    names: Sequence[str]
    prob_NK: npt.NDArray[np.float64]
    faults: Sequence[str]  # a sentence for each picture that cannot be decoded


@dataclass(frozen=True)
class PictureFiles:
    """Files in a folder or at a URI."""

    location: Location
    files: Sequence[str]  # relative to the location

    def __len__(self) -> int:
        return len(self.files)

    def decode(self, image_size: int, at_once: int, *, threads: int | None = None) -> Iterator[Picture]:
        """Decode the pictures in their order, as for training. At most `at_once` files are in memory.

        Args:
            image_size: side of the square images, px.
            at_once: number of files that are read together.
            threads: number of threads that decode; None: one per core.
        """

        def decoded(content: bytes | OSError) -> npt.NDArray[np.uint8] | UndecodableImage:
            try:
                return decode_at_sizes(content, (image_size,))[0]
            except UndecodableImage as error:
                return error

        with ignore_decoder_warnings(), ThreadPoolExecutor(threads or usable_cores()) as pool:
            for start in range(0, len(self.files), at_once):
                names = self.files[start : start + at_once]
                contents = self.location.read_all(names)
                yield from zip(map(self.label, names), pool.map(decoded, contents), strict=True)

    def label(self, name: str) -> str:
        """Return the name of a picture as it was typed, with invalid text escaped."""
        return os.fsencode((self.location / name).typed).decode(errors="backslashreplace")


@dataclass(frozen=True)
class StoredPictures:
    """The images of packed stores of several sizes. The store of the wanted size is read."""

    location: Location
    stores: Sequence[Location]

    def __len__(self) -> int:
        return sum(split.rows for split in read_manifest(self.stores[0]).splits.values())

    def check(self, image_size: int) -> None:
        """Check that there is a store of images of this size, px.

        Raises:
            UserError: there is none.
        """
        if image_size not in (sizes := self._sizes()):
            held = " and ".join(map(str, sizes))
            raise UserError(
                f"{self.location}: holds images of {held} px, but the model takes {image_size} px; name the folder "
                f"from which it was packed, or pack that folder at {image_size} px"
            )

    def decode(self, image_size: int, at_once: int) -> Iterator[Picture]:
        """Read the images, the training set first. Each is named by its split and its id."""
        store = open_store(self._sizes()[image_size])
        for name, split in (("train", store.train), ("val", store.val)):
            for start in range(0, len(split), at_once):
                rows = range(start, min(start + at_once, len(split)))
                yield from zip((f"{name}/{split.ids[row]}" for row in rows), split.gather(np.array(rows)), strict=True)

    def _sizes(self) -> dict[int, Location]:
        return {read_manifest(store).image_size: store for store in self.stores}


def list_pictures(places: Iterable[Location]) -> tuple[list[PictureFiles | StoredPictures], list[str]]:
    """List the pictures at places. A place is a file, a folder, whose pictures are sorted by name, or a store.

    Returns:
        The pictures, and an error for each place that does not exist, cannot be read, or has no picture.

    Raises:
        UserError: no place has a picture.
    """
    found: list[PictureFiles | StoredPictures] = []
    faults: list[str] = []
    for place in places:
        with collect_errors(faults):
            try:
                found.append(_listed(place))
            except OSError as error:
                raise UserError(f"{place}: cannot be read: {error.strerror}; name readable images") from error
    if not found:
        raise UserError(faults)
    return [*_joined(found)], faults


def _joined(sources: Iterable[PictureFiles | StoredPictures]) -> Iterator[PictureFiles | StoredPictures]:
    """Join consecutive files of one folder, as those of `*.jpg`: a source is predicted in batches."""
    for (kind, place), same in itertools.groupby(sources, key=lambda source: (type(source), source.location)):
        if kind is PictureFiles:
            files = (source.files for source in same if isinstance(source, PictureFiles))
            yield PictureFiles(place, [*itertools.chain.from_iterable(files)])
        else:
            yield from same


def _listed(place: Location) -> PictureFiles | StoredPictures:
    if (file := place.split_file()) is not None:
        folder, name = file
        return PictureFiles(folder, [name])
    if not place.exists():
        raise UserError(f"{place}: no such image; name an existing one")
    if stores := find_stores(place):
        return StoredPictures(place, stores)
    names = sorted(file.name for file in place.list_files())
    images = [name for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
    if not images:
        raise UserError(f"{place}: no image in this folder; name the images, or their folder")
    return PictureFiles(place, images)


def in_batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Yield pictures in lists of this length; the last may be shorter."""
    source = iter(pictures)
    while batch := list(itertools.islice(source, size)):
        yield batch
