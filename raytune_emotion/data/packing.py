"""Packing: every picture of a folder is checked and decoded, once, into shards.

In a folder, tasks write the pixels of some rows each into shards that are there but for these. An attempt that was
killed has left shards, and `.done` beside them: of each task that was done, the digests of the pixels, and a key of the
files they were decoded from. What still is as these say is not decoded again.

At a URI, or by several machines, a task makes whole shards, puts each there, and then `.<split>-<first row>.done`,
which says what they hold and were made of. Another attempt takes them as they are.
"""

import contextlib
import csv
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from raytune_emotion import mirror
from raytune_emotion.data import affectnet, shards
from raytune_emotion.data.affectnet import Fault, Kind, Row, Scan
from raytune_emotion.data.images import DIGEST_BYTES, DecodeTask, Region, decode_images, files_key, write_images
from raytune_emotion.data.pool import Map
from raytune_emotion.data.shards import Manifest, ShardEntry, SplitEntry
from raytune_emotion.data.source import Source, below, shown
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.files import write_text

#: What to do about a disk that is full.
MORE_ROOM = "choose a disk with room (for the cache: XDG_CACHE_HOME) or a smaller image size"

_DONE = ".done"
#: What an attempt that was killed may have left at a URI.
_LEFT = re.compile(r"((train|val)-\d+\.arrow|(\.(train|val)-\d+)?\.done)(\.part)?")
_SHARD_BYTES = 128 * 2**20  # pixels in a shard, at most, unless one task has more
_TASK_ROWS = 128  # a power of two
_TRIED_PX = 32

#: Of each row of a split the digests of its pixels at every size, or what is wrong with its picture.
_Digests = dict[str, list[bytes | str]]


def pack_into(
    folders: Mapping[int, Path], source: Source, classes: tuple[str, ...], *, skip_bad: bool, pmap: Map
) -> None:
    """Writes the stores of a folder, one for each image size in px, all from one pass over its files.

    The folders have in them what an earlier attempt has left there. The tasks run on this machine.

    Raises:
        UserError: a sentence for every kind of fault; the disk is too small.
        Breakdown: the source is at a URI that fails again and again.
    """
    with progress() as bars:
        scan = _scan(source, classes, pmap, bars)
        for size, folder in folders.items():
            check_space(folder, sum(map(len, scan.rows.values())) * _row_bytes(size))
        with contextlib.ExitStack() as stack:
            stores = [stack.enter_context(_begun(folder, size, scan.rows)) for size, folder in folders.items()]
            digests = _decode_all(source, scan.rows, stores, pmap, bars)
        content = _checked(source, classes, scan, digests, pmap, bars, skip_bad=skip_bad)
    for i, store in enumerate(stores):
        entries: dict[str, list[ShardEntry]] = {}
        for split, drafts in store.drafts.items():
            own = [_cut(digest, i) for digest in digests[split]]
            most = _shard_rows(store.image_size)
            closed = [_closed(draft, own[n * most : (n + 1) * most]) for n, draft in enumerate(drafts)]
            entries[split] = [entry for entry in closed if entry is not None]
            for entry in entries[split]:
                with (store.folder / entry.file).open("rb") as file:
                    os.fsync(file.fileno())
        (store.folder / _DONE).unlink()
        _describe(store.folder, content, i, store.image_size, entries)


def pack_elsewhere(
    places: Mapping[int, Path | str], source: Source, classes: tuple[str, ...], *, skip_bad: bool, pmap: Map
) -> None:
    """The same by tasks that may run on any machine, into URIs, or folders that all machines have under one path.

    Raises:
        UserError: a sentence for every kind of fault.
        Breakdown: a machine has not one of the folders; a URI fails again and again.
    """
    uris = {size: _uri(places[size]) for size in sorted(places)}
    pmap = _having([place for place in (source, *places.values()) if isinstance(place, Path)], pmap)
    digests: _Digests = {}
    entries: dict[int, dict[str, list[ShardEntry]]] = {size: {} for size in uris}
    with progress() as bars:
        scan = _scan(source, classes, pmap, bars)
        bar = bars.add_task("packing images", total=sum(map(len, scan.rows.values())))
        blocks = [block for split, rows in scan.rows.items() for block in _blocks(source, split, rows, uris)]
        for block, made in zip(blocks, pmap(_make_shards, blocks), strict=True):
            bars.advance(bar, len(block.rows))
            digests.setdefault(block.split, []).extend(made.digests)
            for size in uris:
                entries[size].setdefault(block.split, []).extend(made.entries[size])
        try:
            content = _checked(source, classes, scan, digests, pmap, bars, skip_bad=skip_bad)
        except UserError:
            for uri in uris.values():
                _tidy(uri)
            raise
    for i, (size, uri) in enumerate(uris.items()):
        with tempfile.TemporaryDirectory() as scratch:
            _describe(Path(scratch), content, i, size, entries[size])
            mirror.push(Path(scratch), uri, [*([shards.REJECTED] if skip_bad else []), shards.MANIFEST])
        _tidy(uri, kept={entry.file for own in entries[size].values() for entry in own})


