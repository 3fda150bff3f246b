"""The optimizer, and the schedule of its step size: a function of the step and of the reports so far, without state."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from raytune_emotion.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Adam, AdamW or SGD with momentum, all fused; the model is on its device already.

    As is customary for transformers, and harmless elsewhere, biases, the scales of normalisation layers and whatever
    the model itself exempts (`no_weight_decay`: class tokens, position embeddings) are not decayed.

    The step size is set by the loop, before every step.
    """
    exempt: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        sgd = SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        # Where a scaler skips the first step, as it often does, the kernel would leave a momentum that was never set.
        # With one of zero the first step is the same.
        for parameter in [*decayed, *plain] if config.momentum else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = AdamW if config.name == "adamw" else Adam
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def lr_factor(
    config: OptimConfig,
    *,
    step: int,
    steps_per_epoch: int,
    total_steps: int,
    val_js: Sequence[float],
    evals_per_epoch: int,
) -> float:
    """What `optim.lr` is multiplied by at a step.

    Every schedule starts with the linear warm-up, if there is one. `cosine` then falls to zero at the end of the run;
    `plateau` falls by its factor at the reports.

    Args:
        config: the schedule.
        step: optimizer steps taken before this one.
        steps_per_epoch: of the run.
        total_steps: of the run.
        val_js: of the reports so far, in order.
        evals_per_epoch: reports an epoch.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2
    if config.schedule == "plateau":
        return config.plateau_factor ** plateau_falls(val_js, config.plateau_patience * evals_per_epoch)
    return 1.0


def plateau_falls(val_js: Sequence[float], patience: float) -> int:
    """How often a step size has fallen by now that falls after `patience` reports without a new best.

    After a fall the count starts anew, and the best stays.
    """
    best, waited, falls = math.inf, 0, 0
    for value in val_js:
        if value < best:
            best, waited = value, 0
        else:
            waited += 1
            if waited >= patience:
                waited, falls = 0, falls + 1
    return falls


def reports_since_best(val_js: Sequence[float]) -> int:
    """How many reports there have been since the least value, the first of equals."""
    return len(val_js) - 1 - min(range(len(val_js)), key=val_js.__getitem__)
