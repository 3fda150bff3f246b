"""Provide losses on probabilities, with the same values as those on logits in `raytune_emotion.learn.losses`.

Each takes predictions [N, K] and targets [N, K], whose rows are probabilities, and returns the mean over the N rows.
Value and gradient are finite for all probabilities, including zeros and ones.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raytune_emotion.config import suggest_setting
from raytune_emotion.errors import UserError
from raytune_emotion.learn import losses


class MSELoss(nn.Module):
    """Mean squared error: mean_k (p - q)^2, as a mean over rows."""

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, [N, K], [N, K] -> scalar."""
        _check_shapes(predictions, targets)
        return (targets - predictions).square().mean()


class L1Loss(nn.Module):
    """Mean absolute error: mean_k |p - q|, as a mean over rows."""

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, [N, K], [N, K] -> scalar."""
        _check_shapes(predictions, targets)
        return (targets - predictions).abs().mean()


class _LogLoss(nn.Module):
    """A loss that takes logarithms of predictions.

    Args:
        epsilon: lower bound of the predicted probabilities. Gradients below it are kept, so that a model can recover
            from a zero.
    """

    loss: losses.Loss

    def __init__(self, epsilon: float = 1e-7) -> None:
        super().__init__()
        if not 0 < epsilon < 1:
            raise UserError(f"epsilon: expected a number between 0 and 1, got {epsilon!r}")
        self.epsilon = epsilon

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, [N, K], [N, K] -> scalar. Each row of predictions is divided by its sum."""
        _check_shapes(predictions, targets)
        # The logarithm of 1e-7 is -16 in every type except float16, which can hardly represent 1e-7.
        q_BK = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        q_BK = q_BK + (q_BK.clamp_min(self.epsilon) - q_BK).detach()
        return type(self).loss(q_BK.log(), targets.to(q_BK.dtype)).mean()

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon:g}"


class KLDivLoss(_LogLoss):
    """Kullback-Leibler divergence of the prediction from the target: sum_k p ln(p / q), nats, as a mean over rows."""

    loss = staticmethod(losses.kl)


class CrossEntropyLoss(_LogLoss):
    """Cross-entropy: -sum_k p ln q, nats, as a mean over rows."""

    loss = staticmethod(losses.ce)


class JSLoss(_LogLoss):
    """Jensen-Shannon divergence, in bits and in [0, 1], as a mean over rows."""

    loss = staticmethod(losses.js)


class CombinedLoss(nn.Module):
    """A weighted sum of losses: sum_i w_i L_i.

    Args:
        parts: pairs of a loss and its non-negative weight; at least one.
    """

    def __init__(self, parts: Iterable[tuple[nn.Module, float]]) -> None:
        super().__init__()
        pairs = list(parts)
        if not pairs:
            raise UserError("CombinedLoss: expected pairs of a loss and its weight, got none")
        if wrong := [weight for _, weight in pairs if not 0 <= weight < float("inf")]:
            raise UserError(f"CombinedLoss: expected weights of at least 0, got {weight!r}" for weight in wrong)
        self.losses = nn.ModuleList([loss for loss, _ in pairs])
        self.weights = tuple(float(weight) for _, weight in pairs)

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, [N, K], [N, K] -> scalar."""
        parts = [w * loss(predictions, targets) for loss, w in zip(self.losses, self.weights, strict=True)]
        return torch.stack(parts).sum()


_LOSSES: dict[str, type[nn.Module]] = {
    "mse": MSELoss,
    "l1": L1Loss,
    "kl": KLDivLoss,
    "ce": CrossEntropyLoss,
    "js": JSLoss,
}


def get_loss_function(name: str, epsilon: float = 1e-7) -> nn.Module:
    """Make a loss by its name.

    Args:
        name: `mse`, `l1`, `kl` (nats), `ce` (nats) or `js` (bits).
        epsilon: for losses that take logarithms: lower bound of the predicted probabilities.

    Raises:
        UserError: there is no such loss.
    """
    kind = _LOSSES.get(name)
    if kind is None:
        raise UserError(f"loss: expected one of {', '.join(_LOSSES)}, got {name!r}{suggest_setting(name, _LOSSES)}")
    return kind(epsilon) if issubclass(kind, _LogLoss) else kind()


def _check_shapes(predictions: Tensor, targets: Tensor) -> None:
    # torch would broadcast, and return a meaningless number.
    if predictions.shape != targets.shape:
        raise UserError(
            f"targets: expected the shape of the predictions, {tuple(predictions.shape)}, got {tuple(targets.shape)}"
        )
