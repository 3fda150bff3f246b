"""Read a table of faces: a CSV or Parquet file with the paths of images and a number for each class.

    image,split,happy,sad,neutral
    faces/1.jpg,train,0.7,0.1,0.2
    faces/2.jpg,val,5,1,4

Paths are relative to the table. The numbers of a row are probabilities or, in a table of whole numbers, votes. Without
a column `split`, a hash of the path decides the split. Rows are checked in the same way as those of a folder.
"""

import csv
import hashlib
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_emotion.data.faces import Faces, Fault, Flaw, Kind, Row, Scan, parse_number, parse_probabilities, shown
from raytune_emotion.data.parallel import Map
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import OF_THE_FILE, File, Location
from raytune_emotion.terminal import count

_ENDINGS = (".csv", ".parquet")
#: Names of the column of paths.
_IMAGE = ("image", "path", "file", "filename")
_SPLIT = "split"
#: Split of each word in a column `split`. Rows of `test` are left out.
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: Pattern of the names that pandas gives to the columns of an index without a name.
_INDEX = r"__index_level_\d+__"
#: Share of the rows that become validation rows if there is no column `split`.
_VALIDATION = 0.1


@dataclass(frozen=True)
class _Line:
    """A row of a table, unchanged."""

    number: int  # number of the line in a CSV file, of the row in Parquet; from 1
    path: str
    split: str | None  # None: there is no such column
    cells: Sequence[Any]  # values of the classes: text, numbers or None
    flaw: Flaw | None = None  # fault of the row as a whole


