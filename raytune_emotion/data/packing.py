"""Packing: every picture of a folder is checked and decoded, once, into shards.

An attempt that was killed has left shards, and `.done` beside them: of each task that was done, the digests of the
pixels, and a key of the files they were decoded from. What still is as these say is not decoded again.
"""

import contextlib
import csv
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from raytune_emotion.data import affectnet, shards
from raytune_emotion.data.affectnet import Fault, Kind, Row
from raytune_emotion.data.images import DIGEST_BYTES, DecodeTask, Region, decode_images
from raytune_emotion.data.pool import Map, processes
from raytune_emotion.data.shards import Manifest, ShardEntry, SplitEntry
from raytune_emotion.errors import UserError
from raytune_emotion.files import write_text

#: What to do about a disk that is full.
MORE_ROOM = "choose a disk with room (for the cache: XDG_CACHE_HOME) or a smaller image size"

_DONE = ".done"
_SHARD_BYTES = 128 * 2**20  # pixels in a shard, at most, unless one task has more
_TASK_ROWS = 128


def pack_into(
    folders: Mapping[int, Path], source: Path, classes: tuple[str, ...], *, skip_bad: bool, workers: int | None
) -> None:
    """Writes the stores of a folder, one for each image size in px, all from one pass over its files.

    The folders have in them what an earlier attempt has left there.

    Raises:
        UserError: a sentence for every kind of fault; the disk is too small.
    """
    with processes(workers) as pmap, progress() as bars:
        scan = affectnet.scan(source, classes, _counted(pmap, bars, "reading annotations"))
        _refuse_empty(source, {split: len(rows) for split, rows in scan.rows.items()}, scan.faults, classes)
        for size, folder in folders.items():
            check_space(folder, sum(map(len, scan.rows.values())) * _row_bytes(size))
        with contextlib.ExitStack() as stack:
            stores = [stack.enter_context(_begun(folder, size, scan.rows)) for size, folder in folders.items()]
            undecodable = _decode_all(source, scan, stores, pmap, bars)

    faults = sorted([*scan.faults, *undecodable], key=lambda f: (f.split, f.file, f.kind.value))
    if faults and not skip_bad:
        raise UserError(
            [
                *affectnet.sentences(source, faults, classes),
                f"{source}: nothing is packed while files are at fault; mend them, or set them aside with --skip-bad",
            ]
        )
    _refuse_empty(source, {split: sum(map(bool, stores[0].digests[split])) for split in scan.rows}, faults, classes)
    for store in stores:
        _finish(store, classes, faults, skip_bad=skip_bad)


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


@dataclass(frozen=True)
class _Draft:
    """A shard that is being made."""

    path: Path
    split: str
    rows: Sequence[Row]
    pixels: int  # where in the file they begin, bytes


@dataclass(frozen=True)
class _Begun:
    """A store that is being made."""

    folder: Path
    image_size: int
    drafts: Mapping[str, Sequence[_Draft]]  # by split
    before: Mapping[tuple[str, int], tuple[str, bytes]]  # what an earlier attempt has done; see `Region`
    done: TextIO
    digests: Mapping[str, list[bytes]]  # of rows in their order; empty for one at fault

    def region(self, split: str, start: int, count: int) -> Region:
        shard, row = divmod(start, _shard_rows(self.image_size))
        draft, before = self.drafts[split][shard], self.before.get((split, start))
        done = before if before is not None and len(before[1]) == count * DIGEST_BYTES else None
        return Region(str(draft.path), draft.pixels + row * _row_bytes(self.image_size), done)

    def note(self, split: str, start: int, key: str, digests: Sequence[bytes]) -> None:
        self.digests[split].extend(digests)
        if all(digests):
            self.done.write(f"{split} {start} {key} {b''.join(digests).hex()}\n")
            self.done.flush()


@contextlib.contextmanager
def _begun(folder: Path, image_size: int, rows: Mapping[str, Sequence[Row]]) -> Iterator[_Begun]:
    """A store but for its pixels; those that an earlier attempt has left are as they were."""
    most = _shard_rows(image_size)
    drafts: dict[str, list[_Draft]] = {split: [] for split in rows}
    for split, own in rows.items():
        for number, start in enumerate(range(0, len(own), most)):
            path, part = folder / f"{split}-{number:05d}.arrow", own[start : start + most]
            prob_NK = np.array([row.probs for row in part], np.float32)
            pixels = shards.begin_shard(path, [row.id for row in part], prob_NK, image_size)
            drafts[split].append(_Draft(path, split, part, pixels))
    ours = {draft.path for own in drafts.values() for draft in own} | {folder / _DONE}
    for file in folder.iterdir():
        if file not in ours:
            file.unlink()
    before = _read_done(folder / _DONE)
    with (folder / _DONE).open("a", encoding="ascii") as done:
        done.write("\n")  # the last line may have been cut short
        yield _Begun(folder, image_size, drafts, before, done, {split: [] for split in rows})


