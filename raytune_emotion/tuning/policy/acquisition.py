"""Compute acquisition functions: the expected improvement of each candidate."""

import numpy as np
from scipy.special import log_ndtr, ndtr

from raytune_emotion.tuning.policy.gaussian_process import Floats

_LOG_2PI = float(np.log(2 * np.pi))
#: Number of standard deviations below which the asymptote of the expected improvement is used.
_TAIL = -25.0


def _density(z_M: Floats) -> Floats:
    density_M: Floats = np.exp(-0.5 * (z_M * z_M + _LOG_2PI))
    return density_M


def expected_improvement(mean_M: Floats, std_M: Floats, best: float) -> Floats:
    """Return the expected amount by which a normal variable is below the best value, [M] (Jones et al., 1998)."""
    z_M = (best - mean_M) / std_M
    gain_M: Floats = std_M * (z_M * ndtr(z_M) + _density(z_M))
    return gain_M


def expected_fall(mean_M: Floats, std_M: Floats, best: float) -> Floats:
    """Return the expected amount by which a log-normal variable is below the best value, [M].

    Args:
        mean_M: means of the logarithms.
        std_M: standard deviations of the logarithms.
        best: logarithm of the best value.
    """
    z_M = (best - mean_M) / std_M
    # This is the formula for the price of a put option (Black & Scholes, 1973).
    fall_M: Floats = np.exp(best) * ndtr(z_M) - np.exp(mean_M + 0.5 * std_M * std_M) * ndtr(z_M - std_M)
    return np.maximum(fall_M, 0.0)


def log_expected_improvement(mean_M: Floats, std_M: Floats, best: float) -> Floats:
    """Return the logarithm of the expected improvement, [M], which is finite even for tiny improvements.

    After Ament et al., 2023, "Unexpected improvements to expected improvement for Bayesian optimization".
    """
    z_M = (best - mean_M) / std_M
    near_M = np.clip(z_M, _TAIL, 0.0)
    # Logarithm of z Φ(z) + φ(z) = φ(z) (1 + z Φ(z) / φ(z)); in the tail, of the asymptote φ(z) / z².
    log_density_M = -0.5 * (z_M * z_M + _LOG_2PI)
    ratio_M = near_M * np.exp(log_ndtr(near_M) + 0.5 * (near_M * near_M + _LOG_2PI))
    inside_M = np.log(np.maximum(1 + ratio_M, 1e-300))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        above_M = np.log(z_M * ndtr(z_M) + _density(z_M))
        h_M = np.where(z_M > 0, above_M, log_density_M + np.where(z_M < _TAIL, -2 * np.log(-z_M), inside_M))
    log_gain_M: Floats = np.log(std_M) + h_M
    return log_gain_M


def expected_improvement_of_front(
    mean_M: Floats, std_M: Floats, cost_M: Floats, seen_N: Floats, cost_N: Floats, most: float
) -> Floats:
    """Return the expected growth of the area above a front of value and cost, [M].

    This is the expected hypervolume improvement (Emmerich et al., 2006) for a known cost: a candidate can improve the
    front at its own cost and at all higher costs.

    Args:
        mean_M: means of the candidates' values, which are normal variables, [M].
        std_M: their standard deviations, [M].
        cost_M: costs of the candidates, [M].
        seen_N: observed values, [N], N > 0; below the lowest observed cost, the front is at the worst of them.
        cost_N: costs of the observed values, [N].
        most: upper bound of the costs in the area; at least the largest of cost_N.
    """
    order = np.argsort(cost_N, kind="stable")
    least_N = np.minimum.accumulate(seen_N[order])
    step = np.flatnonzero(np.diff(least_N, prepend=np.inf))
    starts = [-np.inf, *cost_N[order][step]]
    ends = [*starts[1:], most]
    gain_M = np.zeros_like(mean_M)
    for value, start, end in zip([seen_N.max(), *least_N[step]], starts, ends, strict=True):
        width_M = np.maximum(0.0, end - np.maximum(start, cost_M))
        gain_M += width_M * expected_improvement(mean_M, std_M, float(value))
    return gain_M
