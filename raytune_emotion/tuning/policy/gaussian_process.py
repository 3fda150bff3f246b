"""Predict values at points with a Gaussian process whose kernel is fitted to observed values.

The formulas are those of Rasmussen & Williams, 2006, "Gaussian Processes for Machine Learning". N points are observed,
M are predicted, and each has D coordinates. The kernel is Matérn's with ν = 5/2 and a length scale per coordinate.
"""

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

Floats = npt.NDArray[np.float64]

#: Largest number of points for the fit of the kernel, whose time grows with its cube. Predictions use all points.
FITTED = 80
#: Largest number of iterations of the fit.
_STEPS = 25
#: Bounds of the fit, in standard deviations of the prior.
_FAR = 6.0
#: Values added to the diagonal of a covariance that is not positive definite, as shares of the variance.
_JITTERS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
#: Held by the thread that has limited the process to one thread.
_LIMITED = threading.RLock()
#: Loss of a kernel whose covariance cannot be decomposed.
_IMPOSSIBLE = 1e25


@dataclass(frozen=True)
class Prior:
    """Log-normal priors of a kernel: mean and standard deviation of each logarithm."""

    variance: tuple[float, float]
    lengths: tuple[tuple[float, float], ...]  # one per coordinate
    noise: tuple[float, float]

    @property
    def centre(self) -> Floats:
        return np.array([each[0] for each in (self.variance, *self.lengths, self.noise)])

    @property
    def spread(self) -> Floats:
        return np.array([each[1] for each in (self.variance, *self.lengths, self.noise)])


@dataclass(frozen=True)
class Kernel:
    """Matérn's kernel with ν = 5/2, and the noise of the values."""

    variance: float
    length_D: Floats
    noise: float

    def __call__(self, x_MD: Floats, y_ND: Floats) -> Floats:
        """Return the covariance without noise, [M, N]."""
        x_MD, y_ND = (math.sqrt(5) / self.length_D * each for each in (x_MD, y_ND))
        # Rounding errors of the squared distances do no harm: near 0, the kernel is flat.
        k_MN: Floats = (x_MD * x_MD).sum(axis=1)[:, None] + (y_ND * y_ND).sum(axis=1) - 2 * x_MD @ y_ND.T
        np.maximum(k_MN, 0, out=k_MN)
        r_MN = np.sqrt(k_MN)
        # Compute variance (1 + r + r² / 3) exp(-r) in place, because memory takes most of the time.
        k_MN /= 3
        k_MN += r_MN
        k_MN += 1
        k_MN *= np.exp(np.negative(r_MN, out=r_MN), out=r_MN)
        k_MN *= self.variance
        return k_MN


def _kernel_of(theta: Floats) -> Kernel:
    return Kernel(math.exp(theta[0]), np.exp(theta[1:-1]), math.exp(theta[-1]))


def fit_kernel(x_ND: Floats, z_N: Floats, prior: Prior) -> tuple[Kernel, str]:
    """Find the kernel with the highest posterior density. If the fit fails, return the prior's centre and the reason.

    Args:
        x_ND: points; if there are more than `FITTED`, evenly spaced ones are used.
        z_N: their standardised values.
        prior: prior of the kernel.
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
    """The negative logarithm of likelihood times prior, and its gradient."""

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
        # Half of it is the gradient of the likelihood with respect to the covariance (equation 5.9).
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
    """The posterior distribution of values at other points, given observed values."""

    def __init__(self, kernel: Kernel, x_ND: Floats, z_N: Floats) -> None:
        self.kernel, self._x_ND = kernel, x_ND
        self._root_NN = _cholesky(_with_noise(kernel, x_ND), kernel.variance)
        weights_N: Floats = cho_solve((self._root_NN, True), z_N, check_finite=False)
        self._weights_N = weights_N

    def __call__(self, x_MD: Floats) -> tuple[Floats, Floats]:
        """Return the mean and the standard deviation of the values without noise, [M] each."""
        similar_MN = self.kernel(x_MD, self._x_ND)
        explained_NM = self._explain(similar_MN)
        std_M = np.sqrt(np.maximum(self.kernel.variance - np.einsum("nm,nm->m", explained_NM, explained_NM), 1e-12))
        return similar_MN @ self._weights_N, std_M

    def mean(self, x_MD: Floats) -> Floats:
        """Return only the mean, [M], in a fraction of the time."""
        mean_M: Floats = self.kernel(x_MD, self._x_ND) @ self._weights_N
        return mean_M

    def believe(self, x_MD: Floats) -> None:
        """Treat the predicted means at points as observed (the constant liar of Ginsbourger et al., 2010, at the mean).

        No mean changes, so the weights of these points are 0. The standard deviations around them shrink.
        """
        count, more = len(self._x_ND), len(x_MD)
        across_NM = self._explain(self.kernel(x_MD, self._x_ND))
        root = np.zeros((count + more, count + more))
        root[:count, :count], root[count:, :count] = self._root_NN, across_NM.T
        rest_MM = _with_noise(self.kernel, x_MD) - across_NM.T @ across_NM
        root[count:, count:] = _cholesky(rest_MM, self.kernel.variance)
        self._root_NN = root
        self._x_ND = np.concatenate([self._x_ND, x_MD])
        self._weights_N = np.concatenate([self._weights_N, np.zeros(more)])

    def _explain(self, similar_MN: Floats) -> Floats:
        """Solve the triangular system of the Cholesky factor and the covariances with the points, [N, M]."""
        explained_NM: Floats = solve_triangular(self._root_NN, similar_MN.T, lower=True, check_finite=False)
        return explained_NM


def _with_noise(kernel: Kernel, x_ND: Floats) -> Floats:
    """Return the covariance of the observed values at points, [N, N]."""
    k_NN = kernel(x_ND, x_ND)
    k_NN.flat[:: len(k_NN) + 1] += kernel.noise
    return k_NN


def _cholesky(k_NN: Floats, variance: float) -> Floats:
    """Decompose a covariance. If rounding has made it indefinite, its diagonal is raised as far as necessary."""
    for jitter in (0.0, *_JITTERS):
        try:
            return np.asarray(np.linalg.cholesky(k_NN + jitter * variance * np.eye(len(k_NN))), np.float64)
        except np.linalg.LinAlgError:
            continue
    raise np.linalg.LinAlgError("the covariance of the trials is not positive definite")


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute on one thread: several threads are slower on such small matrices, and trials train meanwhile.

    The limit holds for the process. So only one thread at a time has it; otherwise the one that ends last would restore
    the limit of the other.
    """
    with _LIMITED, _thread_pools().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _thread_pools() -> ThreadpoolController:
    # The search for thread pools takes milliseconds. NumPy's and SciPy's exist already: this module imports both.
    return ThreadpoolController()
