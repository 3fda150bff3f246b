"""Compare one training step on the device in each precision with the same step in fp64 on the CPU; also validation.

The rows are processed as in training: copied from the store to the device, augmented there, and passed through the
model and back. An error is the L2 norm of the difference, divided by that of the reference: for the model's pixels, its
logits, the losses of the rows, and the gradient of all parameters together. Weights are random, without dropout. The
rows of validation have the error of its logits: in exact fp32, as in `evaluate`, and with TF32, as in cuDNN's default.

The references, which take the most time, are computed at the same time, each in a process with its share of the cores.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import Table
from benchmarks.training import DEVICE, SETUP, STUDY, config, faces
from raytune_emotion.config import RunConfig
from raytune_emotion.data.augment import augment, decide, normalise
from raytune_emotion.data.loader import batches, cache_on_device
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.learn import losses
from raytune_emotion.learn.device import exact_fp32
from raytune_emotion.learn.model import build_model, mean_std

ROWS = 4
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CPU = torch.device("cpu")

Doubles = npt.NDArray[np.float64]


def run() -> Iterator[Table]:
    columns = ("model", "precision", "pixels", "logits", "losses", "gradient")
    notes = [f"{SETUP.size} px, {ROWS} rows."]
    rows: list[tuple[object, ...]] = []
    failed: list[str] = []
    count = len(SETUP.backbones)
    threads = max(1, (os.cpu_count() or 1) // count)
    with (
        tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch,
        ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (threads,)) as processes,
    ):
        place = faces(Path(scratch))
        store = open_store(place)
        references = {processes.submit(reference, backbone, place): backbone for backbone in SETUP.backbones}
        for ended in as_completed(references):
            try:
                for row in _compare(references[ended], store, *ended.result()):
                    rows.append(row)
                    yield Table(columns, [*rows], notes)
            except Exception as error:  # the other models are compared
                failed.append(references[ended])
                yield Table(columns, [*rows], notes := [*notes, f"{failed[-1]}: {type(error).__name__}: {error}"])
    if failed:
        raise RuntimeError(f"{', '.join(failed)}: cannot be compared")


def _compare(
    backbone: str, store: Store, of_step: list[Doubles], of_validation: Doubles
) -> Iterator[tuple[object, ...]]:
    """Yield a row for a step in each precision, and for validation."""
    for precision in PRECISIONS[DEVICE.type]:
        step = _step(_settings(backbone), store, DEVICE, precision)
        yield backbone, precision, *map(_error, step, of_step)
    for name, logits_BK in _validation(_settings(backbone), store):
        yield backbone, f"validation, {name}", "", _error(logits_BK, of_validation), "", ""


def _settings(backbone: str) -> RunConfig:
    return config(backbone, "fp32", **{**STUDY, "model.dropout": 0.0, "augment.colour": 0.3})


def reference(backbone: str, place: Path) -> tuple[list[Doubles], Doubles]:
    """Compute in fp64 on the CPU what `_step` returns, and the logits of validation."""
    settings, store = _settings(backbone), open_store(place)
    model, x_BCHW = _validated(settings, store)
    with torch.inference_mode():
        logits_BK = model.double()(x_BCHW.double())
    return [value.numpy() for value in _step(settings, store, CPU, "fp64")], logits_BK.numpy()


def _error(value: Tensor, right: Doubles) -> float:
    expected = torch.from_numpy(right)
    return float((value - expected).norm() / expected.norm())


def _validated(settings: RunConfig, store: Store) -> tuple[nn.Module, Tensor]:
    """Return the model in evaluation mode, and its pixels of the first rows of validation."""
    model = build_model(settings).eval()
    mean, std = mean_std(model)
    return model, normalise(torch.from_numpy(store.val.gather(np.arange(ROWS))), mean, std)


def _validation(settings: RunConfig, store: Store) -> Iterator[tuple[str, Tensor]]:
    """Yield the logits in evaluation mode, in exact fp32 and with TF32."""
    model, x_BCHW = _validated(settings, store)
    model = model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        for name, context in (("exact", exact_fp32()), ("TF32", contextlib.nullcontext())):
            with context:
                yield name, model(x_BCHW.to(DEVICE)).double().cpu()


def _step(settings: RunConfig, store: Store, device: torch.device, precision: str) -> tuple[Tensor, ...]:
    """Return pixels, logits, losses of the rows and gradient, each float64 on the CPU."""
    rows = [np.arange(ROWS)]
    (batch,) = batches(cache_on_device(store, device)[0], rows, device)
    (decisions,) = decide(settings.augment, rows, seed=0, epoch=0, side=store.image_size, device=device)
    model = build_model(settings).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = mean_std(model)
    x_BCHW, prob_BK = augment(batch, decisions, mean=mean, std=std)
    if precision == "fp64":
        model, x_BCHW, prob_BK = model.double(), x_BCHW.double(), prob_BK.double()
    with torch.autocast(device.type, DTYPES[precision], enabled=precision in ("bf16", "fp16")):
        logits_BK = model(x_BCHW)
    logits_BK = logits_BK.to(prob_BK.dtype)
    loss_B = losses.mixture(settings.loss.weights)(logits_BK, prob_BK)
    # Scale the loss as the gradient scaler does, so that fp16 can represent small gradients. Powers of two are exact.
    scale = 2.0**10
    (loss_B.mean() * scale).backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return tuple(value.detach().double().cpu() for value in (x_BCHW, logits_BK, loss_B, gradient / scale))
