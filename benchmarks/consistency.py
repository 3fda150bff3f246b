"""Compare results of equivalent ways: captured or launched steps, images on the device or in files, resumed or not.

An error of weights is the L2 norm of the difference of two runs' weights, divided by that of the change of one run's
weights. On a GPU, two runs of the same settings also differ, because its sums have no fixed order. The other rows must
be compared with that row. The benchmark also shows the behaviour when memory is short, and how often the host waits for
the device.
"""

import contextlib
import dataclasses
import gc
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import Table
from benchmarks.training import DEVICE, SETUP, STUDY, config, faces, open_repeated
from raytune_emotion.config import RunConfig
from raytune_emotion.data.loader import batches, cache_on_device, clear_cache
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.learn.device import is_out_of_memory, limit_memory
from raytune_emotion.learn.evaluation import evaluate
from raytune_emotion.learn.loop import Run, fit, make_plan, start, train_segment
from raytune_emotion.learn.run_folder import LAST
from raytune_emotion.learn.throughput import measure

BACKBONES = {"cpu": {"test_resnet": "fp32"}, "cuda": {"resnet18": "fp32", "efficientnet_b0": "bf16"}}[DEVICE.type]
EVERYTHING = {
    **STUDY,
    "augment.colour": 0.3,
    "augment.grey": 0.1,
    "augment.mixup": 0.2,
    "augment.cutmix": 0.5,
    "train.ema_decay": 0.9,
    "train.accumulate": 2,
}


Row = tuple[object, ...]


