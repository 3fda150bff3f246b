"""Regress values at points by a Gaussian process whose kernel is fitted to them.

Formulas are those of Rasmussen & Williams, 2006, "Gaussian Processes for Machine Learning". N points were seen, M are
asked for, each has D coordinates. The kernel is Matérn's of ν = 5/2, with a length for every coordinate.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

Floats = npt.NDArray[np.float64]

#: Points that the kernel is fitted to, in a time that grows with their cube. All points are predicted from.
FITTED = 80
#: Steps of that fit.
_STEPS = 25
#: Spreads from the centre that bound the fit.
_FAR = 6.0
#: What is added to the diagonal, as a share of the variance, when a covariance is not positive definite.
_JITTERS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
#: The loss of a kernel whose covariance cannot be decomposed.
_IMPOSSIBLE = 1e25


@dataclass(frozen=True)
class Prior:
    """What is believed of a kernel before a value is seen: normal distributions of logarithms, (mean, spread)."""

    variance: tuple[float, float]
    lengths: tuple[tuple[float, float], ...]  # one a coordinate
    noise: tuple[float, float]

    @property
    def centre(self) -> Floats:
        return np.array([each[0] for each in (self.variance, *self.lengths, self.noise)])

    @property
    def spread(self) -> Floats:
        return np.array([each[1] for each in (self.variance, *self.lengths, self.noise)])


@dataclass(frozen=True)
class Kernel:
    """Matérn's kernel of ν = 5/2, and the noise of the values."""

    variance: float
    length_D: Floats
    noise: float

    def __call__(self, x_MD: Floats, y_ND: Floats) -> Floats:
        """Return the covariance without noise, [M, N]."""
        return self.variance * _matern(math.sqrt(5) * cdist(x_MD / self.length_D, y_ND / self.length_D))


def _matern(r: Floats) -> Floats:
    return (1 + r + r * r / 3) * np.exp(-r)


def _kernel_of(theta: Floats) -> Kernel:
    return Kernel(math.exp(theta[0]), np.exp(theta[1:-1]), math.exp(theta[-1]))


def fit_kernel(x_ND: Floats, z_N: Floats, prior: Prior) -> tuple[Kernel, str]:
    """Find the kernel of the highest posterior density. Returns it, and why it is the prior's centre if the fit failed.

    Args:
        x_ND: the points; those beyond `FITTED` are left out, evenly.
        z_N: their values, standardised.
        prior: of the kernel.
    """
    if not len(x_ND):
        return _kernel_of(prior.centre), ""
    some = np.unique(np.linspace(0, len(x_ND) - 1, min(FITTED, len(x_ND))).astype(int))
    loss = _Loss(x_ND[some], z_N[some], prior)
    ends = [(mean - _FAR * std, mean + _FAR * std) for mean, std in zip(prior.centre, prior.spread, strict=True)]
    try:
        found = minimize(loss, prior.centre, jac=True, bounds=ends, method="L-BFGS-B", options={"maxiter": _STEPS})
    except (np.linalg.LinAlgError, ValueError, FloatingPointError) as error:
        return _kernel_of(prior.centre), f"{type(error).__name__}: {error}"
    if not np.isfinite(found.x).all() or not found.fun < _IMPOSSIBLE:
        return _kernel_of(prior.centre), "no kernel explains the values"
    return _kernel_of(found.x), ""


class _Loss:
    """The negative logarithm of likelihood times prior, and its slope."""

    def __init__(self, x_ND: Floats, z_N: Floats, prior: Prior) -> None:
        self._z_N, self._centre, self._spread = z_N, prior.centre, prior.spread
        self._count = len(x_ND)
        self._squares = ((x_ND[:, None] - x_ND) ** 2).reshape(self._count**2, -1)  # [N * N, D]

    def __call__(self, theta: Floats) -> tuple[float, Floats]:
        count = self._count
        variance, inverse_D, noise = math.exp(theta[0]), np.exp(-2 * theta[1:-1]), math.exp(theta[-1])
        r_NN = np.sqrt(5 * (self._squares @ inverse_D)).reshape(count, count)
        decay_NN = np.exp(-r_NN)
        k_NN = variance * (1 + r_NN + r_NN * r_NN / 3) * decay_NN
        root_NN, failed = dpotrf(k_NN + noise * np.eye(count), lower=1)
        if failed:
            return _IMPOSSIBLE, np.zeros_like(theta)
        weights_N = dpotrs(root_NN, self._z_N, lower=1)[0]
        lower_NN = np.tril(dpotri(root_NN, lower=1)[0])
        inverse_NN = lower_NN + np.tril(lower_NN, -1).T
        # Half of it is the slope of the likelihood by the covariance (equation 5.9).
        slope_NN = inverse_NN - np.outer(weights_N, weights_N)
        by_square_NN = slope_NN * variance * (1 + r_NN) * decay_NN
        slope = np.array([
            0.5 * (slope_NN * k_NN).sum(),
            *(5 / 6 * inverse_D * (by_square_NN.ravel() @ self._squares)),
            0.5 * noise * np.trace(slope_NN),
        ])  # fmt: skip
        off = (theta - self._centre) / self._spread
        value = 0.5 * self._z_N @ weights_N + np.log(np.diag(root_NN)).sum() + 0.5 * off @ off
        return float(value), slope + off / self._spread


class Posterior:
    """What values at points say of values at others."""

    def __init__(self, kernel: Kernel, x_ND: Floats, z_N: Floats) -> None:
        self.kernel, self._x_ND, self._z_N = kernel, x_ND, z_N
        self._condition()

    def __call__(self, x_MD: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the values without their noise, [M] each."""
        similar_MN = self.kernel(x_MD, self._x_ND)
        explained_NM = solve_triangular(self._root_NN, similar_MN.T, lower=True, check_finite=False)
        std_M = np.sqrt(np.maximum(self.kernel.variance - (explained_NM**2).sum(axis=0), 1e-12))
        return similar_MN @ self._weights_N, std_M

    def mean(self, x_MD: Floats) -> Floats:
        """Return the mean alone, [M], which takes a fraction of the time."""
        mean_M: Floats = self.kernel(x_MD, self._x_ND) @ self._weights_N
        return mean_M

    def believe(self, x_MD: Floats) -> None:
        """Take what is predicted at points for true (the constant liar of Ginsbourger et al., 2010, at the mean)."""
        z_M = self.mean(x_MD)
        self._x_ND, self._z_N = np.concatenate([self._x_ND, x_MD]), np.concatenate([self._z_N, z_M])
        self._condition()

    def _condition(self) -> None:
        k_NN = self.kernel(self._x_ND, self._x_ND) + self.kernel.noise * np.eye(len(self._x_ND))
        self._root_NN = _cholesky(k_NN, self.kernel.variance)
        weights_N: Floats = cho_solve((self._root_NN, True), self._z_N, check_finite=False)
        self._weights_N = weights_N


def _cholesky(k_NN: Floats, variance: float) -> Floats:
    """Decompose a covariance. The diagonal is raised as far as it must be where rounding has made it indefinite."""
    for jitter in (0.0, *_JITTERS):
        try:
            return np.asarray(np.linalg.cholesky(k_NN + jitter * variance * np.eye(len(k_NN))), np.float64)
        except np.linalg.LinAlgError:
            continue
    raise np.linalg.LinAlgError("the covariance of the trials is not positive definite")
