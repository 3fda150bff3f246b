"""Images that packing takes a core-second for, against PIL's decoding of the same files, and what drafts change.

PIL opens a file, converts it to RGB and loads it, in one process, and nothing else: it neither resizes, nor keeps,
checks or writes the pixels. The rows from it down to `pack` do more and more: `decode_image` turns upright and
resizes; `decode_images` also hashes and writes; `pack` also reads annotations, describes and syncs, once in this
process and once in one a core, which are started for it. Core-seconds are those of all processes, so the rate by them
does not depend on the disk; the rate by the clock is given beside it.

All take turns, round by round; a ratio is the median over the rounds of those within a round.
"""

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks import Table
from raytune_emotion.data.affectnet import SPLITS, DecodeTask, decode_image, decode_images
from raytune_emotion.data.sample import write_sample
from raytune_emotion.data.store import pack

#: Files' and store's sides in px, and how many files: fewer where they are large.
CASES = ((224, 224, 400), (224, 96, 400), (640, 96, 50))
#: Each file lies in the folder under so many names, so that there is work for some seconds.
NAMES = 8
#: Packing takes all files, and what is compared with it every fourth.
PART = 4
ROUNDS = 5
#: Pictures of a `DecodeTask`.
TASK = 50
#: Sides of drafts, in sides of the store's images, whose errors are told; and of how many pictures.
DRAFTS, COMPARED = (1, 2, 3), 100


def run() -> Table:
    rows: list[tuple[object, ...]] = []
    notes = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        for file_px, store_px, faces in CASES:
            folder = Path(scratch) / f"{file_px}"
            if not folder.exists():
                write_sample(folder, train=faces, val=1, image_size=file_px)
                _name_again(folder, NAMES)
            files = sorted((folder / SPLITS["train"] / "images").iterdir())
            ways = _ways(folder, files[::PART], store_px, Path(scratch))
            by_core, by_clock = _take_turns(ways)
            for name, rates in by_core.items():
                of_pil = statistics.median(own / pil for own, pil in zip(rates, by_core["PIL"], strict=True))
                rows.append((f"{file_px} -> {store_px}", name, *_spread(rates), of_pil, *_spread(by_clock[name])))
            notes += _errors([file for file in files if "-" not in file.name][:COMPARED], file_px, store_px)
    columns = (
        "px", "way", "images/core-s", "least", "most", "times PIL", "images/s by the clock", "least ", "most ",
    )  # fmt: skip
    return Table(columns, rows, [f"{os.cpu_count()} cores.", *notes])


def _ways(folder: Path, files: Sequence[Path], size: int, scratch: Path) -> dict[str, Callable[[], int]]:
    """Each returns how many images it has worked on."""
    written = scratch / "pixels"
    tasks = [
        DecodeTask([str(file) for file in files[start : start + TASK]], size, (str(written), start * size * size * 3))
        for start in range(0, len(files), TASK)
    ]

    def pil() -> int:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").load()
        return len(files)

    def decode() -> int:
        for file in files:
            decode_image(file, size)
        return len(files)

    def decode_and_write() -> int:
        written.write_bytes(b"")
        done = sum(len(decode_images(task)) for task in tasks)
        written.unlink()
        return done

    def whole(workers: int) -> Callable[[], int]:
        def pack_whole() -> int:
            dest = scratch / "store"
            store = pack(folder, dest, image_size=size, workers=workers)
            shutil.rmtree(dest)
            return len(store.train) + len(store.val)

        return pack_whole

    cores = os.cpu_count() or 1
    return {
        "PIL": pil,
        "decode_image": decode,
        "decode_images": decode_and_write,
        "pack, 1 process": whole(1),
        f"pack, {cores} processes": whole(cores),
    }


def _take_turns(ways: dict[str, Callable[[], int]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Images a core-second and images a second of each in every round, after one round that is not counted."""
    by_core: dict[str, list[float]] = {name: [] for name in ways}
    by_clock: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):
        for name, way in ways.items():
            core_seconds, clock = _core_seconds(), time.perf_counter()
            images = way()
            by_core[name].append(images / (_core_seconds() - core_seconds))
            by_clock[name].append(images / (time.perf_counter() - clock))
    return {name: rates[1:] for name, rates in by_core.items()}, {name: rates[1:] for name, rates in by_clock.items()}


def _spread(rates: list[float]) -> tuple[float, float, float]:
    return statistics.median(rates), min(rates), max(rates)


def _core_seconds() -> float:
    """Of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _name_again(folder: Path, names: int) -> None:
    """Links each row of the training split under more names."""
    for file in [*(folder / SPLITS["train"]).glob("*/*")]:
        for number in range(1, names):
            os.link(file, file.with_name(f"{number}-{file.name}"))


def _errors(files: Sequence[Path], file_px: int, store_px: int) -> list[str]:
    """How far pictures are from those that are decoded in full and then resized."""
    exact = [_decode(file, store_px, 0) for file in files]
    ways: dict[str, Callable[[Path], npt.NDArray[np.uint8]]] = {"decode_image": lambda f: decode_image(f, store_px)}
    for times in DRAFTS:
        if file_px // 2 >= times * store_px:
            ways[f"a draft of at least {times} times the side"] = lambda f, t=times: _decode(f, store_px, t * store_px)
    notes = []
    for name, way in ways.items():
        error = np.abs(np.stack([way(file) - whole.astype(int) for file, whole in zip(files, exact, strict=True)]))
        notes.append(
            f"{file_px} -> {store_px} px, {name}: {error.mean():.2f} of 255 in the mean and {error.max()} at most from "
            f"the full decoding."
        )
    return notes


def _decode(file: Path, size: int, draft: int) -> npt.NDArray[np.uint8]:
    with Image.open(file) as image:
        if draft:
            image.draft(None, (draft, draft))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
