"""A shard that is being made: all is there but its pixels, which tasks of some rows each write in their places."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytune_emotion.data import shard_format
from raytune_emotion.data.affectnet import Row
from raytune_emotion.data.decode import DIGEST_BYTES, Region, picture_bytes
from raytune_emotion.data.shard_format import ShardEntry

#: Rows of a task: a power of two.
TASK_ROWS = 128
_SHARD_BYTES = 128 * 2**20  # pixels in a shard, at most, unless one task has more

#: Of each row of a split the digests of its pixels at every size, or what is wrong with its picture.
Digests = dict[str, list[bytes | str]]


@dataclass(frozen=True)
class Unfilled:
    """A shard but for its pixels."""

    path: Path
    image_size: int
    pixels: int  # where in the file they begin, bytes

    def region(self, row: int, done: tuple[str, bytes] | None = None) -> Region:
        return Region(str(self.path), self.pixels + row * picture_bytes(self.image_size), done)


def begin_unfilled(folder: Path, split: str, number: int, rows: Sequence[Row], image_size: int) -> Unfilled:
    """A shard but for its pixels; those that are there stay."""
    path, prob_NK = folder / f"{split}-{number:05d}.arrow", np.array([row.probs for row in rows], np.float32)
    return Unfilled(path, image_size, shard_format.begin_shard(path, [row.id for row in rows], prob_NK, image_size))


def close_shard(shard: Unfilled, digests: Sequence[bytes]) -> ShardEntry | None:
    """Leaves the rows at fault out of a shard that has its pixels. Where all are, there is none."""
    good = list(map(bool, digests))
    if not all(good):
        shard_format.keep_rows(shard.path, good)
    if not any(good):
        return None
    return ShardEntry(file=shard.path.name, rows=sum(good), bytes=shard.path.stat().st_size)


def cut(digest: bytes | str, i: int) -> bytes:
    """What of a row's digests is that of the i-th size; empty for a row at fault."""
    return digest[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] if isinstance(digest, bytes) else b""


def shard_rows(image_size: int) -> int:
    """A power of two, so that a shard is of whole tasks, and of whole shards of every larger size."""
    return max(TASK_ROWS, 1 << (_SHARD_BYTES // picture_bytes(image_size)).bit_length() >> 1)
