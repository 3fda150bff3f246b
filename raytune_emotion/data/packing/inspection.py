"""Describe a set of annotated faces without packing it: counts, sizes, classes, labels, and duplicates.

Two images have the same content if they are equal at 32 px. An image that is in both splits is a leak: a model is
validated on an image on which it was trained.
"""

import hashlib
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.special import entr

from raytune_emotion.config import RunConfig
from raytune_emotion.data.decode import FORMATS, UndecodableImage, decode_at_sizes, ignore_decoder_warnings
from raytune_emotion.data.faces import Fault, Flaw, Kind, sentences
from raytune_emotion.data.packing.pack import list_unpacked
from raytune_emotion.data.parallel import process_map
from raytune_emotion.data.progress import count_results, progress
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import File, Location
from raytune_emotion.terminal import count, plain_console, plain_table, say

#: Size at which images are compared, px.
_COMPARED_PX = 32
_FILES_PER_TASK = 128
#: Largest number of leaks that are named.
_NAMED = 10


@dataclass(frozen=True)
class Contents:
    """Description of one split."""

    images: int
    sides: Sequence[tuple[int, int]]  # width and height of each image, px
    mean_K: npt.NDArray[np.float64]  # mean distribution
    entropy: float  # bits, mean over the images
    duplicates: int  # number of images with the content of another in the same split


@dataclass(frozen=True)
class Inspection:
    """Description of a set of faces."""

    source: str
    classes: tuple[str, ...]
    notes: Sequence[str]
    splits: Mapping[str, Contents]
    leaks: Sequence[tuple[str, str]]  # files of the same content: one of the training, one of the validation set
    faults: Sequence[str]  # sentences


def inspect(place: Location, classes: tuple[str, ...] | None = None) -> Inspection:
    """Inspect every annotation and every image of a folder or a table of faces.

    Args:
        place: the folder or the table.
        classes: names of the values of an annotation, in order; None: the classes of the table, or of this project.

    Raises:
        UserError: there is no such folder or table, or the names of its classes are invalid.
    """
    faces = list_unpacked(place)
    classes = classes or faces.own_classes or EMOTIONS
    RunConfig.from_flat({"data.classes": classes})
    looks: dict[str, list[_Look | str]] = {}
    with process_map(None) as pmap, progress() as bars:
        scan = faces.scan(classes, count_results(pmap, bars, "reading annotations", faces.annotations))
        for split, rows in scan.rows.items():
            files = [row.image for row in rows]
            tasks = [(faces.location, files[i : i + _FILES_PER_TASK]) for i in range(0, len(files), _FILES_PER_TASK)]
            parts = count_results(pmap, bars, f"looking at images ({split})", len(files))(_look, tasks)
            looks[split] = [look for part in parts for look in part]
    faults = [*scan.faults]
    splits: dict[str, Contents] = {}
    by_content: dict[str, dict[bytes, list[str]]] = {}
    for split, rows in scan.rows.items():
        found = list(zip(rows, looks[split], strict=True))
        faults += [
            Fault(split, row.image.name, Flaw(Kind.UNDECODABLE, look)) for row, look in found if isinstance(look, str)
        ]
        good = [(row, look) for row, look in found if not isinstance(look, str)]
        files_of: dict[bytes, list[str]] = defaultdict(list)
        for row, look in good:
            files_of[look.content].append(row.image.name)
        by_content[split] = files_of
        prob_NK = np.array([row.probs for row, _ in good], np.float64).reshape(-1, len(classes))
        splits[split] = Contents(
            len(good),
            [look.side for _, look in good],
            prob_NK.mean(axis=0) if good else np.zeros(len(classes)),
            float(entr(prob_NK).sum(axis=1).mean() / np.log(2)) if good else 0.0,
            sum(len(files) - 1 for files in files_of.values()),
        )
    leaks = [
        (train, val)
        for content, files in by_content["val"].items()
        for val in files
        for train in by_content["train"].get(content, [])[:1]
    ]
    told = sentences(faces, sorted(faults, key=lambda f: (f.split, f.file)), classes)
    return Inspection(faces.source, classes, faces.notes(), splits, leaks, told)


def show(found: Inspection) -> None:
    """Print the description of a set of faces.

    Raises:
        UserError: rows are faulty. It is raised after everything is printed.
    """
    train, val = found.splits["train"], found.splits["val"]
    say(f"{found.source}: {count(train.images, 'image')} to train on and {val.images} to validate on")
    for note in found.notes:
        say(note)
    sides = [*train.sides, *val.sides]
    if sides:
        middle = " x ".join(str(round(statistics.median(side[axis] for side in sides))) for axis in (0, 1))
        smallest, largest = (" x ".join(map(str, side)) for side in (min(sides, key=min), max(sides, key=max)))
        say(f"sizes: median {middle} px, smallest {smallest}, largest {largest}")
    say(f"entropy of the labels, mean: {train.entropy:.3f} bits in train, {val.entropy:.3f} in val")
    table = plain_table("class", "mean, train", "mean, val")
    for k, name in enumerate(found.classes):
        table.add_row(name, f"{train.mean_K[k]:.4f}", f"{val.mean_K[k]:.4f}")
    plain_console().print(table)
    say(f"duplicates: {train.duplicates} in train, {val.duplicates} in val")
    if found.leaks:
        pairs = ", ".join(f"{val} is {train}" for train, val in found.leaks[:_NAMED])
        more = f", and {len(found.leaks) - _NAMED} more" if len(found.leaks) > _NAMED else ""
        say(f"leaks: {count(len(found.leaks), 'validation image')} also in train: {pairs}{more}; remove one of each")
    else:
        say("leaks: no validation image is in train")
    if found.faults:
        raise UserError(found.faults)


@dataclass(frozen=True)
class _Look:
    side: tuple[int, int]
    content: bytes  # hash of the pixels


def _look(task: tuple[Location, Sequence[File]]) -> list[_Look | str]:
    """Return the size and the content hash of each image, or its fault."""
    location, files = task
    found: list[_Look | str] = []
    with ignore_decoder_warnings():
        for content in location.read_all([file.name for file in files]):
            try:
                (pixels,) = decode_at_sizes(content, (_COMPARED_PX,))
            except UndecodableImage as error:
                found.append(str(error))
                continue
            assert isinstance(content, bytes)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                found.append(_Look(image.size, hashlib.sha256(pixels.tobytes()).digest()[:16]))
    return found
