"""Compare results of equivalent ways: captured or launched steps, images on the device or in files, resumed or not.

An error of weights is the L2 norm of the difference of two runs' weights, divided by that of the change of one run's
weights. On a GPU, two runs of the same settings also differ, because its sums have no fixed order. The other rows must
be compared with that row. The benchmark also shows how often the host waits for the device. Settings that change the
step of the optimizer have a row each.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import Table
from benchmarks.training import DEVICE, STUDY, config, faces
from raytune_emotion.config import RunConfig
from raytune_emotion.data.loader import batches, cache_on_device
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.learn.evaluation import evaluate
from raytune_emotion.learn.loop import Plan, Run, fit, make_plan, start, train_segment
from raytune_emotion.learn.run_folder import LAST

BACKBONES = {"cpu": {"test_resnet": "fp32"}, "cuda": {"resnet18": "fp32", "efficientnet_b0": "bf16"}}[DEVICE.type]
EVERYTHING = {
    **STUDY,
    "augment.colour": 0.3,
    "augment.grey": 0.1,
    "augment.mixup": 0.2,
    "augment.cutmix": 0.5,
    "train.ema_decay": 0.9,
    "train.accumulate": 2,
    "train.smoothing": 0.1,
    "train.balance": 0.5,
}
SGD = {"optim.name": "sgd", "optim.lr": 1e-2}
#: Steps of a run; and of one whose first half trains only the head: each half captures its own graph.
STEPS, STEPS_FREEZING = 8, 12
#: By name: backbone, precision and settings.
SETTINGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "SGD": ("resnet18", "fp32", SGD),
    "SGD, clipped": ("resnet18", "fp16", {**SGD, "train.grad_clip": 0.1}),
    "drop path": ("efficientnet_b0", "bf16", {"model.drop_path": 0.2}),
    "layer decay": ("resnet18", "bf16", {"optim.layer_decay": 0.8}),
    "RandAugment": ("resnet18", "bf16", {"augment.operations": 2}),
    "average, micro-batches, mixtures, weighted rows": ("resnet18", "bf16", EVERYTHING),
    "ViT": ("vit_base_patch16_224", "bf16", {}),
}
if DEVICE.type == "cpu":
    SETTINGS = {name: ("test_resnet", "fp32", more) for name, (_, _, more) in SETTINGS.items() if name != "ViT"}


Row = tuple[object, ...]


def run() -> Iterator[Table]:
    """Make all checks. One that fails is a row."""
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        yield from check_all(_checks(open_store(faces(Path(scratch))), Path(scratch)))


def check_all(checks: Mapping[str, Callable[[], list[Row]]]) -> Iterator[Table]:
    """Make checks by name, and yield a table after each.

    Raises:
        RuntimeError: at the end, some have failed.
    """
    rows: list[Row] = []
    failed: list[str] = []
    for name, check in checks.items():
        try:
            rows += check()
        except Exception as error:
            failed.append(name)
            rows.append((name, "", "", f"{type(error).__name__}: {error}", "failed"))
        yield Table(("check", "model", "precision", "result", "of what"), [*rows])
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _checks(store: Store, scratch: Path) -> dict[str, Callable[[], list[Row]]]:
    """Return the checks by name."""
    checks: dict[str, Callable[[], list[Row]]] = {"images on the device and from files": partial(_images, store)}
    for backbone, precision in BACKBONES.items():
        checks[f"launched again, {backbone}"] = partial(_runs, backbone, precision, store)
    for name, (backbone, precision, more) in SETTINGS.items():
        checks[name] = partial(_captured_or_not, name, settings_of(backbone, precision, **more), store)
    backbone, precision = next(iter(BACKBONES.items()))
    # The head alone is trained in the first half of the steps.
    epochs = STEPS_FREEZING / 2 / make_plan(settings_of(backbone, precision), store, DEVICE).steps_per_epoch
    freezing = settings_of(backbone, precision, **{"model.freeze_epochs": epochs})
    checks["frozen at first"] = partial(_captured_or_not, "frozen at first", freezing, store, steps=STEPS_FREEZING)
    if DEVICE.type == "cuda":
        checks |= {f"waits of the host, {kind}": partial(_waits, kind, store) for kind in ("bf16", "fp16")}
    for resumed, kind in BACKBONES.items():
        checks[f"resumed, {resumed}"] = partial(_resumed, resumed, kind, store, scratch)
    # The last one, because it could break the device for this process.
    checks["a capture that fails"] = partial(_failed_capture, backbone, precision, store)
    return checks


def settings_of(backbone: str, precision: str, **more: object) -> RunConfig:
    short = {"train.epochs": 3, "train.evals_per_epoch": 1, "optim.lr": 1e-4}
    return RunConfig.from_flat({**config(backbone, precision, **STUDY).to_flat(), **short, **more})


def _images(store: Store) -> list[Row]:
    some = [np.arange(i, 1024, 8)[:32] for i in range(8)]
    here, _ = cache_on_device(store, DEVICE)
    pairs = zip(batches(here, some, DEVICE), batches(store.train, some, DEVICE), strict=True)
    differing = sum(int((a.x_BHWC != b.x_BHWC).sum()) + int((a.prob_BK != b.prob_BK).sum()) for a, b in pairs)
    if differing:
        raise RuntimeError(f"{differing} pixels differ")
    return [("images on the device and from files", "", "", differing, "pixels that differ")]


def _runs(backbone: str, precision: str, store: Store) -> list[Row]:
    settings = settings_of(backbone, precision)
    plan = make_plan(settings, store, DEVICE)
    origin, first = _weights(settings, store, plan, steps=0), _weights(settings, store, plan)
    found = [("launched twice", _error(_weights(settings, store, plan), first, origin))]
    if DEVICE.type == "cuda":
        found.append(("captured and launched", _error(_weights(settings, store, plan, capture=True), first, origin)))
    return [(name, backbone, precision, error, "error of weights") for name, error in found]


def _weights(
    settings: RunConfig, store: Store, plan: Plan, *, steps: int = STEPS, capture: bool = False
) -> torch.Tensor:
    run = start(settings, store, DEVICE, plan, fresh=True)
    if steps:
        _train(run, steps, capture=capture)
    return _weights_of(run)


def _train(run: Run, steps: int, *, capture: bool) -> float:
    """Train some steps, all launched, or some of them captured; return the mean loss."""
    if not capture:
        run.step.capture = False
    loss, _ = train_segment(dataclasses.replace(run, plan=dataclasses.replace(run.plan, stops=(steps,))), [])
    if capture != run.step.captured:
        raise RuntimeError("no step was captured" if capture else "a step was captured")
    return loss


def _weights_of(run: Run) -> torch.Tensor:
    average = [*run.average.module.parameters()] if run.average is not None else []
    return torch.cat([p.detach().double().flatten().cpu() for p in (*run.model.parameters(), *average)])


def _captured_or_not(name: str, settings: RunConfig, store: Store, steps: int = STEPS) -> list[Row]:
    """Compare captured steps with launched ones; on a CPU, launched ones with launched ones."""
    plan = make_plan(settings, store, DEVICE)
    runs = [start(settings, store, DEVICE, plan, fresh=True) for _ in range(2)]
    origin = _weights_of(runs[0])
    losses = [
        _train(run, steps, capture=capture) for run, capture in zip(runs, (False, DEVICE.type == "cuda"), strict=True)
    ]
    launched, captured = map(_weights_of, runs)
    of_what = (
        f"error of weights after {steps} steps; mean loss {losses[0]:.6f}, difference {losses[1] - losses[0]:+.1e}"
    )
    row = (name, settings.model.backbone, settings.train.precision, _error(captured, launched, origin), of_what)
    return [row]


def _failed_capture(backbone: str, precision: str, store: Store) -> list[Row]:
    """Compare the steps of a model that waits for the device, which no graph can, with those of the same model."""
    settings = settings_of(backbone, precision)
    plan = make_plan(settings, store, DEVICE)
    origin, launched = _weights(settings, store, plan, steps=0), _weights(settings, store, plan)
    run = start(settings, store, DEVICE, plan, fresh=True)
    run.model.register_forward_pre_hook(_wait_for_pixels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_segment(dataclasses.replace(run, plan=dataclasses.replace(plan, stops=(STEPS,))), [])
    said = sum("cannot be captured" in str(warning.message) for warning in caught)
    of_what = f"error of weights, launched on, with {said} warning; captured: {run.step.captured}"
    return [("a capture that fails", backbone, precision, _error(_weights_of(run), launched, origin), of_what)]


def _error(weights: torch.Tensor, other: torch.Tensor, origin: torch.Tensor) -> float:
    return float((weights - other).norm() / (other - origin).norm())


def _wait_for_pixels(model: nn.Module, given: tuple[torch.Tensor]) -> None:
    given[0].sum().item()


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