def check_space(folder: Path, needed: int) -> None:
    """Whether the disk has room for so many bytes, some of which may lie in the folder already.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free + sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    if needed > free:
        raise UserError(
            f"{folder.parent}: the store takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {MORE_ROOM}"
        )


# What both ways share


def _scan(source: Source, classes: tuple[str, ...], pmap: Map, bars: Progress) -> Scan:
    """The folder's rows, of which each split has some."""
    scan = affectnet.scan(source, classes, _counted(pmap, bars, "reading annotations"))
    _refuse_empty(source, {split: len(rows) for split, rows in scan.rows.items()}, scan.faults, classes)
    return scan


@dataclass(frozen=True)
class _Content:
    """What the stores of a folder hold, and do not."""

    classes: tuple[str, ...]
    rows: Mapping[str, Sequence[Row]]  # by split
    digests: _Digests
    faults: Sequence[Fault]
    skip_bad: bool


def _checked(
    source: Source,
    classes: tuple[str, ...],
    scan: Scan,
    digests: _Digests,
    pmap: Map,
    bars: Progress,
    *,
    skip_bad: bool,
) -> _Content:
    """What is packed, if it may be. Pictures without a good annotation are tried too: all faults are told at once."""
    found = [
        (split, row.image.name, digest)
        for split, rows in scan.rows.items()
        for row, digest in zip(rows, digests[split], strict=True)
    ]
    for split, files in scan.unlabelled.items():
        parts = (files[start : start + _TASK_ROWS] for start in range(0, len(files), _TASK_ROWS))
        tasks = [DecodeTask(source, part, (_TRIED_PX,), ()) for part in parts]
        tried = _counted(pmap, bars, "trying other images")(write_images, tasks) if tasks else []
        results = (digest for part in tried for digest in part)
        found += [(split, file.name, digest) for file, digest in zip(files, results, strict=True)]
    undecodable = [Fault(split, name, Kind.UNDECODABLE, what) for split, name, what in found if isinstance(what, str)]
    faults = sorted([*scan.faults, *undecodable], key=lambda f: (f.split, f.file, f.kind.value))
    if faults and not skip_bad:
        raise UserError(
            [
                *affectnet.sentences(source, faults, classes),
                f"{shown(source)}: nothing is packed while files are at fault; mend them, or set them aside with"
                " --skip-bad",
            ]
        )
    good = {split: sum(isinstance(digest, bytes) for digest in own) for split, own in digests.items()}
    _refuse_empty(source, good, faults, classes)
    return _Content(classes, scan.rows, digests, faults, skip_bad)


def _describe(
    folder: Path, content: _Content, i: int, image_size: int, entries: Mapping[Any, Sequence[ShardEntry]]
) -> None:
    """Writes all of a store but its shards; it is that of the i-th size."""
    if content.skip_bad:
        with (folder / shards.REJECTED).open("w", encoding="utf-8", newline="") as file:
            rejected = ((f.split, f.file, f.reason) for f in content.faults)
            csv.writer(file).writerows([("split", "file", "reason"), *rejected])
    held = (
        (split, row.id, pixels, row.probs)
        for split, rows in content.rows.items()
        for row, digest in zip(rows, content.digests[split], strict=True)
        if (pixels := _cut(digest, i))
    )
    manifest = Manifest(
        format="raytune_emotion.store",
        version=shards.VERSION,
        fingerprint=shards.fingerprint(image_size, content.classes, held),
        image_size=image_size,
        classes=content.classes,
        rejected=len({(fault.split, fault.id) for fault in content.faults}),
        splits={
            split: SplitEntry(rows=sum(entry.rows for entry in own), shards=tuple(own))
            for split, own in entries.items()
        },
    )
    write_text(folder / shards.MANIFEST, manifest.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True)
class _Draft:
    """A shard that is being made."""

    path: Path
    image_size: int
    pixels: int  # where in the file they begin, bytes

    def region(self, row: int, done: tuple[str, bytes] | None = None) -> Region:
        return Region(str(self.path), self.pixels + row * _row_bytes(self.image_size), done)


def _draft(folder: Path, split: str, number: int, rows: Sequence[Row], image_size: int) -> _Draft:
    """A shard but for its pixels; those that are there stay."""
    path, prob_NK = folder / f"{split}-{number:05d}.arrow", np.array([row.probs for row in rows], np.float32)
    return _Draft(path, image_size, shards.begin_shard(path, [row.id for row in rows], prob_NK, image_size))


