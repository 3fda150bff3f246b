"""Look closely at the winner of a study: what it predicts for validation images, and where it is wrong."""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from scipy.special import entr

from raytune_emotion.config import RunConfig
from raytune_emotion.data.augment import normalise
from raytune_emotion.data.store import Split, is_store, open_store
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.checkpoint import BEST, Best, read_best
from raytune_emotion.learn.device import exact_fp32
from raytune_emotion.learn.metrics import per_sample
from raytune_emotion.learn.model import build_model, mean_std
from raytune_emotion.storage.locations import Folder, location_of
from raytune_emotion.tuning.study.records import trial_folder
from raytune_emotion.tuning.study.spec import StudySpec

#: Validation images that are predicted at most, and for so long at most: a report is no evaluation of its own.
MOST_IMAGES = 2000
_MOST_SECONDS = 30.0
_BATCH = 64
_FACES = 6  # that are shown of the best, and of the worst
_FACE_PX = 96
_BINS = 10


@dataclass(frozen=True)
class Predictions:
    """What a trial's best weights predict for validation images, which are a random part where there are many."""

    classes: tuple[str, ...]
    ids: tuple[str, ...]
    true_NK: npt.NDArray[np.float64]
    predicted_NK: npt.NDArray[np.float64]
    js_N: npt.NDArray[np.float64]  # bits
    rows_N: npt.NDArray[np.int64]  # of the split
    split: Split

    @property
    def target_entropy(self) -> npt.NDArray[np.float64]:
        """Return the entropy of each target, bits."""
        entropy_N: npt.NDArray[np.float64] = entr(self.true_NK).sum(axis=1) / np.log(2)
        return entropy_N


@dataclass(frozen=True)
class Bin:
    """Images whose predictions, or targets, lie near each other."""

    count: int
    x: float  # mean prediction, or mean entropy of the targets
    y: float  # mean target, or mean JS
    error: float  # standard error of y


@dataclass(frozen=True)
class ClassError:
    """How well one class is predicted."""

    name: str
    mean_target: float
    mean_prediction: float
    mean_absolute_error: float
    calibration_error: float  # mean distance of prediction and target over bins of the prediction
    majority_images: int  # whose likeliest class it is
    majority_found: float | None  # the share of these in which it is predicted to be the likeliest
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Face:
    """An image with its target and its prediction."""

    image_id: str
    js: float  # bits
    picture: str  # JPEG, base64
    rows: tuple[tuple[str, float, float], ...]  # class, target, prediction: those that matter, the likeliest first


