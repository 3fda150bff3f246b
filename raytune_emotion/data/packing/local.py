"""Packing in a folder: every picture is checked and decoded, once, into shards.

Tasks write the pixels of some rows each into shards that are there but for these. An attempt that was killed has left
shards, and `.done` beside them: of each task that was done, the digests of the pixels, and a key of the files they were
decoded from. What still is as these say is not decoded again.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.progress import Progress

from raytune_emotion.data.affectnet import Row
from raytune_emotion.data.decode import DIGEST_BYTES, DecodeTask, Region, decode_images, picture_bytes
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
from raytune_emotion.data.shard_format import ShardEntry, check_space
from raytune_emotion.storage.locations import Source

_DONE = ".done"


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
        scan = read_rows(source, classes, pmap, bars)
        for size, folder in folders.items():
            check_space(folder, sum(map(len, scan.rows.values())) * picture_bytes(size))
        with contextlib.ExitStack() as stack:
            stores = [stack.enter_context(_begun(folder, size, scan.rows)) for size, folder in folders.items()]
            digests = _decode_all(source, scan.rows, stores, pmap, bars)
        content = checked(source, classes, scan, digests, pmap, bars, skip_bad=skip_bad)
    for i, store in enumerate(stores):
        entries: dict[str, list[ShardEntry]] = {}
        for split, unfilled in store.unfilled.items():
            own = [cut(digest, i) for digest in digests[split]]
            most = shard_rows(store.image_size)
            closed = [close_shard(shard, own[n * most : (n + 1) * most]) for n, shard in enumerate(unfilled)]
            entries[split] = [entry for entry in closed if entry is not None]
            for entry in entries[split]:
                with (store.folder / entry.file).open("rb") as file:
                    os.fsync(file.fileno())
        (store.folder / _DONE).unlink()
        describe(store.folder, content, i, store.image_size, entries)


@dataclass(frozen=True)
class _Begun:
    """A store that is being made."""

    folder: Path
    image_size: int
    unfilled: Mapping[str, Sequence[Unfilled]]  # by split
    before: Mapping[tuple[str, int], tuple[str, bytes]]  # what an earlier attempt has done; see `Region`
    done: TextIO

    def region(self, split: str, start: int, count: int) -> Region:
        shard, row = divmod(start, shard_rows(self.image_size))
        before = self.before.get((split, start))
        done = before if before is not None and len(before[1]) == count * DIGEST_BYTES else None
        return self.unfilled[split][shard].region(row, done)

    def note(self, split: str, start: int, key: str, digests: Sequence[bytes]) -> None:
        if all(digests):
            self.done.write(f"{split} {start} {key} {b''.join(digests).hex()}\n")
            self.done.flush()


@contextlib.contextmanager
def _begun(folder: Path, image_size: int, rows: Mapping[str, Sequence[Row]]) -> Iterator[_Begun]:
    """A store but for its pixels; those that an earlier attempt has left are as they were."""
    most = shard_rows(image_size)
    unfilled = {
        split: [
            begin_unfilled(folder, split, number, own[start : start + most], image_size)
            for number, start in enumerate(range(0, len(own), most))
        ]
        for split, own in rows.items()
    }
    ours = {shard.path for own in unfilled.values() for shard in own} | {folder / _DONE}
    for file in folder.iterdir():
        if file not in ours:
            file.unlink()
    before = _read_done(folder / _DONE)
    with (folder / _DONE).open("a", encoding="ascii") as done:
        done.write("\n")  # the last line may have been cut short
        yield _Begun(folder, image_size, unfilled, before, done)


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
) -> Digests:
    """Fills the stores with pixels."""
    parts = [(split, start) for split, own in rows.items() for start in range(0, len(own), TASK_ROWS)]
    tasks = []
    for split, start in parts:
        files = [row.image for row in rows[split][start : start + TASK_ROWS]]
        into = tuple(store.region(split, start, len(files)) for store in stores)
        tasks.append(DecodeTask(source, files, tuple(store.image_size for store in stores), into))
    bar = bars.add_task("packing images", total=sum(map(len, rows.values())))
    digests: Digests = {split: [] for split in rows}
    for (split, start), decoded in zip(parts, pmap(decode_images, tasks), strict=True):
        bars.advance(bar, len(decoded.digests))
        digests[split] += decoded.digests
        for i, store in enumerate(stores):
            store.note(split, start, decoded.key, [cut(digest, i) for digest in decoded.digests])
    return digests