def _closed(draft: _Draft, digests: Sequence[bytes]) -> ShardEntry | None:
    """Leaves the rows at fault out of a shard that has its pixels. Where all are, there is none."""
    good = list(map(bool, digests))
    if not all(good):
        shards.keep_rows(draft.path, good)
    if not any(good):
        return None
    return ShardEntry(file=draft.path.name, rows=sum(good), bytes=draft.path.stat().st_size)


def _cut(digest: bytes | str, i: int) -> bytes:
    """What of a row's digests is that of the i-th size; empty for a row at fault."""
    return digest[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] if isinstance(digest, bytes) else b""


def _refuse_empty(source: Source, good: Mapping[str, int], faults: Sequence[Fault], classes: tuple[str, ...]) -> None:
    if empty := [affectnet.SPLITS[split] for split, rows in good.items() if not rows]:
        told = affectnet.sentences(source, faults, classes)
        raise UserError([*told, *(f"{shown(below(source, name))}: not one good row" for name in empty)])


def _shard_rows(image_size: int) -> int:
    """A power of two, so that a shard is of whole tasks, and of whole shards of every larger size."""
    return max(_TASK_ROWS, 1 << (_SHARD_BYTES // _row_bytes(image_size)).bit_length() >> 1)


def _row_bytes(image_size: int) -> int:
    return image_size * image_size * 3


# In a folder


@dataclass(frozen=True)
class _Begun:
    """A store that is being made."""

    folder: Path
    image_size: int
    drafts: Mapping[str, Sequence[_Draft]]  # by split
    before: Mapping[tuple[str, int], tuple[str, bytes]]  # what an earlier attempt has done; see `Region`
    done: TextIO

    def region(self, split: str, start: int, count: int) -> Region:
        shard, row = divmod(start, _shard_rows(self.image_size))
        before = self.before.get((split, start))
        done = before if before is not None and len(before[1]) == count * DIGEST_BYTES else None
        return self.drafts[split][shard].region(row, done)

    def note(self, split: str, start: int, key: str, digests: Sequence[bytes]) -> None:
        if all(digests):
            self.done.write(f"{split} {start} {key} {b''.join(digests).hex()}\n")
            self.done.flush()


@contextlib.contextmanager
def _begun(folder: Path, image_size: int, rows: Mapping[str, Sequence[Row]]) -> Iterator[_Begun]:
    """A store but for its pixels; those that an earlier attempt has left are as they were."""
    most = _shard_rows(image_size)
    drafts = {
        split: [
            _draft(folder, split, number, own[start : start + most], image_size)
            for number, start in enumerate(range(0, len(own), most))
        ]
        for split, own in rows.items()
    }
    ours = {draft.path for own in drafts.values() for draft in own} | {folder / _DONE}
    for file in folder.iterdir():
        if file not in ours:
            file.unlink()
    before = _read_done(folder / _DONE)
    with (folder / _DONE).open("a", encoding="ascii") as done:
        done.write("\n")  # the last line may have been cut short
        yield _Begun(folder, image_size, drafts, before, done)


def _read_done(file: Path) -> dict[tuple[str, int], tuple[str, bytes]]:
    before = {}
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut short
                split, start, key, digests = line.split()
                before[split, int(start)] = (key, bytes.fromhex(digests))
    return before


def _decode_all(
    source: Source, rows: Mapping[str, Sequence[Row]], stores: Sequence[_Begun], pmap: Map, bars: Progress
) -> _Digests:
    """Fills the stores with pixels."""
    parts = [(split, start) for split, own in rows.items() for start in range(0, len(own), _TASK_ROWS)]
    tasks = []
    for split, start in parts:
        files = [row.image for row in rows[split][start : start + _TASK_ROWS]]
        into = tuple(store.region(split, start, len(files)) for store in stores)
        tasks.append(DecodeTask(source, files, tuple(store.image_size for store in stores), into))
    bar = bars.add_task("packing images", total=sum(map(len, rows.values())))
    digests: _Digests = {split: [] for split in rows}
    for (split, start), decoded in zip(parts, pmap(decode_images, tasks), strict=True):
        bars.advance(bar, len(decoded.digests))
        digests[split] += decoded.digests
        for i, store in enumerate(stores):
            store.note(split, start, decoded.key, [_cut(digest, i) for digest in decoded.digests])
    return digests


# Elsewhere


@dataclass(frozen=True)
class _Block:
    """Rows that make whole shards at every size."""

    source: Source
    split: str
    start: int  # of the split's rows
    rows: Sequence[Row]
    uris: Mapping[int, str]  # by image size

    def key(self) -> str:
        """Another one where anything is that the shards are made of."""
        files = files_key(self.source, [row.image for row in self.rows])
        made_of = [(row.id, row.probs) for row in self.rows], list(self.uris), files
        return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Made:
    digests: Sequence[bytes | str]
    entries: Mapping[int, Sequence[ShardEntry]]  # by image size


class _Record(BaseModel):
    """Of a block without a row at fault."""

    key: str
    digests: str  # in hexadecimal digits
    entries: dict[int, list[ShardEntry]]


def _blocks(source: Source, split: str, rows: Sequence[Row], uris: Mapping[int, str]) -> Iterator[_Block]:
    step = max(map(_shard_rows, uris))
    for start in range(0, len(rows), step):
        yield _Block(source, split, start, rows[start : start + step], uris)


def _make_shards(block: _Block) -> _Made:
    """Packs a block, unless an earlier attempt has."""
    key, record, first = block.key(), f".{block.split}-{block.start:08d}.done", next(iter(block.uris.values()))
    if (made := _made_before(block, mirror.read(first, record), key)) is not None:
        return made
    digests: list[bytes | str] = []
    entries: dict[int, list[ShardEntry]] = {size: [] for size in block.uris}
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        folders = {size: Path(scratch, str(size)) for size in block.uris}
        drafts: dict[int, _Draft] = {}
        for start in range(0, len(block.rows), _TASK_ROWS):
            for size, folder in folders.items():
                if start % (most := _shard_rows(size)) == 0:
                    folder.mkdir(exist_ok=True)
                    own = block.rows[start : start + most]
                    drafts[size] = _draft(folder, block.split, (block.start + start) // most, own, size)
            files = [row.image for row in block.rows[start : start + _TASK_ROWS]]
            into = tuple(draft.region(start % _shard_rows(size)) for size, draft in drafts.items())
            digests += write_images(DecodeTask(block.source, files, tuple(block.uris), into))
            for i, (size, draft) in enumerate(drafts.items()):
                if len(digests) % (most := _shard_rows(size)) and len(digests) < len(block.rows):
                    continue
                entry = _closed(draft, [_cut(digest, i) for digest in digests[start // most * most :]])
                if entry is not None:
                    mirror.push(folders[size], block.uris[size], [entry.file])
                    draft.path.unlink()
                    entries[size].append(entry)
        good = [digest for digest in digests if isinstance(digest, bytes)]
        if len(good) == len(digests):
            text = _Record(key=key, digests=b"".join(good).hex(), entries=entries).model_dump_json()
            write_text(Path(scratch, record), text)
            mirror.push(Path(scratch), first, [record])
    return _Made(digests, entries)


def _made_before(block: _Block, raw: bytes | None, key: str) -> _Made | None:
    """What the record of an earlier attempt says, if its shards are those of the block, and are there."""
    with contextlib.suppress(ValidationError):
        found = _Record.model_validate_json(raw or b"")
        if found.key == key and all(
            mirror.sizes(uri, [entry.file for entry in found.entries[size]])
            == [entry.bytes for entry in found.entries[size]]
            for size, uri in block.uris.items()
        ):
            whole, step = bytes.fromhex(found.digests), DIGEST_BYTES * len(block.uris)
            return _Made([whole[start : start + step] for start in range(0, len(whole), step)], found.entries)
    return None


def _having(folders: Sequence[Path], pmap: Map) -> Map:
    """The same map, whose tasks break off on a machine that has not the folders."""
    return lambda function, tasks: pmap(_look_and_run, ((folders, function, task) for task in tasks))


def _look_and_run(task: tuple[Sequence[Path], Callable[[Any], Any], Any]) -> Any:
    folders, function, own = task
    for folder in folders:
        if not folder.is_dir():
            raise Breakdown(
                f"{folder}: is not there on {socket.gethostname()}; share it under this path with every node, or have"
                " SRC and DEST at URIs"
            )
    return function(own)


def _uri(place: Path | str) -> str:
    return place if isinstance(place, str) else place.absolute().as_uri()


def _tidy(uri: str, kept: Collection[str] = ()) -> None:
    """Deletes what attempts have left at a URI, but for files of the store."""
    names = [info.base_name for info in mirror.listed(uri)]
    mirror.delete(uri, [name for name in names if _LEFT.fullmatch(name) and name not in kept])


# Progress


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f}/s")


def progress() -> Progress:
    """Bars with rate and time left, where standard error is a terminal."""
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _counted(pmap: Map, bars: Progress, what: str) -> Map:
    """The same map, whose results (lists) are counted on a bar."""
    bar = bars.add_task(what, total=None)

    def counted(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for part in pmap(function, tasks):
            bars.advance(bar, len(part))
            yield part

    return counted
