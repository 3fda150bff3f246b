"""The packed store: every picture decoded once, in Arrow files that all trials of a machine map into memory.

<store>/manifest.json          written last: what the store holds, and that it is whole
<store>/<split>-00000.arrow    one record batch: id, image (uint8, H x W x RGB), probs (float32, K)
<store>/rejected.csv           with skip_bad: the rows left out, and why
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from raytune_emotion.config import DataConfig, RunConfig
from raytune_emotion.data import affectnet
from raytune_emotion.data.affectnet import DecodeTask, Fault, Flaw, Row
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.files import whole, write_text

_MANIFEST = "manifest.json"
_REJECTED = "rejected.csv"
_VERSION = 1
_SHARD_BYTES = 128 * 2**20  # pixels in a shard, at most
_TASK_BYTES = 8 * 2**20  # pixels a worker holds at a time, at most
_TASK_ROWS = 256
_TASKS_WORTH_A_POOL = 32  # some 25 ms each, and half a second to start a process
_STALE_SECONDS = 60
_MORE_ROOM = "choose a disk with room (for the cache: XDG_CACHE_HOME) or a smaller image size"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of their ids."""

    ids: Sequence[str] = field(repr=False)
    prob_NK: npt.NDArray[np.float32] = field(repr=False)
    shards: tuple[npt.NDArray[np.uint8], ...] = field(repr=False)  # [n, H, W, 3] each, in order

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Copies images out of the map of the files.

        Args:
            rows: [B], from 0 to len(self) - 1, in any order.
            out: [B, H, W, 3], C-contiguous, written in place of a new array.

        Returns:
            [B, H, W, 3], uint8: out, where it is given.

        Raises:
            IndexError: a row is not in the split.
        """
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a split of {len(self)}")
        if out is None:
            out = np.empty((len(rows), *self.shards[0].shape[1:]), np.uint8)
        if len(self.shards) == 1:
            # The rows are in range; any other mode than clip copies through a buffer as large as out.
            return np.take(self.shards[0], rows, axis=0, out=out, mode="clip")
        ends = np.cumsum([len(shard) for shard in self.shards])
        shard_of = np.searchsorted(ends, rows, side="right")
        for image, shard, row in zip(out, shard_of.tolist(), (rows - ends[shard_of]).tolist(), strict=True):
            image[...] = self.shards[shard][row]  # row counts back from the shard's end
        return out


@dataclass(frozen=True)
class Store:
    path: Path
    image_size: int
    classes: tuple[str, ...]
    fingerprint: str  # of the content: classes, ids, pixels, probabilities
    train: Split
    val: Split
    rejected: int  # rows of the source that were set aside when it was packed

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return open_store, (self.path,)


class _Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str = Field(pattern=r"^[a-z0-9-]+\.arrow$")
    rows: int = Field(ge=1)
    bytes: int


class _SplitEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int = Field(ge=1)
    shards: tuple[_Shard, ...] = Field(min_length=1)


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["raytune_emotion.store"]
    version: Literal[1]
    fingerprint: str
    image_size: int = Field(gt=0)
    classes: tuple[str, ...] = Field(min_length=2)
    rejected: int = Field(ge=0)
    splits: dict[Literal["train", "val"], _SplitEntry] = Field(min_length=2)


def is_store(path: Path) -> bool:
    return (path / _MANIFEST).is_file()


def open_store(path: Path) -> Store:
    """Maps a store into memory; its pixels are not read before they are gathered.

    Raises:
        UserError: with a sentence for everything that is missing, damaged or of another version.
    """
    path = Path(path)
    try:
        manifest = _Manifest.model_validate_json((path / _MANIFEST).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no packed store, for it has no {_MANIFEST}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path / _MANIFEST}: no description of a store that this version reads"
            f" ({where}: {first['msg']}); pack the folder again"
        ) from None

    faults: list[str] = []
    splits: dict[str, Split] = {}
    for name, entry in manifest.splits.items():
        columns = [_open_shard(path, shard, manifest, faults) for shard in entry.shards]
        read = [c for c in columns if c is not None]
        if faults:
            continue
        prob_NK = read[0][2] if len(read) == 1 else np.concatenate([probs for _, _, probs in read])
        prob_NK.flags.writeable = False
        ids = tuple(id_ for part, _, _ in read for id_ in part)
        splits[name] = Split(ids, prob_NK, tuple(image for _, image, _ in read))
    if faults:
        raise UserError(faults)
    return Store(
        path,
        manifest.image_size,
        manifest.classes,
        manifest.fingerprint,
        splits["train"],
        splits["val"],
        manifest.rejected,
    )


def pack(
    source: Path,
    dest: Path,
    *,
    image_size: int,
    classes: tuple[str, ...] = EMOTIONS,
    skip_bad: bool = False,
    workers: int | None = None,
) -> Store:
    """Checks and decodes every row of an AffectNetFused folder, once, and writes them as a store.

    The content depends on the source alone, not on the number of workers. Nothing is left at dest, nor beside
    it, unless all of it is.

    Args:
        source: the folder.
        dest: the store, which must not exist yet.
        image_size: side of the square images, px.
        classes: names of the K values of an annotation, in order.
        skip_bad: leave out the rows at fault, listed in rejected.csv, in place of refusing them all.
        workers: processes; by default one a core, or none where there is little to do.

    Raises:
        UserError: a sentence for every kind of fault; dest exists; the disk is too small.
    """
    RunConfig.from_flat({"data.image_size": image_size, "data.classes": classes})
    if is_store(source):
        raise UserError(f"{source}: is a packed store already")
    try:
        with whole_folder(dest) as folder, _pool(workers) as pmap, _progress() as progress:
            _pack_into(folder, source, image_size, classes, skip_bad, pmap, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{dest.parent}: {error.strerror} while packing; {_MORE_ROOM}") from error
        raise
    return _telling_rejected(open_store(dest))


def prepare(
    data: Path, *, image_size: int | None, classes: tuple[str, ...] = EMOTIONS, skip_bad: bool = False
) -> Store:
    """A store to train from: the one at data, or one packed from the folder at data and kept in the cache.

    A folder is packed again when a name, a size or a modification time in it, the image size, the classes or
    skip_bad is another.

    Args:
        data: a store, or a folder in the layout of AffectNetFused.
        image_size: side of the square images, px; None: the store's own, or that of the folder's
            images, but no more than the default.
        classes: names of the K values of an annotation, in order; a store must have been packed with them.
        skip_bad: as in `pack`.

    Raises:
        UserError: data is neither; a store is of another size or other classes; see `pack`.
    """
    if is_store(data):
        store = open_store(data)
        faults = []
        if image_size not in (None, store.image_size):
            faults.append(
                f"{data}: the store holds images of {store.image_size} px, and data.image_size is {image_size};"
                f" set data.image_size to {store.image_size}, or pack the folder again at {image_size}"
            )
        if classes != store.classes:
            faults.append(
                f"{data}: the store has the classes {', '.join(store.classes)}, and data.classes is"
                f" {', '.join(classes)}"
            )
        if faults:
            raise UserError(faults)
        return store

    size = affectnet.native_size(data, DataConfig().image_size) if image_size is None else image_size
    wanted = (_VERSION, affectnet.quick_fingerprint(data), size, classes, skip_bad)
    key = hashlib.sha256(repr(wanted).encode()).hexdigest()[:20]
    dest = cache_folder() / "stores" / f"{data.resolve().name}-{size}px-{key}"
    if is_store(dest):
        try:
            return _telling_rejected(open_store(dest))
        except UserError as error:
            print(f"{error}\n{dest}: packed again", file=sys.stderr)
            shutil.rmtree(dest)
    print(f"{data}: packed once, at {size} px, into {dest}", file=sys.stderr)
    try:
        return pack(data, dest, image_size=size, classes=classes, skip_bad=skip_bad)
    except UserError:
        if is_store(dest):  # another process was faster
            return _telling_rejected(open_store(dest))
        raise


def _telling_rejected(store: Store) -> Store:
    if store.rejected:
        print(f"{store.path}: rejected rows: {store.rejected}, see {store.path / _REJECTED}", file=sys.stderr)
    return store


def cache_folder() -> Path:
    """Where this project keeps what it can make again: a folder of the user's, by the XDG base directory rules."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "raytune_emotion"


