"""Read and write the files of a packed store.

<store>/manifest.json          written last: the content of the store, and the mark that it is complete
<store>/<split>-00000.arrow    one record batch: id, image (uint8, H x W x RGB), probs (float32, K)
<store>/rejected.csv           with skip_bad: the rows left out, with reasons

A packer writes each shard in one go: `packing/blocks.py`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from raytune_emotion.emotions import check_class_names
from raytune_emotion.errors import UserError
from raytune_emotion.storage.json_text import load_json

MANIFEST = "manifest.json"
FORMAT: Final = "raytune_emotion.store"
REJECTED = "rejected.csv"
VERSION = 1
#: Largest difference from 1 of the sum of a row's probabilities.
SUM_TOLERANCE = 1e-3

_AGAIN = "the store is damaged; pack the folder again"


class ShardEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^[a-z0-9-]+\.arrow$")
    rows: int = Field(ge=1)
    bytes: int


class SplitEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int = Field(ge=1)
    shards: tuple[ShardEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> "SplitEntry":
        if self.rows != sum(shard.rows for shard in self.shards):
            raise ValueError(f"{self.rows} rows, but {sum(shard.rows for shard in self.shards)} in its shards")
        return self


def _check_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    check_class_names(classes)
    return classes


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["raytune_emotion.store"]
    version: Literal[1]
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")  # a part of paths in the cache
    image_size: int = Field(gt=0)
    classes: Annotated[tuple[str, ...], AfterValidator(_check_names)] = Field(min_length=2)
    rejected: int = Field(ge=0)
    splits: dict[Literal["train", "val"], SplitEntry] = Field(min_length=2)


def may_be_manifest(raw: bytes) -> bool:
    """Tell whether a file of this name belongs to a store, even a damaged one. Other programs use this name, too."""
    try:
        found = load_json(raw)
    except ValueError:
        return True
    return bool(isinstance(found, dict) and found.get("format") == FORMAT)


def parse_manifest(raw: bytes, name: object) -> Manifest:
    """Parse a manifest.

    Raises:
        UserError: it is damaged, or has another version.
    """
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{name}: not a description of a store that this version can read"
            f" ({where}: {first['msg']}); pack the folder again"
        ) from None


@dataclass(frozen=True)
class Shard:
    """Rows of a split, in memory-mapped files."""

    ids: Sequence[str]
    image_NHWC: npt.NDArray[np.uint8]
    prob_NK: npt.NDArray[np.float32]


def open_shard(folder: Path, entry: ShardEntry, manifest: Manifest, faults: list[str]) -> Shard | None:
    """Map a shard into memory; append a sentence to `faults` and return None if it is missing or damaged."""
    path, size, k = folder / entry.file, manifest.image_size, len(manifest.classes)
    if not path.is_file():
        faults.append(f"{path}: is missing; {_AGAIN}")
        return None
    if (found := path.stat().st_size) != entry.bytes:
        faults.append(f"{path}: holds {found} bytes of {entry.bytes}; {_AGAIN}")
        return None
    try:
        batch = _map_batch(path)
        # Without validation, Arrow follows lengths and offsets that point outside of the file.
        batch.validate(full=True)
        if batch.schema != _schema(size, k) or batch.num_rows != entry.rows:
            faults.append(f"{path}: not the {entry.rows} rows of {size} px and {k} classes of {MANIFEST}; {_AGAIN}")
            return None
        images = batch.column("image").flatten().to_numpy(zero_copy_only=True).reshape(entry.rows, size, size, 3)
        probs = batch.column("probs").flatten().to_numpy(zero_copy_only=True).reshape(entry.rows, k)
        # The sum is in single precision. NaN fails the comparison.
        with np.errstate(invalid="ignore", over="ignore"):
            sound = probs.min() >= 0 and (abs(probs.sum(axis=1) - 1) <= SUM_TOLERANCE + 1e-6 * k).all()
        if not sound:
            faults.append(f"{path}: holds probabilities that do not sum to 1; {_AGAIN}")
            return None
        return Shard(batch.column("id").to_pylist(), images, probs)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        faults.append(f"{path}: not a readable Arrow file ({error}); {_AGAIN}")
        return None


def write_shard(
    path: Path, ids: Sequence[str], image_NHWC: npt.NDArray[np.uint8], prob_NK: npt.NDArray[np.float32]
) -> None:
    """Write a shard's file in one go. The pixels must be C-contiguous; they are not copied."""
    schema = _schema(image_NHWC.shape[1], prob_NK.shape[1])
    pixels = pa.Array.from_buffers(pa.uint8(), image_NHWC.size, [None, pa.py_buffer(image_NHWC)])
    columns = [
        pa.array(ids, pa.string()),
        pa.FixedSizeListArray.from_arrays(pixels, type=schema.field("image").type),
        pa.FixedSizeListArray.from_arrays(pa.array(prob_NK.reshape(-1)), type=schema.field("probs").type),
    ]
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def fingerprint(
    image_size: int, classes: tuple[str, ...], rows: Iterable[tuple[str, str, bytes, Sequence[float]]]
) -> str:
    """Hash a store's content, independent of its shards: rows as (split, id, digest of pixels, probabilities)."""
    digest = hashlib.sha256(repr((image_size, classes)).encode())
    for split, id_, pixels, probs in rows:
        digest.update(f"{split}\0{id_}\0".encode() + pixels + np.array(probs, "<f4").tobytes())
    return digest.hexdigest()


def _schema(image_size: int, k: int) -> Any:
    pixels = pa.list_(pa.uint8(), image_size * image_size * 3)
    return pa.schema([("id", pa.string()), ("image", pixels), ("probs", pa.list_(pa.float32(), k))])


def _map_batch(path: Path) -> Any:
    """Map the only record batch of a file into memory; raise ArrowInvalid or OSError if there is none."""
    with pa.memory_map(str(path)) as file:  # closed here, but mapped as long as an array needs it
        reader = pa.ipc.open_file(file)
        if reader.num_record_batches != 1:
            raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of one")
        return reader.get_batch(0)
