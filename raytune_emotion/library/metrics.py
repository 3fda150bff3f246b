"""Provide the metrics of the commands on probabilities, computed by the same code."""

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytune_emotion.config import suggest_setting
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.learn.metrics import distances_of, logits_of, per_sample

Probabilities: TypeAlias = Tensor | npt.NDArray[np.floating]

#: All metrics by name. `js` is in bits, `kl` and `ce` are in nats, `emd` is in class steps.
METRICS = (
    "js", "kl", "ce", "tvd", "mse", "l1", "emd", "emd_va", "chebyshev", "clark", "canberra", "cosine", "intersection",
    "accuracy",
)  # fmt: skip
_DISTANCE = "emd_va"


class MetricsCalculator:
    """Compute metrics between predicted and target distributions, in float64.

    Args:
        metrics: names in METRICS, in the order of the results; None: all that are possible for the classes.
        classes: K names, which determine the distances of `emd_va`. Classes other than the 13 emotions have none.

    Raises:
        UserError: a sentence for every unknown metric.
    """

    def __init__(self, metrics: Iterable[str] | None = None, *, classes: Iterable[str] = EMOTIONS) -> None:
        self._distances_KK = distances_of(tuple(classes))
        possible = [name for name in METRICS if name != _DISTANCE or self._distances_KK is not None]
        self.metrics = tuple(possible if metrics is None else metrics)
        if wrong := [name for name in self.metrics if name not in possible]:
            raise UserError(
                f"metrics: expected names of {', '.join(possible)}, got {name!r}{suggest_setting(name, possible)}"
                for name in wrong
            )

    def compute_all(self, predictions: Probabilities, targets: Probabilities) -> dict[str, float]:
        """Compute the mean of each metric over N rows.

        Args:
            predictions: [N, K], probabilities; each row is divided by its sum.
            targets: [N, K], probabilities.

        Returns:
            Name -> mean over the rows.

        Raises:
            UserError: the shapes differ, there is no row, or a number is negative, as in logits.
        """
        values = self.compute_per_sample(predictions, targets)
        return {name: value_N.mean().item() for name, value_N in values.items()}

    def compute_per_sample(self, predictions: Probabilities, targets: Probabilities) -> dict[str, Tensor]:
        """Compute each metric of every row.

        Args:
            predictions: see `compute_all`.
            targets: see `compute_all`.

        Returns:
            Name -> [N], float64.

        Raises:
            UserError: see `compute_all`.
        """
        q_NK, p_NK = (_tensor(given).detach().cpu().double() for given in (predictions, targets))
        if q_NK.shape != p_NK.shape or q_NK.ndim != 2 or not len(q_NK):
            raise UserError(
                f"predictions, targets: expected two of one shape [N, K], got {[*q_NK.shape]} and {[*p_NK.shape]}"
            )
        named = (("predictions", q_NK), ("targets", p_NK))
        if logits := [name for name, rows_NK in named if (rows_NK < 0).any()]:
            raise UserError(
                f"{name}: expected probabilities, got negative numbers; apply a softmax to logits" for name in logits
            )
        distances_KK = self._distances_KK if _DISTANCE in self.metrics else None
        if distances_KK is not None and len(distances_KK) != q_NK.shape[1]:
            raise UserError(
                f"predictions: expected {len(distances_KK)} columns, one a class, got {q_NK.shape[1]}; name the classes"
            )
        values = per_sample(logits_of(q_NK), p_NK, distances_KK)
        return {name: values[name] for name in self.metrics}


def _tensor(given: Probabilities) -> Tensor:
    # Copy, because a tensor cannot be a view of an array with negative strides.
    return given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, np.float64))