@contextlib.contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """A folder beside dest to write into, which becomes dest when the block ends well and else goes away.

    Raises:
        UserError: dest exists, before or after the block; or nothing can be written beside it.
    """
    exists = UserError(f"{dest}: exists already; name another destination, or remove it")
    if os.path.lexists(dest):
        raise exists
    ours = f".{dest.name}.{socket.gethostname()}."
    folder = dest.parent / f"{ours}{uuid.uuid4().hex[:12]}.part"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _sweep(dest.parent, ours)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{dest}: cannot be written ({error.strerror}: {error.filename})") from error
    try:
        with contextlib.ExitStack() as stack:
            # Held while this process lives, so that what a killed one left can be told from what is in use; a file
            # system without locks is never swept.
            with contextlib.suppress(OSError):
                stack.enter_context(_locked(folder))
            yield folder
        try:
            folder.rename(dest)
        except OSError:
            if dest.exists():
                raise exists from None
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and folder.name.endswith(".part"):
            with contextlib.suppress(OSError), _locked(folder, fcntl.LOCK_NB):
                if time.time() - folder.stat().st_mtime > _STALE_SECONDS:  # else it may not be locked yet
                    shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _pool(workers: int | None) -> Iterator[affectnet.Map]:
    """A `map` over processes, which are started when there is enough to do for them."""
    cores = len(os.sched_getaffinity(0))
    executor = ProcessPoolExecutor(
        workers or cores, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent
    )

    def pmap(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = list(tasks)
        if workers == 1 or (workers is None and (cores == 1 or len(tasks) < _TASKS_WORTH_A_POOL)):
            return map(function, tasks)
        with _spawning():
            return executor.map(function, tasks)

    try:
        yield pmap
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    # A spawned process first imports the main module of its parent. These need nothing of it, and it may be one
    # that imports ray, torch and optuna, or a script that packs without asking whether it is the main one.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    # They inherit what is blocked: Ctrl-C, which reaches them too, is for the parent, who ends the work in order.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a parent that was killed tells nobody

    threading.Thread(target=follow, daemon=True).start()


@dataclass
class _Draft:
    """A shard that is being made."""

    path: Path
    split: str
    rows: Sequence[Row]
    digests: Sequence[bytes | None] = ()  # of the pixels of each row; None: the row is at fault

    @property
    def good(self) -> int:
        return sum(digest is not None for digest in self.digests)


def _pack_into(
    folder: Path,
    source: Path,
    image_size: int,
    classes: tuple[str, ...],
    skip_bad: bool,
    pmap: affectnet.Map,
    progress: Progress,
) -> None:
    scan = affectnet.scan(source, classes, _counted(pmap, progress, "reading annotations"))
    _refuse_empty(source, {split: len(rows) for split, rows in scan.rows.items()}, scan.faults, classes)
    row_bytes = image_size * image_size * 3
    _check_space(folder, sum(map(len, scan.rows.values())) * row_bytes)

    drafts = [
        _Draft(folder / f"{split}-{i:05d}.arrow", split, part)
        for split, rows in scan.rows.items()
        for i, part in enumerate(_cut(rows, max(1, _SHARD_BYTES // row_bytes)))
    ]
    # Pictures without a good annotation are tried as well, so that the faults are told all at once.
    unlabelled = [(split, image) for split, images in scan.unlabelled.items() for image in images]
    pictures = [(draft.split, row.image) for draft in drafts for row in draft.rows] + unlabelled
    tasks = _decode_tasks(drafts, [image for _, image in unlabelled], image_size, len(classes))
    decode = _counted(pmap, progress, "packing images", total=len(pictures))
    results = [result for part in decode(affectnet.decode_images, tasks) for result in part]

    undecodable = [
        Fault(split, image.relative_to(source).as_posix(), result.kind, result.detail)
        for (split, image), result in zip(pictures, results, strict=True)
        if isinstance(result, Flaw)
    ]
    faults = sorted([*scan.faults, *undecodable], key=lambda f: (f.split, f.file, f.kind.value))
    if faults and not skip_bad:
        raise UserError(
            [
                *affectnet.sentences(source, faults, classes),
                f"{source}: nothing is packed while files are at fault; mend them, or set them aside with --skip-bad",
            ]
        )
    in_order = iter(results)
    for draft in drafts:
        draft.digests = [d if isinstance(d, bytes) else None for d in islice(in_order, len(draft.rows))]
    good = {split: sum(d.good for d in drafts if d.split == split) for split in scan.rows}
    _refuse_empty(source, good, faults, classes)
    for draft in drafts:
        if draft.good < len(draft.rows):
            _drop_bad_rows(draft)
        if draft.good:
            with draft.path.open("rb") as file:
                os.fsync(file.fileno())

    rejected = len({(fault.split, fault.id) for fault in faults})
    if skip_bad:
        with (folder / _REJECTED).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("split", "file", "reason"), *((f.split, f.file, f.reason) for f in faults)])
    manifest = _describe([draft for draft in drafts if draft.good], image_size, classes, rejected)
    write_text(folder / _MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def _decode_tasks(drafts: Sequence[_Draft], unlabelled: Sequence[Path], image_size: int, k: int) -> list[DecodeTask]:
    """Begins the shards; the tasks that fill them, in the order of their rows, and then try the other pictures."""
    row_bytes = image_size * image_size * 3
    per_task = max(1, min(_TASK_ROWS, _TASK_BYTES // row_bytes))
    tasks = []
    for draft in drafts:
        offset = _write_frame(draft, image_size, k)
        for start in range(0, len(draft.rows), per_task):
            files = [str(row.image) for row in draft.rows[start : start + per_task]]
            tasks.append(DecodeTask(files, image_size, (str(draft.path), offset + start * row_bytes)))
    return tasks + [DecodeTask([str(image) for image in part], image_size, None) for part in _cut(unlabelled, per_task)]


def _refuse_empty(source: Path, good: Mapping[str, int], faults: Sequence[Fault], classes: tuple[str, ...]) -> None:
    if empty := [affectnet.SPLITS[split] for split, rows in good.items() if not rows]:
        told = affectnet.sentences(source, faults, classes)
        raise UserError([*told, *(f"{source / name}: not one good row" for name in empty)])


def _describe(drafts: Sequence[_Draft], image_size: int, classes: tuple[str, ...], rejected: int) -> _Manifest:
    splits = {}
    for split in ("train", "val"):
        shards = tuple(
            _Shard(file=draft.path.name, rows=draft.good, bytes=draft.path.stat().st_size)
            for draft in drafts
            if draft.split == split
        )
        splits[split] = _SplitEntry(rows=sum(shard.rows for shard in shards), shards=shards)
    return _Manifest(
        format="raytune_emotion.store",
        version=_VERSION,
        fingerprint=_fingerprint(drafts, image_size, classes),
        image_size=image_size,
        classes=classes,
        rejected=rejected,
        splits=splits,
    )


def _cut(items: Sequence[_T], most: int) -> list[Sequence[_T]]:
    """Parts of at most so many items, as even as can be."""
    parts = -(-len(items) // most)
    bounds = [len(items) * i // parts for i in range(parts + 1)] if parts else []
    return [items[start:end] for start, end in pairwise(bounds)]


def _schema(image_size: int, k: int) -> Any:
    pixels = pa.list_(pa.uint8(), image_size * image_size * 3)
    return pa.schema([("id", pa.string()), ("image", pixels), ("probs", pa.list_(pa.float32(), k))])


class _Gap:
    """A file that leaves a hole in the place of one buffer."""

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


def _write_frame(draft: _Draft, image_size: int, k: int) -> int:
    """Writes a shard but for its pixels, which the workers fill in; returns where in the file they begin."""
    schema = _schema(image_size, k)
    length = len(draft.rows) * image_size * image_size * 3
    pixels = pa.py_buffer(np.zeros(length, np.uint8))  # never touched, so it takes no memory
    probs = np.array([row.probs for row in draft.rows], np.float32)
    batch = pa.record_batch(
        [
            pa.array([row.id for row in draft.rows], pa.string()),
            pa.FixedSizeListArray.from_arrays(
                pa.Array.from_buffers(pa.uint8(), length, [None, pixels]), type=schema.field("image").type
            ),
            pa.FixedSizeListArray.from_arrays(pa.array(probs.reshape(-1)), type=schema.field("probs").type),
        ],
        schema=schema,
    )
    with draft.path.open("wb") as file:
        sink = _Gap(file, pixels)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
            writer.write_batch(batch)
    assert sink.offset > 0
    return sink.offset


def _drop_bad_rows(draft: _Draft) -> None:
    if not draft.good:
        draft.path.unlink()
        return
    kept = _map_batch(draft.path).filter(pa.array([digest is not None for digest in draft.digests]))
    with whole(draft.path) as path, pa.ipc.new_file(str(path), kept.schema) as writer:
        writer.write_batch(kept)


def _map_batch(path: Path) -> Any:
    """The one record batch of a file, in mapped memory; ArrowInvalid or OSError where there is none."""
    with pa.memory_map(str(path)) as file:  # closed here, and mapped as long as an array needs it
        reader = pa.ipc.open_file(file)
        if reader.num_record_batches != 1:
            raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches in place of one")
        return reader.get_batch(0)


def _open_shard(
    folder: Path, shard: _Shard, manifest: _Manifest, faults: list[str]
) -> tuple[list[str], npt.NDArray[np.uint8], npt.NDArray[np.float32]] | None:
    path, size, k = folder / shard.file, manifest.image_size, len(manifest.classes)
    again = "the store is damaged, pack the folder again"
    if not path.is_file():
        faults.append(f"{path}: is missing; {again}")
        return None
    if (found := path.stat().st_size) != shard.bytes:
        faults.append(f"{path}: holds {found} bytes of {shard.bytes}; {again}")
        return None
    try:
        batch = _map_batch(path)
    except (pa.ArrowException, OSError) as error:
        faults.append(f"{path}: no readable Arrow file ({error}); {again}")
        return None
    if batch.schema != _schema(size, k) or batch.num_rows != shard.rows:
        faults.append(f"{path}: not the {shard.rows} rows of {size} px and {k} classes of {_MANIFEST}; {again}")
        return None
    images = batch.column("image").flatten().to_numpy(zero_copy_only=True).reshape(shard.rows, size, size, 3)
    probs = batch.column("probs").flatten().to_numpy(zero_copy_only=True).reshape(shard.rows, k)
    return batch.column("id").to_pylist(), images, probs


def _fingerprint(drafts: Sequence[_Draft], image_size: int, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((image_size, classes)).encode())
    for draft in drafts:
        for row, pixels in zip(draft.rows, draft.digests, strict=True):
            if pixels is not None:
                digest.update(f"{draft.split}\0{row.id}\0".encode() + pixels)
                digest.update(np.array(row.probs, "<f4").tobytes())
    return digest.hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent}: the store takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {_MORE_ROOM}"
        )


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f}/s")


def _progress() -> Progress:
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _counted(pmap: affectnet.Map, progress: Progress, what: str, total: int | None = None) -> affectnet.Map:
    """The same map, whose results (lists) are counted on a bar."""
    bar = progress.add_task(what, total=total)

    def counted(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        for part in pmap(function, tasks):
            progress.advance(bar, len(part))
            yield part

    return counted
