"""Show what happens when memory is short: batches that are too large, the retry of a trial, and the choice of `auto`.

On a CPU, which does not report a lack of memory, only the retry is shown, and nothing is short.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import Table
from benchmarks.consistency import Row, check_all, settings_of
from benchmarks.training import DEVICE, SETUP, config, faces, open_repeated
from raytune_emotion.config import RunConfig
from raytune_emotion.data.loader import clear_cache
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.learn.device import is_out_of_memory, limit_memory
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.throughput import measure
from raytune_emotion.tuning.execution.job import Job, train_on, train_with_retry
from raytune_emotion.tuning.execution.resources import Resources

BACKBONE = {"cpu": "test_resnet", "cuda": "resnet50"}[DEVICE.type]
#: A share of a GPU in which a batch of this size has no room.
SHARE, ROWS = 0.05, 256


def run() -> Iterator[Table]:
    """Make all checks. One that fails is a row."""
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        yield from check_all(_checks(open_store(faces(Path(scratch))), Path(scratch)))


def _checks(store: Store, scratch: Path) -> dict[str, Callable[[], list[Row]]]:
    checks: dict[str, Callable[[], list[Row]]] = {"retry": partial(_retry, store, scratch)}
    if DEVICE.type == "cuda":
        for name, share, rows in (("out of memory by share", SHARE, ROWS), ("out of memory by size", 1.0, 4096)):
            checks[name] = partial(_out_of_memory, name, share, rows, store)
        checks["auto"] = partial(_too_large_for_auto, store)
    return checks


def _retry(store: Store, scratch: Path) -> list[Row]:
    """Train a trial whose batch is too large for its share: it gets smaller micro-batches until they fit."""
    settings = settings_of(BACKBONE, "fp32", **{"train.batch_size": ROWS, "train.epochs": 1}).to_flat()
    resources = Resources(1, 1.0, SHARE if DEVICE.type == "cuda" else 0.0)
    job = Job("retry", str(scratch / "retry"), str(store.path), settings, resources)
    try:
        (report,) = train_with_retry(job, partial(train_on, device=DEVICE))
    finally:
        limit_memory(DEVICE, 1.0)
    trained = f"trained with {report['accumulate']} micro-batches"
    return [("out of memory in a trial", BACKBONE, "fp32", trained, f"batch of {ROWS}, {_most()}")]


def _out_of_memory(name: str, share: float, rows_of_batch: int, store: Store) -> list[Row]:
    """Train a batch that is too large for this share of the memory, then the same in micro-batches."""
    limit_memory(DEVICE, share)
    large = RunConfig.from_flat(
        settings_of(BACKBONE, "fp32").to_flat()
        | {
            "train.batch_size": rows_of_batch,
            # One report per step.
            "train.evals_per_epoch": SETUP.rows * SETUP.repeats // rows_of_batch,
        }
    )
    smaller = RunConfig.from_flat(large.to_flat() | {"train.accumulate": 64, "train.epochs": 1})
    try:
        return [
            (what, BACKBONE, "fp32", *_ending(settings, store.path))
            for what, settings in ((name, large), (f"{name}, then smaller", smaller))
        ]
    finally:
        limit_memory(DEVICE, 1.0)


def _ending(settings: RunConfig, place: Path) -> tuple[str, str]:
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in fit(settings, open_repeated(place), device=DEVICE, resident=settings.train.accumulate == 1):
            break
        ending = "trained"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        ending = type(error).__name__
    gc.collect()
    clear_cache()
    torch.cuda.empty_cache()
    return ending, _most()


def _most() -> str:
    return f"at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB" if DEVICE.type == "cuda" else ""


def _too_large_for_auto(store: Store) -> list[Row]:
    # A batch has at most all rows of the store.
    rows = min(8192, len(store.train.ids))
    settings = config(BACKBONE, "fp32", 8192).to_flat()
    found = measure({BACKBONE: settings}, {SETUP.size: str(store.path)}, DEVICE, cores=4, counts=(1, 2), seconds=0.1)
    return [(f"auto with a batch of {rows}", BACKBONE, "fp32", str(found), "rates by number of trials")]
