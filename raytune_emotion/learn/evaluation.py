"""Evaluate a model on a split: compute predictions and the means of all metrics, also over several workers."""

import contextlib
import math
import time

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from raytune_emotion.data.augment import normalise
from raytune_emotion.data.loader import DeviceSplit, batches
from raytune_emotion.data.store import Split, Store
from raytune_emotion.learn.device import exact_fp32
from raytune_emotion.learn.metrics import MetricSums, distances_of, logits_of, per_sample
from raytune_emotion.learn.model import mean_std

#: Default number of rows that are predicted at once; and the largest side of images, px, for which it is not reduced.
ROWS, _SIDE = 128, 224


def rows_of_side(side: int) -> int:
    """Return how many images are predicted at once: fewer if they are large.

    A process on a CPU that needs too much memory is killed; only a GPU reports it.

    Args:
        side: of the images, px.
    """
    return max(1, min(ROWS, ROWS * _SIDE**2 // side**2))


def evaluate(
    model: nn.Module,
    split: Split | DeviceSplit,
    *,
    classes: tuple[str, ...],
    device: torch.device,
    rows: int = ROWS,
) -> dict[str, float]:
    """Return the means of all metrics over a whole split. Each of n workers evaluates every n-th row.

    The computation is in exact fp32, without TF32, independent of the training precision. Therefore `predict` gives the
    same numbers on any device. The model is left in evaluation mode.

    Args:
        model: the bare model: a wrapper would make workers with fewer batches wait for the others.
        split: N rows.
        classes: K names, which determine the ground distance of `emd_va`.
        device: device of the model.
        rows: number of rows per batch.
    """
    return means_of_metrics(*predict_share(model, split, device=device, rows=rows), classes)


def predict_share(
    model: nn.Module, split: Split | DeviceSplit, *, device: torch.device, rows: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict a worker's share of a split: every n-th row for n workers. See `evaluate`.

    Returns:
        Logits and targets of these rows, [B, K] each.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return predict_rows(model, split, np.arange(rank, len(split), workers), device=device, rows=rows)


def predict_rows(
    model: nn.Module,
    split: Split | DeviceSplit,
    rows_N: npt.NDArray[np.int64],
    *,
    device: torch.device,
    rows: int = ROWS,
    until: float = math.inf,
    mirror: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict rows of a split, in their order. See `evaluate`.

    Args:
        model: the bare model.
        split: the split.
        rows_N: numbers of the rows.
        device: device of the model.
        rows: number of rows per batch; on a CPU fewer if the images are large.
        until: moment of `time.monotonic` after which no further batch begins, except the first one.
        mirror: whether to predict the mirror images.

    Returns:
        Logits and targets of the predicted rows, [N, K] each.
    """
    mean, std = mean_std(model)
    # The empty tensors serve a worker without rows.
    n_classes = split.prob_NK.shape[1]
    logits, probs = [torch.empty(0, n_classes, device=device)], [torch.empty(0, n_classes, device=device)]
    model.eval()
    if device.type == "cpu":
        rows = min(rows, rows_of_side(split.side))
    parts = (rows_N[i : i + rows] for i in range(0, len(rows_N), rows))
    with torch.inference_mode(), exact_fp32(), contextlib.closing(batches(split, parts, device)) as stream:
        for batch in stream:
            x_BHWC = batch.x_BHWC.flip(2) if mirror else batch.x_BHWC
            logits.append(model(normalise(x_BHWC, mean, std)))
            probs.append(batch.prob_BK)
            if time.monotonic() > until:
                break
        return torch.cat(logits), torch.cat(probs)


def means_of_metrics(logits_BK: torch.Tensor, prob_BK: torch.Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Return the means of all metrics over the rows of all workers."""
    sums = MetricSums()
    with torch.inference_mode():
        # Large parts save kernel launches, and 2048 rows still fit into a CPU's cache.
        for logits, prob in zip(torch.split(logits_BK, 2048), torch.split(prob_BK, 2048), strict=True):
            sums.add(per_sample(logits, prob, distances_of(classes)))
    return sums.means()


def baseline(store: Store) -> dict[str, float]:
    """Return the validation metrics of a model that always predicts the mean of the training targets.

    Every metric is finite, also if a class has no mass in training.
    """
    mean_K = torch.from_numpy(store.train.prob_NK.mean(axis=0, dtype=np.float64))
    prob_NK = torch.from_numpy(np.array(store.val.prob_NK))
    values = per_sample(logits_of(mean_K).expand(prob_NK.shape), prob_NK, distances_of(store.classes))
    return {name: value_N.mean().item() for name, value_N in values.items()}