def run() -> Iterator[Table]:
    """Make all checks. One that fails is a row."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = open_store(faces(Path(scratch)))
        for name, check in _checks(store, Path(scratch)).items():
            try:
                rows += check()
            except Exception as error:
                rows.append((name, "", "", f"{type(error).__name__}: {error}", "failed"))
            yield Table(("check", "model", "precision", "result", "of what"), [*rows])


def _checks(store: Store, scratch: Path) -> dict[str, Callable[[], list[Row]]]:
    """Return the checks by name. Those of memory are last, because they take all of it."""
    checks: dict[str, Callable[[], list[Row]]] = {"images on the device and from files": partial(_images, store)}
    for backbone, precision in BACKBONES.items():
        checks |= {
            f"launched again, {backbone}": partial(_runs, backbone, precision, store),
            f"resumed, {backbone}": partial(_resumed, backbone, precision, store, scratch),
        }
    if DEVICE.type == "cuda":
        checks |= {
            f"waits of the host, {precision}": partial(_waits, precision, store) for precision in ("bf16", "fp16")
        }
        checks["out of memory by size"] = partial(_out_of_memory, "out of memory by size", 1.0, 4096, store)
        checks["out of memory by share"] = partial(_out_of_memory, "out of memory by share", 0.05, 256, store)
        checks["auto"] = partial(_too_large_for_auto, store)
    return checks


def settings_of(backbone: str, precision: str, **more: object) -> RunConfig:
    short = {"train.epochs": 3, "train.evals_per_epoch": 1, "optim.lr": 1e-4}
    return RunConfig.from_flat({**config(backbone, precision, **STUDY).to_flat(), **short, **more})


def _images(store: Store) -> list[Row]:
    some = [np.arange(i, 1024, 8)[:32] for i in range(8)]
    here, _ = cache_on_device(store, DEVICE)
    pairs = zip(batches(here, some, DEVICE), batches(store.train, some, DEVICE), strict=True)
    differing = sum(int((a.x_BHWC != b.x_BHWC).sum()) + int((a.prob_BK != b.prob_BK).sum()) for a, b in pairs)
    return [("images on the device and from files", "", "", differing, "pixels that differ")]


def _runs(backbone: str, precision: str, store: Store) -> list[Row]:
    settings = settings_of(backbone, precision)
    plan = make_plan(settings, store, DEVICE)
    origin, first = _weights(settings, store, plan, steps=0), _weights(settings, store, plan)
    found = [("launched twice", _error(_weights(settings, store, plan), first, origin))]
    if DEVICE.type == "cuda":
        found.append(("captured and launched", _error(_weights(settings, store, plan, capture=True), first, origin)))
    return [(name, backbone, precision, error, "error of weights") for name, error in found]


def _weights(settings: RunConfig, store: Store, plan: Any, *, steps: int = 8, capture: bool = False) -> torch.Tensor:
    run = start(settings, store, DEVICE, plan, fresh=True)
    if not capture:
        run.step.capture = False
    if steps:
        train_segment(dataclasses.replace(run, plan=dataclasses.replace(plan, stops=(steps,))), [])
        assert capture == (run.step.captured)
    return torch.cat([p.detach().double().flatten().cpu() for p in run.model.parameters()])


def _error(weights: torch.Tensor, other: torch.Tensor, origin: torch.Tensor) -> float:
    return float((weights - other).norm() / (other - origin).norm())


def _resumed(backbone: str, precision: str, store: Store, scratch: Path) -> list[Row]:
    """Return the largest difference of val JS between an uninterrupted run and a resumed one."""
    settings = settings_of(backbone, precision)
    reports: dict[str, list[float]] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, starts in (("whole", 1), ("again", 1), ("resumed", settings.train.epochs)):
        folder = scratch / f"{name}-{backbone}"
        reports[name] = []
        for _ in range(starts):
            with contextlib.closing(fit(settings, store, device=DEVICE, folder=folder)) as running:
                some = itertools.islice(running, settings.train.epochs // starts)
                reports[name] += [report["val_js"] for report in some]
        state = load_file(folder / LAST)
        weights[name] = torch.cat([state[key].double().flatten() for key in sorted(state) if key.startswith("model.")])
    others = ("resumed", "again")
    js = [max(abs(a - b) for a, b in zip(reports["whole"], reports[name], strict=True)) for name in others]
    errors = [_error(weights[name], weights["whole"], 0 * weights["whole"]) for name in others]
    of_what = f"val JS, bits ({js[1]:.1e} between two whole runs); weights {errors[0]:.1e} ({errors[1]:.1e})"
    return [("resumed after each report", backbone, precision, js[0], of_what)]


def _out_of_memory(name: str, share: float, rows_of_batch: int, store: Store) -> list[Row]:
    """Train a batch that is too large for this share of the memory, then the same in micro-batches."""
    limit_memory(DEVICE, share)
    large = RunConfig.from_flat(
        settings_of("resnet50", "fp32").to_flat()
        | {
            "train.batch_size": rows_of_batch,
            # One report per step.
            "train.evals_per_epoch": SETUP.rows * SETUP.repeats // rows_of_batch,
        }
    )
    smaller = RunConfig.from_flat(large.to_flat() | {"train.accumulate": 64, "train.epochs": 1})
    try:
        return [
            (what, "resnet50", "fp32", *_ending(settings, store.path))
            for what, settings in ((name, large), (f"{name}, then smaller", smaller))
        ]
    finally:
        limit_memory(DEVICE, 1.0)


def _too_large_for_auto(store: Store) -> list[Row]:
    # A batch has at most all rows of the store.
    rows = min(8192, len(store.train.ids))
    settings = config("resnet50", "fp32", 8192).to_flat()
    found = measure({"resnet50": settings}, {SETUP.size: str(store.path)}, DEVICE, cores=4, counts=(1, 2), seconds=0.1)
    return [(f"auto with a batch of {rows}", "resnet50", "fp32", str(found), "rates by number of trials")]


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
    return ending, f"at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"


def _waits(precision: str, store: Store) -> list[Row]:
    """Count how often the host waits for the GPU in eight steps with all augmentations."""
    settings = RunConfig.from_flat(config("efficientnet_b0", precision).to_flat() | EVERYTHING)
    waits = _waits_until_report(settings, store, 12) - _waits_until_report(settings, store, 4)
    return [("waits of the host in 8 steps", "efficientnet_b0", precision, waits, "all augmentations")]


def _waits_until_report(settings: RunConfig, store: Store, steps: int) -> int:
    """Count how often the host waits for the GPU until a report after this number of steps."""
    plan = dataclasses.replace(make_plan(settings, store, DEVICE), stops=(steps,))
    run: Run = start(settings, store, DEVICE, plan, fresh=True)
    train_segment(run, [])  # the first segment makes everything that is made only once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_segment(run, [])
        torch.cuda.set_sync_debug_mode("default")
    evaluate(run.model, run.val, classes=store.classes, device=DEVICE)
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