def predict_winner(folder: Path, spec: StudySpec, trial_id: str) -> Predictions | str:
    """Predict validation images with the best weights of a trial, or return why this cannot be done here."""
    try:
        best = read_best(trial_folder(folder, trial_id) / BEST)
        size = int(best.settings["data.image_size"])
        place = location_of(spec.stores[size])
        if not isinstance(place, Folder) or not is_store(place):
            return f"its data of {size} px are not on this machine"
        store = open_store(place)
        if store.fingerprint != best.fingerprint:
            return f"its data of {size} px have changed since the study began"
        return _predict(best, store.val, store.classes)
    except (UserError, Breakdown, OSError, KeyError, RuntimeError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__


def _predict(best: Best, split: Split, classes: tuple[str, ...]) -> Predictions:
    config = RunConfig.from_flat(best.settings)
    model = build_model(config, weights=False)
    model.load_state_dict(best.weights)
    model.eval()
    mean, std = mean_std(model)
    order = np.random.default_rng(0).permutation(len(split))[:MOST_IMAGES].astype(np.int64)
    began = time.monotonic()
    parts: list[torch.Tensor] = []
    with torch.inference_mode(), exact_fp32():
        for start in range(0, len(order), _BATCH):
            if parts and time.monotonic() - began > _MOST_SECONDS:
                break
            x_BHWC = torch.from_numpy(split.gather(order[start : start + _BATCH]))
            parts.append(model(normalise(x_BHWC, mean, std)).double())
    logits_NK = torch.cat(parts)
    rows_N = order[: len(logits_NK)]
    true_NK = torch.from_numpy(np.asarray(split.prob_NK)[rows_N].astype(np.float64))
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


def class_errors(predictions: Predictions) -> list[ClassError]:
    """Return how well each class is predicted, in the order of the classes."""
    true_NK, predicted_NK = predictions.true_NK, predictions.predicted_NK
    truth_N, guess_N = true_NK.argmax(axis=1), predicted_NK.argmax(axis=1)
    found = []
    for k, name in enumerate(predictions.classes):
        true_N, predicted_N = true_NK[:, k], predicted_NK[:, k]
        bins = _bins(predicted_N, true_N, np.clip((predicted_N * _BINS).astype(int), 0, _BINS - 1))
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


def confusion(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Count images by their likeliest class, [target, prediction]."""
    count = len(predictions.classes)
    pairs = predictions.true_NK.argmax(axis=1) * count + predictions.predicted_NK.argmax(axis=1)
    return np.bincount(pairs, minlength=count * count).reshape(count, count).astype(np.int64)


def errors_by_entropy(predictions: Predictions) -> list[Bin]:
    """Return the mean JS of images in groups of equal size, from clear to mixed targets."""
    entropy_N = predictions.target_entropy
    rank_N = np.empty(len(entropy_N), np.int64)
    rank_N[np.argsort(entropy_N, kind="stable")] = np.arange(len(entropy_N))
    groups = max(1, min(_BINS, len(entropy_N) // 5))
    return _bins(entropy_N, predictions.js_N, rank_N * groups // len(entropy_N))


def extreme_faces(predictions: Predictions) -> tuple[list[Face], list[Face]]:
    """Return the images that are predicted best, and those that are predicted worst."""
    best, worst = extreme_rows(predictions)
    return _faces(predictions, best), _faces(predictions, worst)


def extreme_rows(predictions: Predictions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the best and the worst predictions stand, each with the most extreme first."""
    order = np.argsort(predictions.js_N, kind="stable")
    shown = min(_FACES, len(order) // 2)
    return order[:shown], order[::-1][:shown]


def predictions_table(predictions: Predictions) -> pd.DataFrame:
    """Return a row for each image: id, JS, entropy of the target, and both distributions."""
    columns = {"image": predictions.ids, "js": predictions.js_N, "target_entropy": predictions.target_entropy}
    for kind, prob_NK in (("true", predictions.true_NK), ("predicted", predictions.predicted_NK)):
        columns |= {f"{kind}_{name}": prob_NK[:, k] for k, name in enumerate(predictions.classes)}
    return pd.DataFrame(columns).sort_values("js", ascending=False)


def _bins(x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64], bin_N: npt.NDArray[np.int64]) -> list[Bin]:
    found = []
    for number in np.unique(bin_N):
        x, y = x_N[bin_N == number], y_N[bin_N == number]
        error = float(y.std(ddof=1) / np.sqrt(len(y))) if len(y) > 1 else 0.0
        found.append(Bin(len(y), float(x.mean()), float(y.mean()), error))
    return found


def _faces(predictions: Predictions, chosen: npt.NDArray[np.int64]) -> list[Face]:
    images = predictions.split.gather(predictions.rows_N[chosen])
    return [
        Face(predictions.ids[i], float(predictions.js_N[i]), _jpeg(image), _largest(predictions, int(i)))
        for i, image in zip(chosen, images, strict=True)
    ]


def _largest(predictions: Predictions, i: int, count: int = 5) -> tuple[tuple[str, float, float], ...]:
    true_K, predicted_K = predictions.true_NK[i], predictions.predicted_NK[i]
    order: Sequence[int] = np.argsort(-np.maximum(true_K, predicted_K), kind="stable")[:count].tolist()
    rows = [(predictions.classes[k], float(true_K[k]), float(predicted_K[k])) for k in order]
    return tuple(sorted(rows, key=lambda row: -row[1]))


def _jpeg(image_HWC: npt.NDArray[np.uint8]) -> str:
    image = Image.fromarray(image_HWC)
    if image.width > _FACE_PX:
        image = image.resize((_FACE_PX, _FACE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()
