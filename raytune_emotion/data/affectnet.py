"""Read an AffectNetFused folder, including its irregular files.

    <folder>/{train_set,val_set}/images/<id>.jpg                   or jpeg, png, bmp; in any case
    <folder>/{train_set,val_set}/annotations/<id>_prob_rank.txt    K probabilities, one line, commas between

on a disk or at a URI. All other files are ignored. A folder is listed only once, and the list is passed on.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytune_emotion.data.faces import Faces, Fault, Flaw, Kind, Row, Scan, parse_number, parse_probabilities, shown
from raytune_emotion.data.parallel import Map
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import File, Location

SPLITS: dict[str, str] = {"train": "train_set", "val": "val_set"}

_ANNOTATION = "_prob_rank.txt"
_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp"})
_ANNOTATIONS_PER_TASK = 2048


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split that may be rows, sorted by name."""

    annotations: Sequence[File]
    images: Sequence[File]


@dataclass(frozen=True)
class FaceFolder(Faces):
    """A folder in the layout of AffectNetFused, and the list of its files."""

    location: Location
    splits: Mapping[str, SplitFiles]  # train, val

    @property
    def source(self) -> str:
        return str(self.location)

    @property
    def annotations(self) -> int:
        return sum(len(files.annotations) for files in self.splits.values())

    @property
    def images(self) -> Mapping[str, Sequence[File]]:
        return {split: files.images for split, files in self.splits.items()}

    def scan(self, classes: tuple[str, ...], pmap: Map) -> Scan:
        rows: dict[str, list[Row]] = {}
        unlabelled: dict[str, list[File]] = {}
        faults: list[Fault] = []
        for split, files in self.splits.items():
            found, folder = _by_id(files), SPLITS[split]
            rows[split], unlabelled[split] = [], []

            def fault(file: str, flaw: Flaw, split: str = split) -> None:
                faults.append(Fault(split, _escape_name(file), flaw))

            for name in found.misnamed:
                fault(name, Flaw(Kind.NAME))
            for id_ in found.images.keys() - found.annotations:
                for image in found.images[id_]:
                    fault(image.name, Flaw(Kind.NO_ANNOTATION))
            for id_ in found.annotations - found.images.keys():
                fault(f"{folder}/annotations/{id_}{_ANNOTATION}", Flaw(Kind.NO_IMAGE))

            ids = sorted(found.annotations & found.images.keys())
            names = [f"{folder}/annotations/{id_}{_ANNOTATION}" for id_ in ids]
            tasks = [
                (self.location, names[start : start + _ANNOTATIONS_PER_TASK], classes)
                for start in range(0, len(names), _ANNOTATIONS_PER_TASK)
            ]
            annotations = (annotation for part in pmap(_read_annotations, tasks) for annotation in part)
            for id_, name, annotation in zip(ids, names, annotations, strict=True):
                images = found.images[id_]
                if len(images) > 1:
                    several = ", ".join(_file_name(image.name) for image in images)
                    fault(images[0].name, Flaw(Kind.SEVERAL_IMAGES, several))
                if isinstance(annotation, Flaw):
                    fault(name, annotation)
                if isinstance(annotation, Flaw) or len(images) > 1:
                    unlabelled[split] += images
                else:
                    rows[split].append(Row(id_, images[0], annotation))
        return Scan(rows, unlabelled, sorted(faults, key=lambda f: (f.split, f.file)))

    def quick_fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split, folder in SPLITS.items():
            for sub, kept in (("annotations", self.splits[split].annotations), ("images", self.splits[split].images)):
                digest.update(f"{folder}/{sub}\0{len(kept)}\0".encode())
                for file in kept:
                    digest.update(os.fsencode(file.name) + f"\0{self.location.stamp(file)}\0".encode())
        return digest.hexdigest()

    def row_of(self, fault: Fault) -> str:
        return _annotation_id(fault.file) or _image_id(fault.file)

    def empty_split_fault(self, split: str) -> str:
        return f"{self.location / SPLITS[split]}: no valid row"

    def advice(self, faults: Sequence[Fault], classes: tuple[str, ...]) -> Mapping[Kind, str]:
        return {
            Kind.COUNT: _how_to_name_classes(faults, classes),
            Kind.NO_IMAGE: "the image's name is the id with .jpg, .jpeg, .png or .bmp",
            Kind.NO_ANNOTATION: f"the annotation's name is the id with {_ANNOTATION}",
            Kind.SEVERAL_IMAGES: "keep one of them",
        }


