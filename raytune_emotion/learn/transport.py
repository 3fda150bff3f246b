"""Compute the exact cost of optimal transport for a batch of distributions, on their device."""

import math

import torch
from torch import Tensor


def transport_cost(distances_KK: Tensor, diff_BK: Tensor) -> Tensor:
    """Return the least cost of transporting the mass of one distribution to another: exact optimal transport.

    Because the ground distance is a metric, this is the transshipment problem: the surplus p - q of some classes flows
    to the deficits of others, over arcs whose cost is their distance. The dual problem, max f.(p - q) with
    f_i - f_j <= d_ij, has the same feasible set for every row. Therefore all rows start from the same tree of arcs, and
    each reaches its own optimal tree by dual simplex pivots, in parallel over the batch. This takes about 20 pivots for
    13 classes, and 0.2 s for 4,000 rows on one core. The error is at most 2e-10 times the largest distance.

    Args:
        distances_KK: float64, a metric.
        diff_BK: float64, p - q, each row with sum zero; a remainder counts as mass at the first class.

    Returns:
        [B], float64, in the unit of the distances.
    """
    n_rows, n_classes = diff_BK.shape
    arange = torch.arange(n_classes, device=diff_BK.device)
    # Perturb the costs to avoid ties: then every pivot improves the result, and no row can cycle. The constant part
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
        # A comparison with NaN is false, so NaN ends the iteration of a row.
        unfit_B = flow_B < -1e-13
        walking_B, leaving_B, diff_BK = walking_B[unfit_B], leaving_B[unfit_B], diff_BK[unfit_B]
        potential_BK, cut_BRK = potential_BK[unfit_B], cut_BRK[unfit_B]

        # The arc with a negative flow leaves the tree; the cheapest arc across its cut in the other direction enters.
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