@dataclass(frozen=True)
class FaceTable(Faces):
    """A table of faces, and the list of the images beside it."""

    location: Location  # the folder of the table
    file: str
    columns: tuple[str, ...]  # names of the columns of classes
    lines: Sequence[_Line]
    there: Mapping[str, File]  # existing files in the folders that the paths name

    @property
    def source(self) -> str:
        return str(self.location / self.file)

    @property
    def own_classes(self) -> tuple[str, ...]:
        return self.columns

    @property
    def annotations(self) -> int:
        return len(self.lines)

    @cached_property
    def images(self) -> Mapping[str, Sequence[File]]:
        found: dict[str, dict[str, File]] = {"train": {}, "val": {}}
        for line in self.lines:
            split = self._split_of(line)
            if split in found and line.path in self.there:
                found[split][line.path] = self.there[line.path]
        return {split: [files[path] for path in sorted(files)] for split, files in found.items()}

    @property
    def _splits_by_hash(self) -> bool:
        return all(line.split is None for line in self.lines)

    @cached_property
    def _first_lines(self) -> Mapping[str, int]:
        """Return the first row of each path. Rows of `test` are left out."""
        found: dict[str, int] = {}
        for line in self.lines:
            if self._split_of(line) != "test":
                found.setdefault(line.path, line.number)
        return found

    @cached_property
    def votes(self) -> bool:
        """Tell whether the numbers are votes: all are whole, and at least one row has a sum above 1."""
        totals = []
        for line in self.lines:
            values = [value for cell in line.cells if (value := parse_number(cell)) is not None]
            # A value that is not finite is a fault of its row, and is ignored here.
            if any(value % 1 for value in values if math.isfinite(value)):
                return False
            totals.append(sum(values))
        return any(total > 1 for total in totals)

    def notes(self) -> list[str]:
        noted = [f"{self.source}: the numbers are votes; each row is divided by its sum"] if self.votes else []
        splits = [self._split_of(line) for line in self.lines]
        if self._splits_by_hash:
            share = f"about {_VALIDATION:.0%} of the rows, chosen by a hash of the path, are used for validation"
            noted.append(
                f"{self.source}: has no column {_SPLIT}; {share} ({splits.count('val')} of {len(splits)}); if several "
                f"images show one person or come from one video, add the column, so that none is on both sides"
            )
        if splits.count("test"):
            noted.append(f"{self.source}: leaving out {count(splits.count('test'), 'row')} of the split test")
        return noted

    def row_of(self, fault: Fault) -> str:
        # Several rows may have no path, or the same one. A fault without a line concerns an image, and thus the
        # first row with its path.
        return f"line {self._first_lines[fault.file] if fault.line is None else fault.line}"

    def empty_split_fault(self, split: str) -> str:
        advice = f"; add a column {_SPLIT}, with train or val in each row" if self._splits_by_hash else ""
        return f"{self.source}, split {split}: no valid row{advice}"

    def quick_fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.file, self.columns)).encode())
        for line in self.lines:
            stamp = self.location.stamp(self.there[line.path]) if line.path in self.there else ""
            digest.update(f"{line!r}\0{stamp}\0".encode(errors="backslashreplace"))
        return digest.hexdigest()

    def scan(self, classes: tuple[str, ...], pmap: Map) -> Scan:
        if sorted(classes) != sorted(self.columns):
            raise UserError(
                f"{self.source}: the columns are the classes {', '.join(self.columns)}, but the classes "
                f"{', '.join(classes)} are given; leave the classes out to use those of the table"
            )
        order = [self.columns.index(name) for name in classes]
        rows: dict[str, list[Row]] = {"train": [], "val": []}
        unlabelled: dict[str, list[File]] = {"train": [], "val": []}
        faults: list[Fault] = []
        seen: set[str] = set()
        for line in self.lines:
            split = self._split_of(line)
            if split == "test":
                continue
            found = self._misplaced(line, seen) or self._parse(line.cells, order, classes)
            if isinstance(found, Flaw):
                faults.append(Fault(split, line.path or "(no path)", found, line.number))
                if split in unlabelled and line.path in self.there and line.path not in seen:
                    unlabelled[split].append(self.there[line.path])
            else:
                rows[split].append(Row(line.path, self.there[line.path], found))
            seen.add(line.path)
        ordered = {split: sorted(own, key=lambda row: row.id) for split, own in rows.items()}
        return Scan(ordered, unlabelled, sorted(faults, key=lambda f: (f.split, f.file)))

    def _split_of(self, line: _Line) -> str:
        if line.split is not None:
            return _SPLITS.get(line.split.strip().lower(), "")
        number = int.from_bytes(hashlib.sha256(line.path.encode(errors="backslashreplace")).digest()[:8], "big")
        return "val" if number < _VALIDATION * 2**64 else "train"

    def _misplaced(self, line: _Line, seen: Collection[str]) -> Flaw | None:
        """Return the fault of a row apart from its numbers; None if there is none."""
        if line.flaw is not None:
            return line.flaw
        if _is_outside(line.path):
            return Flaw(Kind.OUTSIDE)
        if line.path in seen:
            return Flaw(Kind.TWICE)
        if self._split_of(line) not in ("train", "val"):
            return Flaw(Kind.SPLIT, repr(line.split))
        return None if line.path in self.there else Flaw(Kind.MISSING)

    def _parse(self, row: Sequence[Any], order: Sequence[int], classes: tuple[str, ...]) -> tuple[float, ...] | Flaw:
        cells = [row[k] for k in order]
        values = [parse_number(cell) for cell in cells]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return Flaw(Kind.TEXT, shown(cells[values.index(None)]))
        total = sum(known)
        if self.votes and min(known) >= 0 and all(map(math.isfinite, known)):
            if math.isinf(total):
                return Flaw(Kind.NOT_FINITE, "their sum")
            return tuple(value / total for value in known) if total else Flaw(Kind.NO_VOTES)
        return parse_probabilities(tuple(known), classes)


def is_table(place: Location) -> bool:
    """Tell by the extension whether a location is a table. For a link, the name of its target counts, too."""
    return _has_ending(place.typed_name) or _has_ending(place.name)


