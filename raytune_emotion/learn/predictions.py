"""Analyse the predictions of a model for validation images: by class, in bins, with confidence intervals."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import entr
from torch import nn

from raytune_emotion.data.store import Split
from raytune_emotion.learn.checkpoint import Best
from raytune_emotion.learn.evaluation import predict_rows
from raytune_emotion.learn.metrics import distances_of, per_sample
from raytune_emotion.learn.model import load_model

#: Largest number of validation images that are predicted for a report.
MOST_IMAGES = 2000
#: Longest time for these predictions, seconds.
_MOST_SECONDS = 30.0
_BATCH = 64
_BINS = 10
_RESAMPLES = 1000


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for validation images, or for a random part of them if there are many."""

    classes: tuple[str, ...]
    ids: tuple[str, ...]
    true_NK: npt.NDArray[np.float64]
    predicted_NK: npt.NDArray[np.float64]
    js_N: npt.NDArray[np.float64]  # bits
    rows_N: npt.NDArray[np.int64]  # row numbers in the split
    split: Split

    @property
    def target_entropy(self) -> npt.NDArray[np.float64]:
        """Return the entropy of each target, bits."""
        entropy_N: npt.NDArray[np.float64] = entr(self.true_NK).sum(axis=1) / np.log(2)
        return entropy_N

    def metrics(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return every metric of every image: name -> [N]."""
        values = per_sample(log_of(self.predicted_NK), torch.from_numpy(self.true_NK), distances_of(self.classes))
        return {name: value_N.numpy() for name, value_N in values.items()}


@dataclass(frozen=True)
class Bin:
    """Images with similar predictions or targets."""

    count: int
    x: float  # mean prediction, or mean entropy of the targets
    y: float  # mean target, or mean JS
    error: float  # standard error of y


@dataclass(frozen=True)
class ClassError:
    """Accuracy of the predictions of one class."""

    name: str
    mean_target: float
    mean_prediction: float
    mean_absolute_error: float
    calibration_error: float  # mean distance of prediction and target over bins of the prediction
    majority_images: int  # number of images whose most probable class it is
    majority_found: float | None  # share of these for which the prediction is most probable for it, too
    bins: tuple[Bin, ...]


def half_of(ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which images are in the first half of a validation set. It depends only on the id of an image."""
    return np.array([hashlib.sha256(image_id.encode()).digest()[0] % 2 == 0 for image_id in ids], dtype=bool)


def predict_best(best: Best, split: Split, classes: tuple[str, ...]) -> Predictions:
    """Predict images of a split with the best weights of a run, on the CPU."""
    return predict_split(load_model(best), split, classes)


def predict_split(model: nn.Module, split: Split, classes: tuple[str, ...]) -> Predictions:
    """Predict images of a split with a model that is in evaluation mode on the CPU."""
    order = np.random.default_rng(0).permutation(len(split))[:MOST_IMAGES].astype(np.int64)
    until = time.monotonic() + _MOST_SECONDS
    predicted = predict_rows(model, split, order, device=torch.device("cpu"), rows=_BATCH, until=until)
    logits_NK, true_NK = (each_NK.double() for each_NK in predicted)
    rows_N = order[: len(logits_NK)]
    js_N = per_sample(logits_NK, true_NK, None)["js"]
    return Predictions(
        classes,
        tuple(split.ids[row] for row in rows_N),
        true_NK.numpy(),
        logits_NK.softmax(-1).numpy(),
        js_N.numpy(),
        rows_N,
        split,
    )


def is_cut_short(predictions: Predictions) -> bool:
    """Tell whether the time was too short to predict all images that were drawn."""
    return len(predictions.ids) < min(len(predictions.split), MOST_IMAGES)


def log_of(prob_NK: npt.NDArray[np.float64]) -> torch.Tensor:
    """Return finite logits of probabilities. Unlike `logits_of`, it changes only zeros."""
    return torch.from_numpy(prob_NK).clamp_min(torch.finfo(torch.float64).tiny).log()


def class_errors(predictions: Predictions) -> list[ClassError]:
    """Return the errors of each class, in the order of the classes."""
    true_NK, predicted_NK = predictions.true_NK, predictions.predicted_NK
    truth_N, guess_N = true_NK.argmax(axis=1), predicted_NK.argmax(axis=1)
    found = []
    for k, name in enumerate(predictions.classes):
        true_N, predicted_N = true_NK[:, k], predicted_NK[:, k]
        bins = bins_of(predicted_N, true_N, np.clip((predicted_N * _BINS).astype(int), 0, _BINS - 1))
        majority = int((truth_N == k).sum())
        found.append(
            ClassError(
                name,
                float(true_N.mean()),
                float(predicted_N.mean()),
                float(np.abs(true_N - predicted_N).mean()),
                sum(b.count * abs(b.x - b.y) for b in bins) / len(true_N),
                majority,
                float((guess_N[truth_N == k] == k).mean()) if majority else None,
                tuple(bins),
            )
        )
    return found


def bins_of(x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64], bin_N: npt.NDArray[np.int64]) -> list[Bin]:
    """Return the means of x and y over the images of each bin."""
    found = []
    for number in np.unique(bin_N):
        x, y = x_N[bin_N == number], y_N[bin_N == number]
        error = float(y.std(ddof=1) / np.sqrt(len(y))) if len(y) > 1 else 0.0
        found.append(Bin(len(y), float(x.mean()), float(y.mean()), error))
    return found


def bootstrap_intervals(values: dict[str, npt.NDArray[np.float64]]) -> dict[str, tuple[float, float]]:
    """Return the 95 % bootstrap interval of the mean of each metric, by name, from its values for all images, [N]."""
    names, table_NM = list(values), np.stack(list(values.values()), axis=1)
    n = len(table_NM)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    low_M, high_M = np.quantile(drawn @ table_NM / n, [0.025, 0.975], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, low_M, high_M, strict=True)}
