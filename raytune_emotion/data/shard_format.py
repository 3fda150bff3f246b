"""The files of a packed store.

<store>/manifest.json          written last: what the store holds, and that it is whole
<store>/<split>-00000.arrow    one record batch: id, image (uint8, H x W x RGB), probs (float32, K)
<store>/rejected.csv           with skip_bad: the rows left out, and why
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import whole

MANIFEST = "manifest.json"
REJECTED = "rejected.csv"
VERSION = 1

_AGAIN = "the store is damaged, pack the folder again"


class ShardEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^[a-z0-9-]+\.arrow$")
    rows: int = Field(ge=1)
    bytes: int


class SplitEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int = Field(ge=1)
    shards: tuple[ShardEntry, ...] = Field(min_length=1)


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["raytune_emotion.store"]
    version: Literal[1]
    fingerprint: str
    image_size: int = Field(gt=0)
    classes: tuple[str, ...] = Field(min_length=2)
    rejected: int = Field(ge=0)
    splits: dict[Literal["train", "val"], SplitEntry] = Field(min_length=2)


def parse_manifest(raw: bytes, name: object) -> Manifest:
    """What a manifest says.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{name}: no description of a store that this version reads"
            f" ({where}: {first['msg']}); pack the folder again"
        ) from None


@dataclass(frozen=True)
class Shard:
    """Some rows of a split, in mapped memory."""

    ids: Sequence[str]
    image_NHWC: npt.NDArray[np.uint8]
    prob_NK: npt.NDArray[np.float32]


def open_shard(folder: Path, entry: ShardEntry, manifest: Manifest, faults: list[str]) -> Shard | None:
    path, size, k = folder / entry.file, manifest.image_size, len(manifest.classes)
    if not path.is_file():
        faults.append(f"{path}: is missing; {_AGAIN}")
        return None
    if (found := path.stat().st_size) != entry.bytes:
        faults.append(f"{path}: holds {found} bytes of {entry.bytes}; {_AGAIN}")
        return None
    try:
        batch = _map_batch(path)
        # Arrow itself follows lengths and offsets that reach out of the file.
        batch.validate(full=True)
        if batch.schema != _schema(size, k) or batch.num_rows != entry.rows:
            faults.append(f"{path}: not the {entry.rows} rows of {size} px and {k} classes of {MANIFEST}; {_AGAIN}")
            return None
        images = batch.column("image").flatten().to_numpy(zero_copy_only=True).reshape(entry.rows, size, size, 3)
        probs = batch.column("probs").flatten().to_numpy(zero_copy_only=True).reshape(entry.rows, k)
        return Shard(batch.column("id").to_pylist(), images, probs)
    except (pa.ArrowException, OSError, ValueError) as error:
        faults.append(f"{path}: no readable Arrow file ({error}); {_AGAIN}")
        return None


def begin_shard(path: Path, ids: Sequence[str], prob_NK: npt.NDArray[np.float32], image_size: int) -> int:
    """Writes all of a shard but its pixels, and leaves those that are there; returns where in the file they begin."""
    schema = _schema(image_size, prob_NK.shape[1])
    length = len(ids) * image_size * image_size * 3
    pixels = pa.py_buffer(np.zeros(length, np.uint8))  # never touched, so it takes no memory
    batch = pa.record_batch(
        [
            pa.array(ids, pa.string()),
            pa.FixedSizeListArray.from_arrays(
                pa.Array.from_buffers(pa.uint8(), length, [None, pixels]), type=schema.field("image").type
            ),
            pa.FixedSizeListArray.from_arrays(pa.array(prob_NK.reshape(-1)), type=schema.field("probs").type),
        ],
        schema=schema,
    )
    path.touch()
    with path.open("r+b") as file:
        sink = _Gap(file, pixels)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
            writer.write_batch(batch)
        file.truncate()
    assert sink.offset > 0
    return sink.offset


class _Gap:
    """A file in which the place of one buffer is passed over."""

    def __init__(self, file: BinaryIO, buffer: Any) -> None:
        self.file, self.address, self.offset = file, buffer.address, -1
        self.closed = False

    def write(self, data: Any) -> int:
        if isinstance(data, pa.Buffer) and data.address == self.address:
            self.offset = self.file.tell()
            self.file.seek(data.size, os.SEEK_CUR)
            return int(data.size)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True


def keep_rows(path: Path, kept: Sequence[bool]) -> None:
    """Drops the other rows of a shard; all of it where none is kept."""
    if not any(kept):
        path.unlink()
        return
    batch = _map_batch(path).filter(pa.array(kept))
    with whole(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as writer:
        writer.write_batch(batch)


def fingerprint(
    image_size: int, classes: tuple[str, ...], rows: Iterable[tuple[str, str, bytes, Sequence[float]]]
) -> str:
    """A hash of a store's content, whatever its shards: of rows as (split, id, digest of pixels, probabilities)."""
    digest = hashlib.sha256(repr((image_size, classes)).encode())
    for split, id_, pixels, probs in rows:
        digest.update(f"{split}\0{id_}\0".encode() + pixels + np.array(probs, "<f4").tobytes())
    return digest.hexdigest()


def _schema(image_size: int, k: int) -> Any:
    pixels = pa.list_(pa.uint8(), image_size * image_size * 3)
    return pa.schema([("id", pa.string()), ("image", pixels), ("probs", pa.list_(pa.float32(), k))])


def _map_batch(path: Path) -> Any:
    """The one record batch of a file, in mapped memory; ArrowInvalid or OSError where there is none."""
    with pa.memory_map(str(path)) as file:  # closed here, and mapped as long as an array needs it
        reader = pa.ipc.open_file(file)
        if reader.num_record_batches != 1:
            raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches in place of one")
        return reader.get_batch(0)


#: What to do about a disk that is full.
MORE_ROOM = "choose a disk with room (for the cache: XDG_CACHE_HOME) or a smaller image size"


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
