"""Validate the rows of a folder, and write a store's manifest and its list of rejected rows."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.progress import Progress

from raytune_emotion.data import shard_format
from raytune_emotion.data.decode import UndecodableImage, decode_at_sizes, ignore_decoder_warnings
from raytune_emotion.data.faces import Faces, Fault, Flaw, Kind, Row, Scan, sentences
from raytune_emotion.data.packing.blocks import Digest, digest_at_size
from raytune_emotion.data.parallel import Map
from raytune_emotion.data.progress import count_results
from raytune_emotion.data.shard_format import Manifest, ShardEntry, SplitEntry
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import File, Location

_TRIED_PX = 32
_FILES_PER_TASK = 128


@dataclass(frozen=True)
class Content:
    """Content of the stores of a folder, and rejected rows."""

    faces: Faces
    classes: tuple[str, ...]
    rows: Mapping[str, Sequence[Row]]  # by split
    digests: Mapping[str, Sequence[Digest]]  # by split
    faults: Sequence[Fault]
    skip_bad: bool


def read_rows(faces: Faces, classes: tuple[str, ...], pmap: Map, bars: Progress, *, skip_bad: bool) -> Scan:
    """Read the annotations of a folder.

    Raises:
        UserError: a split has no row with a valid annotation.
    """
    scan = faces.scan(classes, count_results(pmap, bars, "reading annotations", faces.annotations))
    _refuse_empty(faces, {split: len(rows) for split, rows in scan.rows.items()}, scan.faults, classes, skip_bad)
    return scan


def validate_rows(
    faces: Faces,
    classes: tuple[str, ...],
    scan: Scan,
    digests: Mapping[str, Sequence[Digest]],
    pmap: Map,
    bars: Progress,
    *,
    skip_bad: bool,
) -> Content:
    """Collect all faults, including those of images without a valid annotation, and return the content to pack.

    Raises:
        UserError: there are faults, and skip_bad is false; a split has no valid row.
    """
    found = [
        (split, row.image.name, digest)
        for split, rows in scan.rows.items()
        for row, digest in zip(rows, digests[split], strict=True)
    ]
    for split, files in scan.unlabelled.items():
        tasks = [
            (faces.location, files[start : start + _FILES_PER_TASK]) for start in range(0, len(files), _FILES_PER_TASK)
        ]
        tried = count_results(pmap, bars, "trying other images", len(files))(_try_images, tasks) if tasks else []
        results = (wrong for part in tried for wrong in part)
        found += [(split, file.name, wrong) for file, wrong in zip(files, results, strict=True)]
    undecodable = [
        Fault(split, name, Flaw(Kind.UNDECODABLE, what)) for split, name, what in found if isinstance(what, str)
    ]
    faults = sorted([*scan.faults, *undecodable], key=lambda f: (f.split, f.file, f.flaw.kind.value))
    if faults and not skip_bad:
        raise UserError(
            [
                *sentences(faces, faults, classes),
                f"{faces.source}: nothing is packed because of these faults; repair them, or leave these rows out"
                " with --skip-bad",
            ]
        )
    good = {split: sum(isinstance(digest, bytes) for digest in own) for split, own in digests.items()}
    _refuse_empty(faces, good, faults, classes, skip_bad)
    return Content(faces, classes, scan.rows, digests, faults, skip_bad)


def write_manifest(
    dest: Location, content: Content, i: int, image_size: int, entries: Mapping[str, Sequence[ShardEntry]]
) -> None:
    """Write all files of the store of the i-th size except its shards. The manifest comes last."""
    if content.skip_bad:
        with dest.write(shard_format.REJECTED) as path, path.open("w", encoding="utf-8", newline="") as file:
            rejected = ((f.split, f.file, f.reason) for f in content.faults)
            csv.writer(file).writerows([("split", "file", "reason"), *rejected])
    held = (
        (split, row.id, pixels, row.probs)
        for split, rows in content.rows.items()
        for row, digest in zip(rows, content.digests[split], strict=True)
        if (pixels := digest_at_size(digest, i))
    )
    manifest = Manifest(
        format=shard_format.FORMAT,
        version=shard_format.VERSION,
        fingerprint=shard_format.fingerprint(image_size, content.classes, held),
        image_size=image_size,
        classes=content.classes,
        rejected=len({(fault.split, content.faces.row_of(fault)) for fault in content.faults}),
        splits={
            split: SplitEntry(rows=sum(entry.rows for entry in own), shards=tuple(own))
            for split, own in entries.items()
        },
    )
    with dest.write(shard_format.MANIFEST) as path:
        path.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _try_images(task: tuple[Location, Sequence[File]]) -> list[str | None]:
    """Return the fault of each image; None for a valid one."""
    location, files = task
    found: list[str | None] = []
    with ignore_decoder_warnings():
        for content in location.read_all([file.name for file in files]):
            try:
                decode_at_sizes(content, (_TRIED_PX,))
            except UndecodableImage as error:
                found.append(str(error))
            else:
                found.append(None)
    return found


def _refuse_empty(
    faces: Faces, good: Mapping[str, int], faults: Sequence[Fault], classes: tuple[str, ...], skip_bad: bool
) -> None:
    if empty := [split for split, rows in good.items() if not rows]:
        told = sentences(faces, faults, classes)
        # The faults of its rows explain an empty split, unless they are to be skipped.
        explained = set() if skip_bad else {fault.split for fault in faults}
        raise UserError([*told, *(faces.empty_split_fault(split) for split in empty if split not in explained)])
