"""Measure packed images per core-second, relative to PIL's decoding of the same files, and the errors of drafts.

PIL opens a file, converts it to RGB and loads it. It does not resize, keep, check or write the pixels. It runs in one
process, and in one process per core, because two cores may be less than twice as fast as one. `decode_image` also turns
pictures upright and resizes them. In the next row, the pixels are also hashed. `pack` also reads annotations, and
writes and syncs shards, in this process and in one process per core, which are started for it. Core-seconds are those
of all processes, so this rate does not depend on the disk. The rate by the clock is given beside it. Several sizes are
packed in one pass, and one after the other.

All ways take turns, round by round. A ratio is the median over the rounds of the ratios within a round.

Errors are those of drawn faces, and of a photograph that comes with matplotlib, saved with quality 92.
"""

import gc
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import cbook
from PIL import Image

from benchmarks import Table
from raytune_emotion.data.affectnet import SPLITS
from raytune_emotion.data.decode import decode_image, pixels_digest
from raytune_emotion.data.packing.pack import pack_sizes
from raytune_emotion.data.synthetic import draw_face, draw_point, write_sample
from raytune_emotion.storage.locations import Folder, Location

#: Sides of files and stores, px, and number of files: fewer if each takes long.
CASES = ((224, (224,), 400), (224, (96,), 400), (640, (96,), 100), (224, (64, 96, 112, 224), 200))
#: Number of names of each file in the folder, so that there is work for some seconds.
NAMES = 16
#: Packing uses all files, and the compared ways every second one.
PART = 2
ROUNDS = 8
CORES = os.cpu_count() or 1
#: Name of PIL in as many processes as packing, and number of files per task.
PILS, PART_ROWS = f"PIL, {CORES} processes", 128
#: Sides of files and of decoded pictures for the errors of drafts; and number of drawn faces.
ERRORS, DRAWN = ((224, 112), (224, 96), (224, 64), (640, 224), (640, 96)), 20


def run() -> Table:
    gc.freeze()  # the garbage collector must not scan imports that the command pack does not have
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        for file_px, store_px, faces in CASES:
            folder = Path(scratch) / f"{faces} of {file_px}"
            if not folder.exists():
                write_sample(folder, train=faces, val=1, image_size=file_px)
                _name_again(folder, NAMES)
            files = sorted((folder / SPLITS["train"] / "images").iterdir())
            stores = Path(scratch) / "stores"
            by_core, by_clock = _take_turns(_ways(folder, files, store_px, stores), stores)
            case = f"{file_px} -> {', '.join(map(str, store_px))}"
            for name, rates in by_core.items():
                of_pil, of_pils = (
                    statistics.median(own / pil for own, pil in zip(own_rates[name], own_rates[reference], strict=True))
                    for own_rates, reference in ((by_core, "PIL"), (by_clock, PILS))
                )
                rows.append((case, name, *_spread(rates), of_pil, *_spread(by_clock[name]), of_pils))
        errors = _errors(Path(scratch) / "face.jpg")
    columns = (
        "px", "way", "images/core-s", "least", "most", "times PIL", "images/s by the clock", "least ", "most ",
        "times PIL on all cores",
    )  # fmt: skip
    return Table(columns, rows, [f"{CORES} cores.", *errors])


def _ways(folder: Path, every: Sequence[Path], sizes: tuple[int, ...], dest: Path) -> dict[str, Callable[[], int]]:
    """Return the ways to decode or pack. Each returns its number of processed images."""
    files = every[::PART]

    def pil() -> int:
        return _load(files)

    def pils() -> int:
        parts = [every[start : start + PART_ROWS] for start in range(0, len(every), PART_ROWS)]
        # Forked processes begin at once.
        with ProcessPoolExecutor(CORES, mp_context=get_context("fork")) as executor:
            return sum(executor.map(_load, parts))

    def decode() -> int:
        for file in files:
            decode_image(file, sizes[0])
        return len(files)

    def hashed() -> int:
        for file in files:
            pixels_digest(decode_image(file, sizes[0]).data)
        return len(files)

    def atomic_write(workers: int, passes: Sequence[Sequence[int]]) -> Callable[[], int]:
        def pack_whole() -> int:
            for own in passes:
                dests: dict[int, Location] = {size: Folder(dest / str(size)) for size in own}
                stores = pack_sizes(Folder(folder), dests, workers=workers)
            return sum(split.rows for store in stores.values() for split in store.splits.values()) // len(own)

        return pack_whole

    packs = {f"pack, {n} process{'es' * (n > 1)}": atomic_write(n, [sizes]) for n in (1, CORES)}
    if len(sizes) > 1:
        return {"PIL": pil, PILS: pils, **packs, "pack, size by size": atomic_write(CORES, [[size] for size in sizes])}
    return {"PIL": pil, PILS: pils, "decode_image": decode, "and hashed": hashed, **packs}


def _load(files: Sequence[Path]) -> int:
    for file in files:
        with Image.open(file) as image:
            image.convert("RGB").load()
    return len(files)


def _take_turns(
    ways: dict[str, Callable[[], int]], stores: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return images per core-second and per second of each way in every round, after a warm-up round."""
    by_core: dict[str, list[float]] = {name: [] for name in ways}
    by_clock: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):
        for name, way in ways.items():
            core_seconds, clock = _core_seconds(), time.perf_counter()
            images = way()
            by_core[name].append(images / (_core_seconds() - core_seconds))
            by_clock[name].append(images / (time.perf_counter() - clock))
            shutil.rmtree(stores, ignore_errors=True)
    return {name: rates[1:] for name, rates in by_core.items()}, {name: rates[1:] for name, rates in by_clock.items()}


def _spread(rates: list[float]) -> tuple[float, float, float]:
    return statistics.median(rates), min(rates), max(rates)


def _core_seconds() -> float:
    """Return the core-seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _name_again(folder: Path, names: int) -> None:
    """Link each row of the training split under more names."""
    for file in [*(folder / SPLITS["train"]).glob("*/*")]:
        for number in range(1, names):
            os.link(file, file.with_name(f"{number}-{file.name}"))


def _errors(file: Path) -> list[str]:
    """Describe the differences of drafts to fully decoded pictures, and of these to the saved ones."""
    notes = []
    for file_px, store_px in ERRORS:
        for name, faces in (("drawn faces", _drawn(file_px)), ("a photograph", [_photographed(file_px)])):
            drafted, saved = [], []
            for face in faces:
                face.save(file, "JPEG", quality=92)
                full = _squeezed(Image.open(file), store_px)
                drafted.append(np.abs(decode_image(file, store_px) - full))
                saved.append(np.abs(_squeezed(face, store_px) - full))
            notes.append(
                f"{file_px} -> {store_px} px, {name}: the draft is {np.mean(drafted):.2f} of 255 in the mean and "
                f"{np.max(drafted)} at most from the full decoding, and that {np.mean(saved):.2f} and {np.max(saved)} "
                f"from what was saved as JPEG."
            )
    return notes


def _squeezed(image: Image.Image, size: int) -> npt.NDArray[np.int64]:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int64)


def _drawn(size: int) -> list[Image.Image]:
    rngs = [np.random.default_rng(seed) for seed in range(DRAWN)]
    return [Image.fromarray(draw_face(*draw_point(rng), rng, size)) for rng in rngs]


def _photographed(size: int) -> Image.Image:
    with Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).open("rb") as file:
        return Image.open(file).convert("RGB").crop((130, 40, 400, 310)).resize((size, size), Image.Resampling.BICUBIC)
