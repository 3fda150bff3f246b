"""Build the optimizer, and schedule its learning rate as a function of the step and of the reports so far."""

import math
from collections.abc import Sequence
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from raytune_emotion.config import OptimConfig
from raytune_emotion.learn.torch_patches import zero_momentum


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build Adam, AdamW or SGD with momentum, all fused. The model must already be on its device.

    Biases, scales of normalisation layers, and parameters that the model itself exempts (`no_weight_decay`: class
    tokens, position embeddings) are not decayed. This is usual for transformers, and harmless for other models.

    The loop sets the learning rate before every step. In each group it is multiplied by the group's `lr_scale`, if any,
    which follows from `layer_decay` (Bao et al., "BEiT", 2021). Groups with `head: True` hold the classifier's
    parameters.
    """
    exempt: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=exempt, layer_decay=config.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    groups = _with_head_apart(model, groups)
    if config.name == "sgd":
        sgd = SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        zero_momentum(sgd)
        return sgd
    kind = AdamW if config.name == "adamw" else Adam
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def _with_head_apart(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split groups of parameters so that each holds only parameters of the classifier, or none of them."""
    classifiers = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    modules = [classifiers] if isinstance(classifiers, nn.Module) else list(classifiers)
    head = {id(parameter) for module in modules for parameter in module.parameters()}
    split = []
    for group in groups:
        for is_head in (False, True):
            own = [parameter for parameter in group["params"] if (id(parameter) in head) == is_head]
            if own:
                split.append({**group, "params": own, "head": is_head})
    return split


def lr_factor(
    config: OptimConfig,
    *,
    step: int,
    steps_per_epoch: int,
    total_steps: int,
    val_js: Sequence[float],
    evals_per_epoch: int,
) -> float:
    """Return the factor on `optim.lr` at a step.

    Every schedule starts with the linear warm-up, if there is one. `cosine` then falls to zero at the end of the run;
    `plateau` falls by its factor at the reports.

    Args:
        config: the schedule.
        step: number of optimizer steps before this one.
        steps_per_epoch: steps per epoch of the run.
        total_steps: all steps of the run.
        val_js: validation JS of the reports so far, in order.
        evals_per_epoch: reports per epoch.
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
    """Return how often the learning rate has fallen, if it falls after `patience` reports without a new best.

    After a fall, the count restarts, and the best value is kept.
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
    """Return the number of reports after the lowest value (after the first of equal values)."""
    return len(val_js) - 1 - min(range(len(val_js)), key=val_js.__getitem__)
