"""Reading an AffectNetFused folder as it is in the wild.

    <folder>/{train_set,val_set}/images/<id>.jpg                   or jpeg, png, bmp; in any case
    <folder>/{train_set,val_set}/annotations/<id>_prob_rank.txt    K probabilities, one line, commas between

Whatever else lies beside these is ignored. A row at fault is named, never mended: the faults are collected,
so that all of them can be told at once.
"""

import contextlib
import hashlib
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from PIL import Image

from raytune_emotion.data.images import FORMATS
from raytune_emotion.data.pool import Map
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError

SPLITS: dict[str, str] = {"train": "train_set", "val": "val_set"}

#: How far from one a row may sum; the published files stay within 1e-6.
SUM_TOLERANCE = 1e-3

_ANNOTATION = "_prob_rank.txt"
_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp"})
_NAMED = 10  # faults of one kind that a sentence names
_SIZES_READ = 100  # images whose headers tell a folder's size
_ANNOTATIONS_PER_TASK = 2048


class Kind(Enum):
    """What can be wrong with a row."""

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


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    image: Path
    probs: tuple[float, ...]  # K, as read


@dataclass(frozen=True)
class Flaw:
    kind: Kind
    detail: str = ""


@dataclass(frozen=True)
class Fault:
    split: str  # train or val
    file: str  # relative to the folder, with slashes
    kind: Kind
    detail: str = ""

    @property
    def id(self) -> str:
        name = self.file.rpartition("/")[2]
        return _annotation_id(name) or _image_id(name)

    @property
    def reason(self) -> str:
        return f"{self.kind.value}: {self.detail}" if self.detail else self.kind.value


@dataclass(frozen=True)
class Scan:
    """A folder whose annotations have been read and whose images have not."""

    rows: Mapping[str, Sequence[Row]]  # by split, in the order of the ids
    unlabelled: Mapping[str, Sequence[Path]]  # images of rows whose annotation is at fault
    faults: Sequence[Fault]


def is_folder(path: Path) -> bool:
    return all((path / name).is_dir() for name in SPLITS.values())


def check_layout(root: Path) -> None:
    """Whether a folder has the layout of AffectNetFused.

    Raises:
        UserError: it has not.
    """
    wanted = [f"{folder}/{sub}" for folder in SPLITS.values() for sub in ("annotations", "images")]
    missing = [name for name in wanted if not (root / name).is_dir()]
    if not root.exists():
        raise UserError(f"{root}: there is no such folder")
    if missing:
        raise UserError(
            f"{root}: not a folder in the layout of AffectNetFused, which has {', '.join(wanted)};"
            f" missing {'is' if len(missing) == 1 else 'are'} {', '.join(missing)}"
        )


def scan(root: Path, classes: tuple[str, ...] = EMOTIONS, pmap: Map = map) -> Scan:
    """Reads every annotation of a folder and finds its image; the images are not opened.

    Raises:
        UserError: the folder has not the layout of AffectNetFused. Faults of single rows are not raised.
    """
    rows: dict[str, list[Row]] = {}
    unlabelled: dict[str, list[Path]] = {}
    faults: list[Fault] = []
    for split, files in _list(root).items():
        folder = SPLITS[split]
        rows[split], unlabelled[split] = [], []

        def fault(file: str, kind: Kind, detail: str = "", split: str = split, folder: str = folder) -> None:
            faults.append(Fault(split, f"{folder}/{_printable(file)}", kind, detail))

        for name in files.misnamed:
            fault(name, Kind.NAME)
        for id_ in files.images.keys() - files.annotations:
            for name in files.images[id_]:
                fault(f"images/{name}", Kind.NO_ANNOTATION)
        for id_ in files.annotations - files.images.keys():
            fault(f"annotations/{id_}{_ANNOTATION}", Kind.NO_IMAGE)

        ids = sorted(files.annotations & files.images.keys())
        tasks = [
            (str(root / folder / "annotations"), ids[start : start + _ANNOTATIONS_PER_TASK], classes)
            for start in range(0, len(ids), _ANNOTATIONS_PER_TASK)
        ]
        annotations = (annotation for part in pmap(_read_annotations, tasks) for annotation in part)
        images_folder = root / folder / "images"
        for id_, annotation in zip(ids, annotations, strict=True):
            images = files.images[id_]
            if len(images) > 1:
                fault(f"images/{images[0]}", Kind.SEVERAL_IMAGES, ", ".join(images))
            if isinstance(annotation, Flaw):
                fault(f"annotations/{id_}{_ANNOTATION}", annotation.kind, annotation.detail)
                unlabelled[split] += [images_folder / name for name in images]
            elif len(images) > 1:
                unlabelled[split] += [images_folder / name for name in images]
            else:
                rows[split].append(Row(id_, images_folder / images[0], annotation))
    return Scan(rows, unlabelled, sorted(faults, key=lambda f: (f.split, f.file)))


def parse_annotation(raw: bytes, classes: tuple[str, ...] = EMOTIONS) -> tuple[float, ...] | Flaw:
    """The K probabilities of an annotation file's bytes, exactly as written, or what is wrong with them."""
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Flaw(Kind.NOT_UTF8, f"at byte {error.start}")
    if not text:
        return Flaw(Kind.EMPTY)
    fields = text.split(",")
    try:
        values = tuple(map(_number, fields))
    except ValueError:
        odd = next(field for field in fields if not _is_number(field))
        return Flaw(Kind.TEXT, repr(odd if len(odd) <= 40 else odd[:39] + "…"))
    if len(values) != len(classes):
        return Flaw(Kind.COUNT, f"{len(values)} values for {len(classes)} classes")
    total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    if math.isnan(total):
        return Flaw(Kind.NOT_FINITE, _named(values, classes, lambda v: not math.isfinite(v)))
    if min(values) < 0:
        return Flaw(Kind.NEGATIVE, _named(values, classes, lambda v: v < 0))
    if abs(total - 1) > SUM_TOLERANCE:
        return Flaw(Kind.SUM, f"{total:.6g}")
    return values


