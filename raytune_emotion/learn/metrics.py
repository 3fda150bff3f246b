"""How far predicted distributions are from their targets: one value a row, then means over a set of rows."""

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import log_softmax

from raytune_emotion.emotions import class_distances
from raytune_emotion.learn import losses


def per_sample(logits_BK: Tensor, prob_BK: Tensor, distances_KK: Tensor | None) -> dict[str, Tensor]:
    """Every metric of every row, computed in float64.

    `js` is in bits and in [0, 1], `kl` and `ce` are in nats, `emd` in class steps, `emd_va` in the unit of the
    distances; `clark` and `canberra` count a class that neither side gives mass as zero. `accuracy` is one where the
    likeliest class is the target's (the first, where the target has several). All but `cosine`, `intersection`
    and `accuracy` are better when smaller.

    Args:
        logits_BK: predictions before the softmax; B may be 0.
        prob_BK: targets, each row non-negative with sum one.
        distances_KK: the ground distance of `emd_va`, a metric; None leaves `emd_va` out.

    Returns:
        name -> [B], float64.

    Sources:
        Clark, Canberra, Chebyshev, cosine and intersection as in Geng, Label Distribution Learning, IEEE TKDE 28 (7),
        2016.
    """
    logits_BK, p_BK = logits_BK.double(), prob_BK.double()
    q_BK = log_softmax(logits_BK, -1).exp()
    diff_BK = p_BK - q_BK
    # The ratio of difference to sum is 0 / 0 only where the difference is 0.
    ratio_BK = diff_BK / (p_BK + q_BK).clamp_min(torch.finfo(torch.float64).tiny)
    values = {
        "js": losses.js(logits_BK, p_BK),
        "kl": losses.kl(logits_BK, p_BK),
        "ce": losses.ce(logits_BK, p_BK),
        "tvd": diff_BK.abs().sum(-1) / 2,
        "mse": losses.mse(logits_BK, p_BK),
        "l1": losses.l1(logits_BK, p_BK),
        "emd": diff_BK.cumsum(-1).abs().sum(-1),
    }
    if distances_KK is not None:
        values["emd_va"] = transport_cost(distances_KK.to(p_BK), diff_BK)
    return values | {
        "chebyshev": diff_BK.abs().amax(-1),
        "clark": ratio_BK.square().sum(-1).sqrt(),
        "canberra": ratio_BK.abs().sum(-1),
        "cosine": (p_BK * q_BK).sum(-1) / (p_BK.norm(dim=-1) * q_BK.norm(dim=-1)),
        "intersection": torch.minimum(p_BK, q_BK).sum(-1),
        "accuracy": (p_BK.argmax(-1) == q_BK.argmax(-1)).double(),
    }


def transport_cost(distances_KK: Tensor, diff_BK: Tensor) -> Tensor:
    """The least cost of moving the mass of one distribution to where another has it: exact optimal transport.

    As the ground distance is a metric, this is the transshipment problem: the supply p - q of each class flows to where
    it lacks, over arcs that cost their distance. Its dual, max f.(p - q) with f_i - f_j <= d_ij, has the same
    feasible set for every row, so one tree of arcs starts them all, and each row walks to its own optimal tree
    by dual simplex pivots, all rows of the batch at once. About 20 pivots for 13 classes; 0.2 s for 4,000 rows on
    one core. The result is within 2e-10 times the largest distance of the exact cost.

    Args:
        distances_KK: float64, a metric.
        diff_BK: float64, p - q, each row with sum zero; what it lacks of that counts as lying at the first class.

    Returns:
        [B], float64, in the unit of the distances.
    """
    n_rows, n_classes = diff_BK.shape
    arange = torch.arange(n_classes, device=diff_BK.device)
    # Costs in general position: without ties every pivot gains, so that no walk can go in circles. The constant part
    # keeps the triangle inequality strict, and the start feasible.
    jitter_KK = 1 + ((arange[:, None] * n_classes + arange) * 0.6180339887498949).remainder(1) / 2
    cost_KK = distances_KK + (1e-10 * distances_KK.amax()) * jitter_KK.to(distances_KK).fill_diagonal_(0)

    # A tree has K - 1 arcs; arc r carries flow cut_r . diff, where the entries of cut_r are constant on each side of
    # the arc, one higher on the side of its tail, and 0 on the root's. At the start, every class sends to the root.
    cut_BRK = torch.eye(n_classes, dtype=diff_BK.dtype, device=diff_BK.device)[1:].repeat(n_rows, 1, 1)
    potential_BK = cost_KK[:, 0].repeat(n_rows, 1)
    result_B = torch.zeros_like(diff_BK[:, 0])
    walking_B = torch.arange(n_rows, device=diff_BK.device)
    while len(walking_B):
        flow_B, leaving_B = torch.einsum("brk,bk->br", cut_BRK, diff_BK).min(1)
        result_B[walking_B] = (potential_BK * diff_BK).sum(-1)
        # NaN is not less than anything either, and ends the walk.
        unfit_B = flow_B < -1e-13
        walking_B, leaving_B, diff_BK = walking_B[unfit_B], leaving_B[unfit_B], diff_BK[unfit_B]
        potential_BK, cut_BRK = potential_BK[unfit_B], cut_BRK[unfit_B]

        # The arc that would carry a negative flow leaves; the cheapest that crosses its cut the other way enters.
        row_B = torch.arange(len(walking_B), device=diff_BK.device)
        cut_BK = cut_BRK[row_B, leaving_B]
        slack_BKK = cost_KK - potential_BK[:, :, None] + potential_BK[:, None, :]
        slack_BKK.masked_fill_(cut_BK[:, :, None] >= cut_BK[:, None, :], math.inf)
        step_B, arc_B = slack_BKK.flatten(1).min(1)
        tail_B, head_B = arc_B // n_classes, arc_B % n_classes
        potential_BK = potential_BK - step_B[:, None] * cut_BK
        crossing_BR = cut_BRK[row_B, :, tail_B] - cut_BRK[row_B, :, head_B]
        cut_BRK = cut_BRK + crossing_BR[:, :, None] * cut_BK[:, None, :]
        cut_BRK[row_B, leaving_B] = -cut_BK
    return result_B


@dataclasses.dataclass
class MetricSums:
    """Sums of metrics and the count of their rows, kept on the device, and divided once."""

    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds rows.

        Args:
            values: name -> [B], with the same names each time; B may be 0.
        """
        for name, value_B in values.items():
            self.sums[name] = self.sums.get(name, 0) + value_B.double().sum()
        self.count += len(next(iter(values.values())))

    def means(self) -> dict[str, float]:
        """The means over the rows of all workers: one reduction, one transfer to the host."""
        total = torch.stack(list(self.sums.values()))
        total = torch.cat([total, total.new_tensor([self.count])])
        if dist.is_initialized():
            dist.all_reduce(total)
        *sums, count = total.tolist()
        return {name: value / count for name, value in zip(self.sums, sums, strict=True)}


def distances_of(classes: tuple[str, ...]) -> Tensor | None:
    """The ground distance of `emd_va`, [K, K]; None where a class has no place in the valence-arousal plane."""
    distances_KK = class_distances(classes)
    return None if distances_KK is None else torch.from_numpy(distances_KK)
