"""One training step on the device in each precision, against the same step in fp64 on the CPU.

The rows go the way that they go in training: from the store to the device, augmented there, through the model and back.
An error is the L2 norm of the difference over that of the reference: of the pixels that the model sees, its logits, the
losses of the rows, and the gradient of all parameters together. Random weights, no dropout.

On a GPU also how often the host waits for it in a step of `fit`: torch counts the calls that do, in reports of more
steps and of fewer.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import Table
from benchmarks.training import DEVICE, SETUP, STUDY, config, faces
from raytune_emotion.config import RunConfig
from raytune_emotion.data.augment import augment, decide
from raytune_emotion.data.loader import batches, place
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.learn import losses
from raytune_emotion.learn.loop import make_plan, start, train_segment
from raytune_emotion.learn.model import build_model, mean_std

ROWS = 16
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CPU = torch.device("cpu")


def run() -> Table:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = open_store(faces(Path(scratch)))
        for backbone in SETUP.backbones:
            settings = config(backbone, "fp32", **STUDY, **{"model.dropout": 0.0, "augment.colour": 0.3})
            reference = _step(settings, store, CPU, "fp64")
            for precision in PRECISIONS[DEVICE.type]:
                step = _step(settings, store, DEVICE, precision)
                pairs = zip(step, reference, strict=True)
                errors = (((value - right).norm() / right.norm()).item() for value, right in pairs)
                rows.append((backbone, precision, *errors))
        notes = [f"{SETUP.size} px, {ROWS} rows. fp32 is as torch has it: with TF32 in cuDNN."]
        if DEVICE.type == "cuda":
            everything = config(backbone, "bf16", **STUDY, **{"train.ema_decay": 0.9, "train.accumulate": 2})
            waits = _waits(everything, store, 12) - _waits(everything, store, 4)
            notes.append(f"In 8 steps the host waits {waits} times for the GPU.")
    columns = ("model", "precision", "pixels", "logits", "losses", "gradient")
    return Table(columns, rows, notes)


def _waits(settings: RunConfig, store: Store, steps: int) -> int:
    """How often the host waits for the GPU in the training of one report, of so many steps."""
    plan = dataclasses.replace(make_plan(settings, store, DEVICE), stops=(steps,))
    run = start(settings, store, DEVICE, plan, fresh=True)
    train_segment(run, [])  # what it makes once is there then
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_segment(run, [])
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _step(settings: RunConfig, store: Store, device: torch.device, precision: str) -> tuple[Tensor, ...]:
    """Pixels, logits, losses of the rows and gradient, each float64 on the CPU."""
    rows = [np.arange(ROWS)]
    (batch,) = batches(place(store, device)[0], rows, device)
    (decisions,) = decide(settings.augment, rows, seed=0, epoch=0, side=store.image_size, device=device)
    model = build_model(settings).to(device, memory_format=torch.channels_last)
    mean, std = mean_std(model)
    x_BCHW, prob_BK = augment(batch, decisions, mean=mean, std=std)
    if precision == "fp64":
        model, x_BCHW, prob_BK = model.double(), x_BCHW.double(), prob_BK.double()
    with torch.autocast(device.type, DTYPES[precision], enabled=precision in ("bf16", "fp16")):
        logits_BK = model(x_BCHW)
    logits_BK = logits_BK.to(prob_BK.dtype)
    loss_B = losses.mixture(settings.loss.weights)(logits_BK, prob_BK)
    # As the gradient scaler does, so that fp16 holds the small ones; powers of two change nothing else.
    scale = 2.0**10
    (loss_B.mean() * scale).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return tuple(value.detach().double().cpu() for value in (x_BCHW, logits_BK, loss_B, gradient / scale))