def check_layout(root: Location) -> None:
    """Check that a folder has the layout of AffectNetFused.

    Raises:
        UserError: it has another layout.
    """
    found = {f"{folder}/{sub}" for folder in SPLITS.values() for sub in root.list_folders(folder)}
    wanted = [f"{folder}/{sub}" for folder in SPLITS.values() for sub in ("annotations", "images")]
    missing = [name for name in wanted if name not in found]
    if missing and not root.exists():
        raise UserError(f"{root}: no such folder; name an existing one")
    if missing:
        raise UserError(
            f"{root}: not a folder in the layout of AffectNetFused, which has {', '.join(wanted)};"
            f" missing {'is' if len(missing) == 1 else 'are'} {', '.join(missing)}"
            + ("; did you mean the folder above it?" if root.name in SPLITS.values() else "")
        )


def list_faces(root: Location) -> FaceFolder:
    """List the files of a folder.

    Raises:
        UserError: the folder does not have the layout of AffectNetFused.
    """
    check_layout(root)
    return FaceFolder(
        root,
        {
            split: SplitFiles(
                sorted(file for file in root.list_files(f"{folder}/annotations") if _annotation_id(file.name)),
                sorted(file for file in root.list_files(f"{folder}/images") if _image_id(file.name)),
            )
            for split, folder in SPLITS.items()
        },
    )


def parse_annotation(raw: bytes, classes: tuple[str, ...] = EMOTIONS) -> tuple[float, ...] | Flaw:
    """Parse the K probabilities of an annotation file, exactly as written, or return their fault."""
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Flaw(Kind.NOT_UTF8, f"at byte {error.start}")
    if not text:
        return Flaw(Kind.EMPTY)
    fields = text.split(",")
    found = [parse_number(field) for field in fields]
    values = tuple(value for value in found if value is not None)
    if len(values) < len(found):
        return Flaw(Kind.TEXT, shown(fields[found.index(None)]))
    if len(values) != len(classes):
        return Flaw(Kind.COUNT, f"{len(values)} values for {len(classes)} classes", values=len(values))
    return parse_probabilities(values, classes)


def _how_to_name_classes(faults: Sequence[Fault], classes: tuple[str, ...]) -> str:
    """Return advice for annotations whose number of values differs from the number of classes."""
    counts = {fault.flaw.values for fault in faults if fault.flaw.kind == Kind.COUNT}
    expected = f"expected one value for each of the {len(classes)} classes {', '.join(classes)}"
    number = counts.pop() if len(counts) == 1 else None
    if number is None or number < 2:
        return f"{expected}: if the folder was made with another list of classes, set data.classes to it"
    names = f"A,B,… ({number} names)"
    return (
        f"{expected}: the public annotations of AffectNetFused hold 15 values; to use {number} values, name their "
        f"classes in the order of the values, by `pack --classes {names}`, by `data.classes: [{names}]` in the search "
        f"space, or by `train --set data.classes=[{names}]`"
    )


@dataclass(frozen=True)
class _Ids:
    annotations: set[str]
    images: dict[str, list[File]]
    misnamed: list[str]  # files


def _by_id(files: SplitFiles) -> _Ids:
    found = _Ids(set(), defaultdict(list), [])
    for file in (*files.annotations, *files.images):
        if not _is_utf8(file.name):
            found.misnamed.append(file.name)
        elif id_ := _annotation_id(file.name):
            found.annotations.add(id_)
        else:
            found.images[_image_id(file.name)].append(file)
    return found


# Hidden files are never rows: unpacking on a Mac leaves a `._5.jpg` beside each `5.jpg`.


def _annotation_id(file: str) -> str:
    name = _file_name(file)
    return "" if name.startswith(".") or not name.endswith(_ANNOTATION) else name.removesuffix(_ANNOTATION)


def _image_id(file: str) -> str:
    name = _file_name(file)
    stem, _, suffix = name.rpartition(".")
    return "" if name.startswith(".") or suffix.lower() not in _IMAGE_SUFFIXES else stem


def _file_name(file: str) -> str:
    return file.rpartition("/")[2]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escape_name(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _read_annotations(task: tuple[Location, Sequence[str], tuple[str, ...]]) -> list[tuple[float, ...] | Flaw]:
    root, names, classes = task
    return [
        Flaw(Kind.UNREADABLE, content.strerror or str(content))
        if isinstance(content, OSError)
        else parse_annotation(content, classes)
        for content in root.read_all(names)
    ]
