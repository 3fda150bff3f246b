"""Compute losses between a target distribution and logits, one value per row: [B, K], [B, K] -> [B].

Each uses log-softmax and computes logarithms in log space. Value and gradient are finite for all finite logits and for
targets with zeros.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

Loss = Callable[[Tensor, Tensor], Tensor]


def mse(logits_BK: Tensor, prob_BK: Tensor) -> Tensor:
    """Return the mean squared error: mean_k (p - q)^2."""
    return (prob_BK - logits_BK.softmax(-1)).square().mean(-1)


def l1(logits_BK: Tensor, prob_BK: Tensor) -> Tensor:
    """Return the mean absolute error: mean_k |p - q|."""
    return (prob_BK - logits_BK.softmax(-1)).abs().mean(-1)


def kl(logits_BK: Tensor, prob_BK: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of prediction from target, in nats: sum_k p ln(p / q), 0 ln 0 = 0."""
    return torch.xlogy(prob_BK, prob_BK).sum(-1) + ce(logits_BK, prob_BK)


def ce(logits_BK: Tensor, prob_BK: Tensor) -> Tensor:
    """Return the cross-entropy, in nats: -sum_k p ln q."""
    return -(prob_BK * log_softmax(logits_BK, -1)).sum(-1)


def js(logits_BK: Tensor, prob_BK: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence, bits: (sum_k p log2(p / m) + sum_k q log2(q / m)) / 2, m = (p + q) / 2."""
    log_q_BK = log_softmax(logits_BK, -1)
    # The mean in log space is finite, because log q is. So no term is 0 * inf, forwards or backwards.
    log_m_BK = torch.logaddexp(prob_BK.log(), log_q_BK) - math.log(2)
    of_p_BK = torch.xlogy(prob_BK, prob_BK) - prob_BK * log_m_BK
    of_q_BK = log_q_BK.exp() * (log_q_BK - log_m_BK)
    return (of_p_BK + of_q_BK).sum(-1) / (2 * math.log(2))


#: Losses of a mixture, by the name of their weight in the configuration.
LOSSES: dict[str, Loss] = {"mse": mse, "l1": l1, "kl": kl, "ce": ce, "js": js}


def mixture(weights: Mapping[str, float]) -> Loss:
    """Return the weighted sum of losses. Losses of weight 0 are not computed.

    Args:
        weights: non-negative weights by name in LOSSES, such as `LossConfig.weights`.
    """
    parts = [(LOSSES[name], weight) for name, weight in weights.items() if weight > 0]

    def loss(logits_BK: Tensor, prob_BK: Tensor) -> Tensor:
        return torch.stack([weight * part(logits_BK, prob_BK) for part, weight in parts]).sum(0)

    return loss