def _read_done(file: Path) -> dict[tuple[str, int], tuple[str, bytes]]:
    before = {}
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut short
                split, start, key, digests = line.split()
                before[split, int(start)] = (key, bytes.fromhex(digests))
    return before


def _decode_all(source: Path, scan: affectnet.Scan, stores: Sequence[_Begun], pmap: Map, bars: Progress) -> list[Fault]:
    """Fills the stores with pixels. Pictures without a good annotation are tried too: all faults are told at once."""
    labelled = [(split, part) for split, rows in scan.rows.items() for part in _parts([row.image for row in rows])]
    unlabelled = [(split, part) for split, images in scan.unlabelled.items() for part in _parts(images)]
    sizes = tuple(store.image_size for store in stores)
    tasks = [
        DecodeTask(
            [str(image) for image in images], sizes, tuple(store.region(split, start, len(images)) for store in stores)
        )
        for split, (start, images) in labelled
    ] + [DecodeTask([str(image) for image in images], sizes, ()) for _, (_, images) in unlabelled]
    bar = bars.add_task("packing images", total=sum(len(task.files) for task in tasks))
    faults = []
    for (split, (start, images)), task, decoded in zip(
        labelled + unlabelled, tasks, pmap(decode_images, tasks), strict=True
    ):
        bars.advance(bar, len(images))
        for image, digest in zip(images, decoded.digests, strict=True):
            if isinstance(digest, str):
                faults.append(Fault(split, image.relative_to(source).as_posix(), Kind.UNDECODABLE, digest))
        for i, store in enumerate(stores if task.into else ()):
            cut = slice(i * DIGEST_BYTES, (i + 1) * DIGEST_BYTES)
            store.note(split, start, decoded.key, [d[cut] if isinstance(d, bytes) else b"" for d in decoded.digests])
    return faults


def _finish(store: _Begun, classes: tuple[str, ...], faults: Sequence[Fault], *, skip_bad: bool) -> None:
    """Leaves rows at fault out, and describes what there is."""
    splits: dict[Any, SplitEntry] = {}
    content = []
    for split, drafts in store.drafts.items():
        digests = iter(store.digests[split])
        entries = []
        for draft in drafts:
            own = list(itertools.islice(digests, len(draft.rows)))
            good = [(split, row.id, digest, row.probs) for row, digest in zip(draft.rows, own, strict=True) if digest]
            if len(good) < len(own):
                shards.keep_rows(draft.path, [bool(digest) for digest in own])
            if good:
                with draft.path.open("rb") as file:
                    os.fsync(file.fileno())
                entry = ShardEntry(file=draft.path.name, rows=len(good), bytes=draft.path.stat().st_size)
                entries.append(entry)
            content += good
        splits[split] = SplitEntry(rows=sum(entry.rows for entry in entries), shards=tuple(entries))
    if skip_bad:
        with (store.folder / shards.REJECTED).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("split", "file", "reason"), *((f.split, f.file, f.reason) for f in faults)])
    (store.folder / _DONE).unlink()
    manifest = Manifest(
        format="raytune_emotion.store",
        version=shards.VERSION,
        fingerprint=shards.fingerprint(store.image_size, classes, content),
        image_size=store.image_size,
        classes=classes,
        rejected=len({(fault.split, fault.id) for fault in faults}),
        splits=splits,
    )
    write_text(store.folder / shards.MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def _refuse_empty(source: Path, good: Mapping[str, int], faults: Sequence[Fault], classes: tuple[str, ...]) -> None:
    if empty := [affectnet.SPLITS[split] for split, rows in good.items() if not rows]:
        told = affectnet.sentences(source, faults, classes)
        raise UserError([*told, *(f"{source / name}: not one good row" for name in empty)])


def _shard_rows(image_size: int) -> int:
    """Whole tasks, so that none is of two shards."""
    return max(1, _SHARD_BYTES // _row_bytes(image_size) // _TASK_ROWS) * _TASK_ROWS


def _row_bytes(image_size: int) -> int:
    return image_size * image_size * 3


def _parts(images: Sequence[Path]) -> list[tuple[int, Sequence[Path]]]:
    """Those of each task, with the number of the first."""
    return [(start, images[start : start + _TASK_ROWS]) for start in range(0, len(images), _TASK_ROWS)]


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
