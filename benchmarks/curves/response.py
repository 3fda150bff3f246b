"""Estimate the curves of configurations that were not recorded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from raytune_emotion.tuning.policy.encoding import Configurations, Encoding, encoding_of
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.space.space import Space

_METRIC = "val_js"
_REPORTED = "report"  # columns before this one are settings


@dataclass(frozen=True)
class Recorded:
    """N fully trained configurations with R reports each."""

    settings: list[dict[str, Any]]
    encoding: Encoding
    x_ND: Floats
    js_NR: Floats  # validation JS, bits
    seconds_NR: Floats  # core-seconds since the previous report

    @property
    def mean_seconds(self) -> float:
        """Return the mean cost of a fully trained configuration, core-seconds."""
        return float(self.seconds_NR.sum(axis=1).mean())


@dataclass(frozen=True)
class Nearest:
    """Replay the nearest recorded configuration, with the same choices if possible."""

    recorded: Recorded
    scales_D: Floats  # weight of a difference in each coordinate

    def __call__(self, settings: Configurations) -> tuple[Floats, Floats]:
        """Return JS and core-seconds by report, [M, R] each."""
        near_M = self.index(self.recorded.encoding(settings))
        return self.recorded.js_NR[near_M], self.recorded.seconds_NR[near_M]

    def index(self, x_MD: Floats) -> npt.NDArray[np.intp]:
        near_M: npt.NDArray[np.intp] = cdist(x_MD * self.scales_D, self.recorded.x_ND * self.scales_D).argmin(axis=1)
        return near_M


@dataclass(frozen=True)
class Surrogate:
    """The mean of a Gaussian process through the logarithms of all curves, with the cost of the nearest one."""

    nearest: Nearest
    weights_NR: Floats
    mean_R: Floats
    kernel: Any

    def __call__(self, settings: Configurations) -> tuple[Floats, Floats]:
        """Return JS and core-seconds by report, [M, R] each."""
        recorded = self.nearest.recorded
        x_MD = recorded.encoding(settings)
        log_MR = self.mean_R + self.kernel(x_MD, recorded.x_ND) @ self.weights_NR
        return np.exp(log_MR), recorded.seconds_NR[self.nearest.index(x_MD)]


def read_curves(file: Path, space: Space) -> Recorded:
    """Read curves that `benchmarks.curves.record` has written. Diverged configurations are left out."""
    table = pd.read_parquet(file)
    keys = [name for name in table.columns[: table.columns.get_loc(_REPORTED)] if name != "configuration"]
    whole = table.groupby("configuration").filter(lambda rows: bool((rows["finished"] == True).any()))  # noqa: E712
    groups = [rows.sort_values(_REPORTED) for _, rows in whole.groupby("configuration")]
    settings = [{key: rows[key].iloc[0] for key in keys} for rows in groups]
    encoding = encoding_of(space)
    return Recorded(
        settings,
        encoding,
        encoding(settings),
        np.array([rows[_METRIC] for rows in groups]),
        np.array([np.diff(rows["core_seconds"], prepend=0.0) for rows in groups]),
    )


@dataclass(frozen=True)
class Fitted:
    """Both responses for a configuration, with their errors on unseen recorded ones."""

    nearest: Nearest
    surrogate: Surrogate
    nearest_error: float  # median of |predicted - recorded| JS at the last report, bits
    surrogate_error: float
    rank_correlation: float  # Spearman's, of the surrogate


def fit_responses(recorded: Recorded) -> Fitted:
    """Fit the length of every coordinate by the likelihood of the best JS; estimate errors by leaving one out."""
    last_N = np.log(recorded.js_NR.min(axis=1))
    dims = recorded.x_ND.shape[1]
    start = ConstantKernel(0.1) * Matern(np.full(dims, 2.0), (0.05, 1e3), nu=2.5) + WhiteKernel(1e-3)
    kernel = (
        GaussianProcessRegressor(start, n_restarts_optimizer=1, random_state=0)
        .fit(recorded.x_ND, last_N - last_N.mean())
        .kernel_
    )
    inverse_NN = np.linalg.inv(kernel(recorded.x_ND))
    log_NR = np.log(recorded.js_NR)
    mean_R = log_NR.mean(axis=0)
    weights_NR = inverse_NN @ (log_NR - mean_R)
    # For a Gaussian process, leave-one-out has a closed form (Rasmussen & Williams, 2006, equation 5.12).
    without_N = np.exp(log_NR[:, -1] - (weights_NR / np.diag(inverse_NN)[:, None])[:, -1])
    nearest = Nearest(recorded, 1 / kernel.k1.k2.length_scale)
    surrogate = Surrogate(nearest, weights_NR, mean_R, kernel.k1)
    scaled_ND = recorded.x_ND * nearest.scales_D
    distances_NN = cdist(scaled_ND, scaled_ND)
    np.fill_diagonal(distances_NN, np.inf)
    neighbours_N = recorded.js_NR[distances_NN.argmin(axis=1), -1]
    true_N = recorded.js_NR[:, -1]
    return Fitted(
        nearest,
        surrogate,
        float(np.median(abs(neighbours_N - true_N))),
        float(np.median(abs(without_N - true_N))),
        float(pd.Series(without_N).corr(pd.Series(true_N), method="spearman")),
    )
