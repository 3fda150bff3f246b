"""Compare one training step on the device in each precision with the same step in fp64 on the CPU; also validation.

The rows are processed as in training: copied from the store to the device, augmented there, and passed through the
model and back. An error is the L2 norm of the difference, divided by that of the reference: for the model's pixels, its
logits, the losses of the rows, and the gradient of all parameters together. Weights are random, without dropout. The
rows of validation have the error of its logits: in exact fp32, as in `evaluate`, and with TF32, as in cuDNN's default.
"""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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


def run() -> Iterator[Table]:
    columns = ("model", "precision", "pixels", "logits", "losses", "gradient")
    notes = [f"{SETUP.size} px, {ROWS} rows."]
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = open_store(faces(Path(scratch)))
        for backbone in SETUP.backbones:
            settings = config(backbone, "fp32", **{**STUDY, "model.dropout": 0.0, "augment.colour": 0.3})
            reference = _step(settings, store, CPU, "fp64")
            for precision in PRECISIONS[DEVICE.type]:
                step = _step(settings, store, DEVICE, precision)
                pairs = zip(step, reference, strict=True)
                errors = (((value - right).norm() / right.norm()).item() for value, right in pairs)
                rows.append((backbone, precision, *errors))
            for name, error in _validation(settings, store):
                rows.append((backbone, f"validation, {name}", "", error, "", ""))
            yield Table(columns, [*rows], notes)


def _validation(settings: RunConfig, store: Store) -> list[tuple[str, float]]:
    """Return the errors of the logits in evaluation mode."""
    model = build_model(settings).eval()
    mean, std = mean_std(model)
    x_BCHW = normalise(torch.from_numpy(store.val.gather(np.arange(ROWS))), mean, std)
    with torch.inference_mode():
        right = copy.deepcopy(model).double()(x_BCHW.double())
        model = model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x_BCHW = x_BCHW.to(DEVICE)
        found = []
        for name, context in (("exact", exact_fp32()), ("TF32", contextlib.nullcontext())):
            with context:
                logits_BK = model(x_BCHW).double().cpu()
            found.append((name, ((logits_BK - right).norm() / right.norm()).item()))
    return found


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
