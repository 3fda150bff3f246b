"""Define what a source of annotated faces is, and the faults of its rows.

A faulty row is reported, never repaired. The faults are collected, so that all of them can be reported at once.
"""

import contextlib
import io
import math
import statistics
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

from PIL import Image

from raytune_emotion.data.decode import FORMATS
from raytune_emotion.data.parallel import Map
from raytune_emotion.data.shard_format import SUM_TOLERANCE
from raytune_emotion.storage.locations import File, Location
from raytune_emotion.terminal import count

#: Largest number of faults of one kind that a sentence names.
_NAMED = 10
#: Number of images whose headers are read to find the image size of a source.
_SIZES_READ = 100


class Kind(Enum):
    """A kind of fault of a row."""

    NAME = "name is not UTF-8"
    NO_IMAGE = "annotation without an image"
    NO_ANNOTATION = "image without an annotation"
    SEVERAL_IMAGES = "several images for one id"
    UNREADABLE = "cannot be read"
    NOT_UTF8 = "not UTF-8 text"
    EMPTY = "empty annotation"
    TEXT = "text in place of numbers"
    COUNT = "wrong number of values"
    NOT_FINITE = "values that are not finite"
    NEGATIVE = "negative values"
    SUM = "sum is not one"
    UNDECODABLE = "image cannot be decoded"
    CELLS = "wrong number of cells"
    OUTSIDE = "path is empty or leaves the folder of the table"
    MISSING = "image is missing"
    TWICE = "image is named twice"
    SPLIT = "split is neither train nor val nor test"
    NO_VOTES = "no votes"


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    image: File
    probs: tuple[float, ...]  # K, as read


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a row."""

    kind: Kind
    detail: str = ""
    values: int | None = None  # their number, if it is wrong


@dataclass(frozen=True)
class Fault:
    """A flaw with its place: a file, and for a row of a table its line."""

    split: str  # train or val
    file: str  # relative to the folder, with slashes
    flaw: Flaw
    line: int | None = None  # from 1; None for a file of a folder, and for an image that a table names

    @property
    def detail(self) -> str:
        """Return the line and the detail of the flaw; empty if there is neither."""
        line = "" if self.line is None else f"line {self.line}"
        return ": ".join(part for part in (line, self.flaw.detail) if part)

    @property
    def reason(self) -> str:
        return f"{self.flaw.kind.value}: {self.detail}" if self.detail else self.flaw.kind.value


@dataclass(frozen=True)
class Scan:
    """A source whose annotations have been read and whose images have not."""

    rows: Mapping[str, Sequence[Row]]  # by split, in the order of the ids
    unlabelled: Mapping[str, Sequence[File]]  # images of rows whose annotation is faulty
    faults: Sequence[Fault]


class Faces(ABC):
    """A source of annotated faces whose files are listed: a folder, or a table."""

    location: Location  # of the folder that its files are in

    @property
    @abstractmethod
    def source(self) -> str:
        """Return the name of the source for messages."""

    @property
    @abstractmethod
    def annotations(self) -> int:
        """Count the annotations."""

    @property
    @abstractmethod
    def images(self) -> Mapping[str, Sequence[File]]:
        """Return the images of each split, train and val, sorted by name."""

    @property
    def own_classes(self) -> tuple[str, ...] | None:
        """Return the classes that the source itself names; None if it names none."""
        return None

    @abstractmethod
    def scan(self, classes: tuple[str, ...], pmap: Map) -> Scan:
        """Read every annotation and find its image. Images are not opened, and faults of rows are returned."""

    @abstractmethod
    def quick_fingerprint(self) -> str:
        """Hash the names, sizes and modification times of images and annotations, without reading an image."""

    @abstractmethod
    def row_of(self, fault: Fault) -> str:
        """Return an identifier of the row of a fault within its split. A row may have several faults."""

    @abstractmethod
    def empty_split_fault(self, split: str) -> str:
        """Return the error for a split without a valid row."""

    def advice(self, faults: Sequence[Fault], classes: tuple[str, ...]) -> Mapping[Kind, str]:
        """Return what to do about kinds of faults that only such a source has."""
        return {}

    def notes(self) -> list[str]:
        """Return remarks on how the source is read, one sentence each."""
        return []


def parse_probabilities(values: tuple[float, ...], classes: tuple[str, ...]) -> tuple[float, ...] | Flaw:
    """Return the probabilities of the classes unchanged, or their fault."""
    total = sum(values) if all(map(math.isfinite, values)) else math.nan
    if math.isnan(total):
        return Flaw(Kind.NOT_FINITE, _values_by_class(values, classes, lambda v: not math.isfinite(v)))
    if min(values) < 0:
        return Flaw(Kind.NEGATIVE, _values_by_class(values, classes, lambda v: v < 0))
    if abs(total - 1) > SUM_TOLERANCE:
        return Flaw(Kind.SUM, f"{total:.6g}")
    return values


def native_size(faces: Faces, most: int) -> int:
    """Return the median of the shorter sides of the images, px, at most `most`.

    It is computed from the headers of some training images. Unreadable images are skipped; packing will refuse them.
    """
    names = [file.name for file in faces.images["train"]]
    sides = []
    for content in faces.location.read_all(names[:: max(1, len(names) // _SIZES_READ)]):
        with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            if isinstance(content, bytes):
                sides.append(min(Image.open(io.BytesIO(content), formats=FORMATS).size))
    return max(16, min(most, int(statistics.median(sides)))) if sides else most


def sentences(faces: Faces, faults: Sequence[Fault], classes: tuple[str, ...]) -> list[str]:
    """Write one sentence for each kind of fault, with its count and the first names."""
    advice = {
        Kind.SUM: f"the probabilities of an image must sum to 1 within {SUM_TOLERANCE:g}",
        **faces.advice(faults, classes),
    }
    by_kind: dict[Kind, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.flaw.kind].append(fault)
    told = []
    for kind in Kind:
        if not (group := by_kind[kind]):
            continue
        names = [f"{f.file} ({f.detail})" if f.detail else f.file for f in group[:_NAMED]]
        if len(group) > _NAMED:
            names.append(f"and {len(group) - _NAMED} more")
        noun = "file" if any(fault.line is None for fault in group) else "row"
        sentence = f"{faces.source}: {kind.value} ({count(len(group), noun)}): {', '.join(names)}"
        told.append(f"{sentence}; {advice[kind]}" if kind in advice else sentence)
    return told


def shown(cell: Any) -> str:
    """Return a cell for a message: a text in quotes, and 40 characters at most."""
    text = cell if isinstance(cell, str) else repr(cell)
    text = text if len(text) <= 40 else text[:39] + "…"
    return repr(text) if isinstance(cell, str) else text


def parse_number(cell: Any) -> float | None:
    """Return the number in a cell of a table, which may be text; None if it is not a number."""
    if isinstance(cell, str):
        # float() also accepts 1_000 and digits of every script.
        try:
            return float(cell) if cell.isascii() and "_" not in cell else None
        except ValueError:
            return None
    return float(cell) if isinstance(cell, int | float | Decimal) and not isinstance(cell, bool) else None


def _values_by_class(values: Sequence[float], classes: Sequence[str], picked: Callable[[float], bool]) -> str:
    return ", ".join(f"{v:g} for {c}" for v, c in zip(values, classes, strict=True) if picked(v))
