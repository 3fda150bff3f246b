"""What a folder's stores are to hold, and what of the folder they are not: its faults."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from raytune_emotion.data import affectnet, shard_format
from raytune_emotion.data.affectnet import Fault, Kind, Row, Scan
from raytune_emotion.data.decode import DecodeTask, write_images
from raytune_emotion.data.packing.shard_writer import TASK_ROWS, Digests, cut
from raytune_emotion.data.parallel import Map
from raytune_emotion.data.progress import counted
from raytune_emotion.data.shard_format import Manifest, ShardEntry, SplitEntry
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Source, below, shown

_TRIED_PX = 32


def read_rows(source: Source, classes: tuple[str, ...], pmap: Map, bars: Progress) -> Scan:
    """The folder's rows, of which each split has some."""
    scan = affectnet.scan(source, classes, counted(pmap, bars, "reading annotations"))
    _refuse_empty(source, {split: len(rows) for split, rows in scan.rows.items()}, scan.faults, classes)
    return scan


@dataclass(frozen=True)
class Content:
    """What the stores of a folder hold, and do not."""

    classes: tuple[str, ...]
    rows: Mapping[str, Sequence[Row]]  # by split
    digests: Digests
    faults: Sequence[Fault]
    skip_bad: bool


def checked(
    source: Source,
    classes: tuple[str, ...],
    scan: Scan,
    digests: Digests,
    pmap: Map,
    bars: Progress,
    *,
    skip_bad: bool,
) -> Content:
    """What is packed, if it may be. Pictures without a good annotation are tried too: all faults are told at once."""
    found = [
        (split, row.image.name, digest)
        for split, rows in scan.rows.items()
        for row, digest in zip(rows, digests[split], strict=True)
    ]
    for split, files in scan.unlabelled.items():
        parts = (files[start : start + TASK_ROWS] for start in range(0, len(files), TASK_ROWS))
        tasks = [DecodeTask(source, part, (_TRIED_PX,), ()) for part in parts]
        tried = counted(pmap, bars, "trying other images")(write_images, tasks) if tasks else []
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
    return Content(classes, scan.rows, digests, faults, skip_bad)


def describe(
    folder: Path, content: Content, i: int, image_size: int, entries: Mapping[Any, Sequence[ShardEntry]]
) -> None:
    """Writes all of a store but its shards; it is that of the i-th size."""
    if content.skip_bad:
        with (folder / shard_format.REJECTED).open("w", encoding="utf-8", newline="") as file:
            rejected = ((f.split, f.file, f.reason) for f in content.faults)
            csv.writer(file).writerows([("split", "file", "reason"), *rejected])
    held = (
        (split, row.id, pixels, row.probs)
        for split, rows in content.rows.items()
        for row, digest in zip(rows, content.digests[split], strict=True)
        if (pixels := cut(digest, i))
    )
    manifest = Manifest(
        format="raytune_emotion.store",
        version=shard_format.VERSION,
        fingerprint=shard_format.fingerprint(image_size, content.classes, held),
        image_size=image_size,
        classes=content.classes,
        rejected=len({(fault.split, fault.id) for fault in content.faults}),
        splits={
            split: SplitEntry(rows=sum(entry.rows for entry in own), shards=tuple(own))
            for split, own in entries.items()
        },
    )
    write_text(folder / shard_format.MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def _refuse_empty(source: Source, good: Mapping[str, int], faults: Sequence[Fault], classes: tuple[str, ...]) -> None:
    if empty := [affectnet.SPLITS[split] for split, rows in good.items() if not rows]:
        told = affectnet.sentences(source, faults, classes)
        raise UserError([*told, *(f"{shown(below(source, name))}: not one good row" for name in empty)])