def native_size(root: Path, most: int) -> int:
    """The side at which a folder's images lose nothing: the median of their shorter sides, px, at most `most`.

    Taken from the headers of some of the training images; those that cannot be read are left to the packing to refuse.

    Raises:
        UserError: the folder has not the layout of AffectNetFused.
    """
    check_layout(root)
    folder = root / SPLITS["train"] / "images"
    names = sorted(name for name in _names(folder) if _image_id(name))
    sides = []
    for name in names[:: max(1, len(names) // _SIZES_READ)]:
        with contextlib.suppress(OSError, ValueError), Image.open(folder / name, formats=FORMATS) as image:
            sides.append(min(image.size))
    return max(16, min(most, int(statistics.median(sides)))) if sides else most


def count_images(root: Path) -> int:
    """How many training images a folder has, by their names alone.

    Raises:
        UserError: the folder has not the layout of AffectNetFused.
    """
    check_layout(root)
    return sum(bool(_image_id(name)) for name in _names(root / SPLITS["train"] / "images"))


def quick_fingerprint(root: Path) -> str:
    """A hash of the names, sizes and modification times of a folder's images and annotations, read from no file.

    Raises:
        UserError: the folder has not the layout of AffectNetFused.
    """
    check_layout(root)
    digest = hashlib.sha256()
    for folder in SPLITS.values():
        for sub in ("annotations", "images"):
            with os.scandir(root / folder / sub) as entries:
                kept = [(e.name, e.stat()) for e in entries if _annotation_id(e.name) or _image_id(e.name)]
            digest.update(f"{folder}/{sub}\0{len(kept)}\0".encode())
            for name, stat in sorted(kept, key=lambda named: named[0]):
                digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def sentences(root: Path, faults: Sequence[Fault], classes: tuple[str, ...] = EMOTIONS) -> list[str]:
    """One sentence for each kind of fault, with its count and the first names."""
    advice = {
        Kind.COUNT: f"expected are the {len(classes)} classes {', '.join(classes)}: if the folder was made with"
        " another list, name it in data.classes",
        Kind.NO_IMAGE: "the image's name is the id with .jpg, .jpeg, .png or .bmp",
        Kind.NO_ANNOTATION: f"the annotation's name is the id with {_ANNOTATION}",
        Kind.SEVERAL_IMAGES: "keep one of them",
        Kind.SUM: f"the probabilities of an image must sum to 1 within {SUM_TOLERANCE:g}",
    }
    by_kind: dict[Kind, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    told = []
    for kind in Kind:
        if not (group := by_kind[kind]):
            continue
        names = [f"{f.file} ({f.detail})" if f.detail else f.file for f in group[:_NAMED]]
        if len(group) > _NAMED:
            names.append(f"and {len(group) - _NAMED} more")
        count = "1 file" if len(group) == 1 else f"{len(group)} files"
        sentence = f"{root}: {kind.value} ({count}): {', '.join(names)}"
        told.append(f"{sentence}; {advice[kind]}" if kind in advice else sentence)
    return told


@dataclass(frozen=True)
class _Files:
    annotations: set[str]  # ids
    images: dict[str, list[str]]  # id: names
    misnamed: list[str]


def _list(root: Path) -> dict[str, _Files]:
    check_layout(root)
    listed = {}
    for split, folder in SPLITS.items():
        files = _Files(set(), defaultdict(list), [])
        for name in _names(root / folder / "annotations"):
            if id_ := _annotation_id(name):
                if _is_utf8(name):
                    files.annotations.add(id_)
                else:
                    files.misnamed.append(f"annotations/{name}")
        for name in sorted(_names(root / folder / "images")):
            if id_ := _image_id(name):
                if _is_utf8(name):
                    files.images[id_].append(name)
                else:
                    files.misnamed.append(f"images/{name}")
        listed[split] = files
    return listed


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_file()]


# Hidden files are nobody's rows: unpacking on a Mac leaves a `._5.jpg` beside each `5.jpg`.


def _annotation_id(name: str) -> str:
    return "" if name.startswith(".") or not name.endswith(_ANNOTATION) else name.removesuffix(_ANNOTATION)


def _image_id(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return "" if name.startswith(".") or suffix.lower() not in _IMAGE_SUFFIXES else stem


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _read_annotations(task: tuple[str, Sequence[str], tuple[str, ...]]) -> list[tuple[float, ...] | Flaw]:
    folder, ids, classes = task
    read: list[tuple[float, ...] | Flaw] = []
    for id_ in ids:
        try:
            read.append(parse_annotation(Path(folder, f"{id_}{_ANNOTATION}").read_bytes(), classes))
        except OSError as error:
            read.append(Flaw(Kind.UNREADABLE, error.strerror or str(error)))
    return read


def _number(field: str) -> float:
    # float() reads more than numbers are written with: 1_000, and digits of every script.
    if "_" in field or not field.isascii():
        raise ValueError(field)
    return float(field)


def _is_number(field: str) -> bool:
    try:
        _number(field)
    except ValueError:
        return False
    return True


def _named(values: Sequence[float], classes: Sequence[str], picked: Callable[[float], bool]) -> str:
    return ", ".join(f"{v:g} for {c}" for v, c in zip(values, classes, strict=True) if picked(v))
