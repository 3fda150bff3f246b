"""Pack blocks of rows: each task writes whole shards at every size, and then a record of their sources.

The record, `.<split>-<first row>.done`, is beside the shards of the smallest size. A later attempt keeps the shards if
their record still matches the files. Tasks may run on any machine that can access the locations.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from raytune_emotion.data.decode import (
    DIGEST_BYTES,
    UndecodableImage,
    decode_at_sizes,
    files_key,
    ignore_decoder_warnings,
    picture_bytes,
    pixels_digest,
)
from raytune_emotion.data.faces import Row
from raytune_emotion.data.shard_format import ShardEntry, write_shard
from raytune_emotion.storage.locations import Location

#: Largest size of the pixels of a shard, bytes. A task holds a shard of each size in memory.
_SHARD_BYTES = 64 * 2**20
#: Smallest number of rows in a shard, as far as _SHARD_BYTES allows: fewer are not worth a task.
_LEAST_ROWS = 128
#: Number of shards of a split, for as many cores, from which on shards get more rows.
_ENOUGH_SHARDS = 32
#: Number of rows that are read at once.
_ROWS_READ = 128

#: Digests of a row's pixels at every size, or the fault of its picture.
Digest = bytes | str


@dataclass(frozen=True)
class Block:
    """Rows that make whole shards at every size."""

    source: Location
    split: str
    start: int  # number of its first row in the split
    rows: Sequence[Row]
    dests: Mapping[int, Location]  # by image size, px, the smallest first
    shard_rows: Mapping[int, int]  # by image size

    @property
    def record(self) -> str:
        return f".{self.split}-{self.start:08d}.done"

    def key(self) -> str:
        """Hash all sources of the shards."""
        files = files_key(self.source, [row.image for row in self.rows])
        made_of = [(row.id, row.probs) for row in self.rows], dict(self.shard_rows), files
        return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PackedBlock:
    digests: Sequence[Digest]
    entries: Mapping[int, Sequence[ShardEntry]]  # by image size
    was_read: bool = True  # False: a file could not be read; its permission may change, but not its time


class _Record(BaseModel):
    """Record of a block whose files could all be read."""

    key: str
    digests: str  # of the good rows, in hexadecimal digits
    faults: dict[int, str] = {}  # by the number of the row in the block
    entries: dict[int, list[ShardEntry]]


def digest_at_size(digest: Digest, i: int) -> bytes:
    """Return the digest of a row at the i-th size; an empty string for a faulty row."""
    return digest[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] if isinstance(digest, bytes) else b""


def shard_rows(image_size: int, rows: int) -> int:
    """Return the number of rows in a shard: a power of two, so that shards of several sizes nest."""
    most = 1 << max(1, _SHARD_BYTES // picture_bytes(image_size)).bit_length() - 1
    return min(most, max(_LEAST_ROWS, 1 << (max(1, rows // _ENOUGH_SHARDS) - 1).bit_length()))


def split_into_blocks(
    source: Location, split: str, rows: Sequence[Row], dests: Mapping[int, Location]
) -> Iterator[Block]:
    of_size = {size: shard_rows(size, len(rows)) for size in dests}
    step = max(of_size.values())
    for start in range(0, len(rows), step):
        yield Block(source, split, start, rows[start : start + step], dests, of_size)


def pack_block(block: Block) -> PackedBlock:
    """Pack a block, unless an earlier attempt has done it."""
    key, first = block.key(), next(iter(block.dests.values()))
    if (before := _read_record(block, first.read(block.record), key)) is not None:
        return before
    packed = _pack(block)
    if packed.was_read:
        good = b"".join(digest for digest in packed.digests if isinstance(digest, bytes))
        faults = {row: fault for row, fault in enumerate(packed.digests) if isinstance(fault, str)}
        entries = {size: [*own] for size, own in packed.entries.items()}
        record = _Record(key=key, digests=good.hex(), faults=faults, entries=entries)
        with first.write(block.record) as path:
            path.write_text(record.model_dump_json(), encoding="utf-8")
    return packed


def _pack(block: Block) -> PackedBlock:
    digests: list[Digest] = []
    was_read = True
    shards = {size: _OpenShard(size, block) for size in block.dests}
    with ignore_decoder_warnings():
        for start in range(0, len(block.rows), _ROWS_READ):
            rows = block.rows[start : start + _ROWS_READ]
            contents = block.source.read_all([row.image.name for row in rows])
            for row, content in zip(rows, contents, strict=True):
                was_read = was_read and not isinstance(content, OSError)
                try:
                    squares = decode_at_sizes(content, tuple(block.dests))
                except UndecodableImage as error:
                    digests.append(str(error))
                else:
                    digests.append(b"".join(pixels_digest(square.data) for square in squares))
                    for shard, square in zip(shards.values(), squares, strict=True):
                        shard.add(row, square)
                for shard in shards.values():
                    shard.end_row(len(digests))
    return PackedBlock(digests, {size: shard.entries for size, shard in shards.items()}, was_read)


@dataclass
class _OpenShard:
    """Write the shards of a block at one size, one after the other: gather rows, and write each full shard."""

    image_size: int
    block: Block
    entries: list[ShardEntry] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        most = min(self.block.shard_rows[self.image_size], len(self.block.rows))
        self.image_NHWC = np.empty((most, self.image_size, self.image_size, 3), np.uint8)

    def add(self, row: Row, square: npt.NDArray[np.uint8]) -> None:
        self.image_NHWC[len(self.rows)] = square
        self.rows.append(row)

    def end_row(self, done: int) -> None:
        """Write the shard if its last row was added. `done` is the number of finished rows of the block."""
        block, of_shard = self.block, self.block.shard_rows[self.image_size]
        if (done % of_shard and done < len(block.rows)) or not self.rows:
            return
        name = f"{block.split}-{(block.start + done - 1) // of_shard:05d}.arrow"
        prob_NK = np.array([row.probs for row in self.rows], np.float32)
        with block.dests[self.image_size].write(name) as path:
            write_shard(path, [row.id for row in self.rows], self.image_NHWC[: len(self.rows)], prob_NK)
            size = path.stat().st_size
        self.entries.append(ShardEntry(file=name, rows=len(self.rows), bytes=size))
        self.rows.clear()


def _read_record(block: Block, raw: bytes | None, key: str) -> PackedBlock | None:
    """Return the result of an earlier attempt if its record matches the block and its shards exist."""
    with contextlib.suppress(ValueError):  # damaged
        found = _Record.model_validate_json(raw or b"")
        if (
            found.key == key
            and found.entries.keys() == block.dests.keys()
            and all(
                dest.sizes(entry.file for entry in found.entries[size])
                == [entry.bytes for entry in found.entries[size]]
                for size, dest in block.dests.items()
            )
        ):
            whole, step = bytes.fromhex(found.digests), DIGEST_BYTES * len(block.dests)
            good = [row for row in range(len(block.rows)) if row not in found.faults]
            parts = (whole[start : start + step] for start in range(0, len(whole), step))
            digests: dict[int, Digest] = {**found.faults, **dict(zip(good, parts, strict=True))}
            return PackedBlock([digests[row] for row in range(len(block.rows))], found.entries)
    return None