def list_table(place: Location) -> FaceTable:
    """Read a table, and list the images that its rows name.

    Raises:
        UserError: there is no such file, it is damaged, or it lacks the columns of a table of faces.
    """
    if not _has_ending(place.typed_name):
        place = place.follow_links()
    file = place.split_file()
    if file is None:
        if place.exists() and place.is_reachable():
            raise UserError(f"{place}: is a folder with the extension of a table; name a file, or rename the folder")
        raise UserError(f"{place}: no such file; name an existing one")
    folder, name = file
    raw = folder.read(name) or b""
    try:
        header, rows = _read_parquet(raw) if name.lower().endswith(".parquet") else _read_csv(raw)
    except (pa.ArrowException, csv.Error, OSError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{place}: cannot be read as a table ({what}); save it again") from error
    image, split, classes = _columns(place, header)
    kinds = {type(cells[image]) for _, cells in rows if image < len(cells)} - {str, type(None)}
    if kinds:
        held = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(
            f"{place}: the column {header[image]} must hold paths of images, found {held}; write the images as files"
        )
    lines = [_line(number, cells, header, image, split, classes) for number, cells in rows]
    if not lines:
        raise UserError(f"{place}: has no row below its header; name a table of faces")
    parents = {str(PurePosixPath(line.path).parent) for line in lines if not _is_outside(line.path)}
    there: dict[str, File] = {}
    for parent in sorted(parents):
        try:
            files = folder.list_files("" if parent == "." else parent)
        except OSError as error:
            if error.errno not in OF_THE_FILE:
                raise
            continue
        there |= {file.name: file for file in files}
    return FaceTable(folder, name, tuple(header[k] for k in classes), lines, there)


def _has_ending(name: str) -> bool:
    return name.lower().endswith(_ENDINGS)


def _columns(place: Location, header: Sequence[str]) -> tuple[int, int | None, list[int]]:
    """Return the positions of the columns of paths, splits and classes.

    Raises:
        UserError: columns are missing or named twice.
    """
    faults = []
    twice = sorted({name for name in header if header.count(name) > 1 or not name})
    if twice:
        faults.append(
            f"{place}: column names are empty or repeated: {', '.join(map(repr, twice))}; give each column its own name"
        )
    images = [k for k, name in enumerate(header) if name.lower() in _IMAGE]
    if len(images) != 1:
        found = f"has the columns {', '.join(header[:20])}; exactly one must be named image, for the paths of images"
        none = "has no header; the first line must name the columns, one of them image"
        faults.append(f"{place}: {found if header else none}")
    splits = [k for k, name in enumerate(header) if name.lower() == _SPLIT]
    if len(splits) > 1:
        faults.append(f"{place}: has several columns named {_SPLIT}, ignoring case; keep one")
    classes = [k for k in range(len(header)) if k not in (*images, *splits)]
    if not faults and len(classes) < 2:
        faults.append(f"{place}: has fewer than two classes; each column beside image and {_SPLIT} is one")
    if faults:
        raise UserError(faults)
    return images[0], splits[0] if splits else None, classes


def _line(
    number: int, cells: Sequence[Any], header: Sequence[str], image: int, split: int | None, classes: Sequence[int]
) -> _Line:
    if len(cells) != len(header):
        path = str(cells[image]) if image < len(cells) else ""
        return _Line(
            number,
            path,
            "" if split is not None else None,
            (),
            Flaw(Kind.CELLS, f"{len(cells)} cells for {len(header)} columns"),
        )
    path = "" if cells[image] is None else str(cells[image]).removeprefix("./")
    return _Line(number, path, None if split is None else str(cells[split]), tuple(cells[k] for k in classes))


def _read_csv(raw: bytes) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    lines = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
    header = [name.strip() for name in next(lines, [])]
    return header, [(lines.line_num, [*cells]) for cells in lines if cells]


def _read_parquet(raw: bytes) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    table = pq.read_table(pa.BufferReader(raw))
    # Leave out the index of a shuffled data frame, which pandas writes as columns.
    table = table.select([k for k, name in enumerate(table.column_names) if not re.fullmatch(_INDEX, name)])
    columns = [column.to_pylist() for column in table.columns]
    return list(table.column_names), [(n, list(cells)) for n, cells in enumerate(zip(*columns, strict=True), 1)]


def _is_outside(path: str) -> bool:
    """Tell whether a path points outside of the folder, or is not a path."""
    parts = path.split("/")
    return path.startswith("/") or "\0" in path or not {"", ".", ".."}.isdisjoint(parts)
