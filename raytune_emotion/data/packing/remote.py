"""Packing at a URI, or by several machines: a task makes whole shards of a block of rows.

It puts each shard there, and then `.<split>-<first row>.done`, which says what they hold and were made of. Another
attempt takes them as they are.
"""

import contextlib
import hashlib
import re
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from raytune_emotion.data import shard_format
from raytune_emotion.data.affectnet import Row
from raytune_emotion.data.decode import DIGEST_BYTES, DecodeTask, files_key, write_images
from raytune_emotion.data.packing.shard_writer import (
    TASK_ROWS,
    Digests,
    Unfilled,
    begin_unfilled,
    close_shard,
    cut,
    shard_rows,
)
from raytune_emotion.data.packing.validate import checked, describe, read_rows
from raytune_emotion.data.parallel import Map
from raytune_emotion.data.progress import progress
from raytune_emotion.data.shard_format import ShardEntry
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Source

#: What an attempt that was killed may have left at a URI.
_LEFT = re.compile(r"((train|val)-\d+\.arrow|(\.(train|val)-\d+)?\.done)(\.part)?")


def pack_elsewhere(
    places: Mapping[int, Path | str], source: Source, classes: tuple[str, ...], *, skip_bad: bool, pmap: Map
) -> None:
    """Writes the stores of a folder, one for each image size in px, all from one pass over its files.

    They come at URIs, or in folders that all machines have under one path: the tasks may run on any machine.

    Raises:
        UserError: a sentence for every kind of fault.
        Breakdown: a machine has not one of the folders; a URI fails again and again.
    """
    uris = {size: _uri(places[size]) for size in sorted(places)}
    pmap = _having([place for place in (source, *places.values()) if isinstance(place, Path)], pmap)
    digests: Digests = {}
    entries: dict[int, dict[str, list[ShardEntry]]] = {size: {} for size in uris}
    with progress() as bars:
        scan = read_rows(source, classes, pmap, bars)
        bar = bars.add_task("packing images", total=sum(map(len, scan.rows.values())))
        blocks = [block for split, rows in scan.rows.items() for block in _blocks(source, split, rows, uris)]
        for block, made in zip(blocks, pmap(_make_shards, blocks), strict=True):
            bars.advance(bar, len(block.rows))
            digests.setdefault(block.split, []).extend(made.digests)
            for size in uris:
                entries[size].setdefault(block.split, []).extend(made.entries[size])
        try:
            content = checked(source, classes, scan, digests, pmap, bars, skip_bad=skip_bad)
        except UserError:
            for uri in uris.values():
                _tidy(uri)
            raise
    for i, (size, uri) in enumerate(uris.items()):
        with tempfile.TemporaryDirectory() as scratch:
            describe(Path(scratch), content, i, size, entries[size])
            remote.push(Path(scratch), uri, [*([shard_format.REJECTED] if skip_bad else []), shard_format.MANIFEST])
        _tidy(uri, kept={entry.file for own in entries[size].values() for entry in own})


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
    step = max(map(shard_rows, uris))
    for start in range(0, len(rows), step):
        yield _Block(source, split, start, rows[start : start + step], uris)


def _make_shards(block: _Block) -> _Made:
    """Packs a block, unless an earlier attempt has."""
    key, record, first = block.key(), f".{block.split}-{block.start:08d}.done", next(iter(block.uris.values()))
    if (made := _made_before(block, remote.read(first, record), key)) is not None:
        return made
    digests: list[bytes | str] = []
    entries: dict[int, list[ShardEntry]] = {size: [] for size in block.uris}
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        folders = {size: Path(scratch, str(size)) for size in block.uris}
        unfilled: dict[int, Unfilled] = {}
        for start in range(0, len(block.rows), TASK_ROWS):
            for size, folder in folders.items():
                if start % (most := shard_rows(size)) == 0:
                    folder.mkdir(exist_ok=True)
                    own = block.rows[start : start + most]
                    unfilled[size] = begin_unfilled(folder, block.split, (block.start + start) // most, own, size)
            files = [row.image for row in block.rows[start : start + TASK_ROWS]]
            into = tuple(shard.region(start % shard_rows(size)) for size, shard in unfilled.items())
            digests += write_images(DecodeTask(block.source, files, tuple(block.uris), into))
            for i, (size, shard) in enumerate(unfilled.items()):
                if len(digests) % (most := shard_rows(size)) and len(digests) < len(block.rows):
                    continue
                entry = close_shard(shard, [cut(digest, i) for digest in digests[start // most * most :]])
                if entry is not None:
                    remote.push(folders[size], block.uris[size], [entry.file])
                    shard.path.unlink()
                    entries[size].append(entry)
        good = [digest for digest in digests if isinstance(digest, bytes)]
        if len(good) == len(digests):
            text = _Record(key=key, digests=b"".join(good).hex(), entries=entries).model_dump_json()
            write_text(Path(scratch, record), text)
            remote.push(Path(scratch), first, [record])
    return _Made(digests, entries)


def _made_before(block: _Block, raw: bytes | None, key: str) -> _Made | None:
    """What the record of an earlier attempt says, if its shards are those of the block, and are there."""
    with contextlib.suppress(ValidationError):
        found = _Record.model_validate_json(raw or b"")
        if found.key == key and all(
            remote.sizes(uri, [entry.file for entry in found.entries[size]])
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
    names = [info.base_name for info in remote.listed(uri)]
    remote.delete(uri, [name for name in names if _LEFT.fullmatch(name) and name not in kept])
