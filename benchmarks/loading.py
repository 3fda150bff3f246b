"""Measure images per second in batches: with the loader, the usual pipeline, and a bare copy of the same bytes.

The usual pipeline is PIL, torchvision's transforms and torch's DataLoader over the JPEG files from which the store was
packed. Its worker processes have started and delivered an epoch before they are timed. Both ways deliver normalised
float32 batches, on a GPU if there is one. There, the loader also reads a split that is kept on the device. The
hand-over is the store's gather of rows in random order into one buffer, from the store's files, and from as many files
as a large store has. A bare copy of equally many consecutive rows into the same buffer is the upper bound.

All ways take turns, round by round. A ratio is the median over the rounds of the ratios within a round.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from benchmarks import Table
from raytune_emotion.data.affectnet import SPLITS
from raytune_emotion.data.augment import normalise
from raytune_emotion.data.loader import DeviceSplit, batches, cache_on_device, epoch_order
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.store import Split, Store, open_store
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.learn import malloc

#: Number of rows whose pixels are several times larger than a CPU's last-level cache.
ROWS = 2000
FILE_PX = 224
SIZES = (224, 96)
BATCH = 64
ROUNDS = 5
#: Number of passes over the rows in a round, for ways that take milliseconds per pass.
PASSES = 10
CORES = os.cpu_count() or 1
#: Number of files that the usual pipeline reads in a round, different ones in each.
USUAL_ROWS = min(ROWS, 128 * CORES)
WORKERS = sorted({0, 1, 2, CORES})

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: Function that delivers batches, and returns their number of images.
Pipeline = Callable[[], int]

LOADER, RESIDENT = "loader, normalised", "loader, normalised, from the device"
GATHER, COPY = "hand-over, uint8", "bare copy, uint8"
#: Number of files. A store of hundreds of thousands of images has dozens.
FILES = 32
MANY = f"hand-over, uint8, of {FILES} files"
USUAL = {workers: f"usual pipeline, {workers} workers" for workers in WORKERS}


class Faces(Dataset[torch.Tensor]):
    """A folder's pictures, read in the usual way."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files = files
        self.transform = transforms.Compose(
            [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.files[row]) as image:
            x_CHW: torch.Tensor = self.transform(image.convert("RGB"))
        return x_CHW


def run() -> Table:
    malloc.keep_freed_memory()  # as in a process that trains
    rows: list[tuple[object, ...]] = []
    notes = [f"{ROWS} faces, JPEG files of {FILE_PX} px; {torch.get_num_threads()} threads; batches of {BATCH}."]
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        faces = Path(scratch) / "faces"
        write_sample(faces, train=ROWS, val=1, image_size=FILE_PX)
        for size in SIZES:
            pack(faces, Path(scratch) / str(size), image_size=size)
            store = open_store(Path(scratch) / str(size))
            files = [faces / SPLITS["train"] / "images" / f"{i}.jpg" for i in store.train.ids]
            pipelines = _pipelines(store, files)
            rates = _take_turns(pipelines)
            usual = max(USUAL.values(), key=lambda name: statistics.median(rates[name]))
            for name, rate in rates.items():
                of_usual, of_copy = (
                    statistics.median(own / other for own, other in zip(rate, rates[reference], strict=True))
                    for reference in (usual, COPY)
                )
                rows.append((size, name, statistics.median(rate), min(rate), max(rate), of_usual, of_copy))
    columns = ("px", "way", "images/s", "least", "most", "times the best usual", "times the bare copy")
    return Table(columns, rows, notes)


def _pipelines(store: Store, files: list[Path]) -> dict[str, Pipeline]:
    split, size = store.train, store.image_size
    if size == FILE_PX:
        _compare(split, Faces(files, size))
    order = iter(range(10**9))
    buffer = torch.empty((BATCH, size, size, 3), dtype=torch.uint8, pin_memory=DEVICE.type == "cuda").numpy()
    placed, _ = cache_on_device(store, DEVICE)

    def rows() -> list[np.ndarray]:
        order_N = epoch_order(len(split), 0, next(order))
        return [order_N[start : start + BATCH] for start in range(0, len(split) // BATCH * BATCH, BATCH)]

    def load(source: Split | DeviceSplit) -> int:
        stream = (batch for _ in range(PASSES) for batch in batches(source, rows(), DEVICE))
        return _count(normalise(batch.x_BHWC, MEAN, STD) for batch in stream)

    def gather(source: Split) -> int:
        return sum(len(source.gather(rows_B, out=buffer)) for _ in range(PASSES) for rows_B in rows())

    def copy() -> int:
        parts = [
            shard[start : start + BATCH]
            for shard in split.shards
            for start in range(0, len(shard) // BATCH * BATCH, BATCH)
        ]
        for part in PASSES * parts:
            np.copyto(buffer, part)
        return PASSES * len(parts) * BATCH

    def usual(workers: int) -> Pipeline:
        faces = Faces(files, size)
        loader = DataLoader(
            faces,
            BATCH,
            sampler=RandomSampler(faces, num_samples=USUAL_ROWS),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return lambda: _count(x_BCHW.to(DEVICE) for x_BCHW in loader)

    loaders = {LOADER: partial(load, split)} | ({RESIDENT: partial(load, placed)} if placed is not split else {})
    parts = [part for shard in split.shards for part in np.array_split(shard, FILES // len(split.shards))]
    gathers = {GATHER: partial(gather, split), MANY: partial(gather, replace(split, shards=tuple(parts)))}
    return {**loaders, **{USUAL[workers]: usual(workers) for workers in WORKERS}, **gathers, COPY: copy}


def _count(stream: Iterable[torch.Tensor]) -> int:
    """Count the images of the batches after they have arrived."""
    count = sum(map(len, stream))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return count


def _take_turns(pipelines: dict[str, Pipeline]) -> dict[str, list[float]]:
    """Return the images per second of each way in every round, after a warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(1 + ROUNDS):
        for name, pipeline in pipelines.items():
            began = time.perf_counter()
            images = pipeline()
            rates[name].append(images / (time.perf_counter() - began))
    return {name: rate[1:] for name, rate in rates.items()}


def _compare(split: Split, faces: Faces) -> None:
    """Check that both ways deliver the same batch if no picture is resized."""
    rows_B = np.arange(BATCH)
    (batch,) = batches(split, [rows_B], CPU)
    usual = torch.stack([faces[row] for row in rows_B.tolist()])
    torch.testing.assert_close(normalise(batch.x_BHWC, MEAN, STD), usual, atol=1e-5, rtol=1e-5, check_stride=False)
