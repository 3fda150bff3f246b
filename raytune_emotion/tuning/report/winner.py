"""Analyse the winner of a study: its predictions for validation images, and its errors."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from raytune_emotion.data.store import open_if_here
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.predictions import Bin, Predictions, bins_of, bootstrap_intervals, predict_best
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.tuning.study.confirmation import best_configurations
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.spec import StudySpec
from raytune_emotion.tuning.study.trials import trial_folder

#: Number of faces that are shown of the best, and of the worst predictions.
_FACES = 6
#: Side of the shown faces, px.
_FACE_PX = 96
#: Largest number of rivals of the best trial that are named.
_RIVALS = 3
#: Number of groups of images by the entropy of their targets.
_GROUPS = 10


@dataclass(frozen=True)
class Face:
    """An image with its target and its prediction."""

    image_id: str
    js: float  # bits
    picture: str  # JPEG, base64
    rows: tuple[tuple[str, float, float], ...]  # class, target, prediction: the largest ones, by target


def predict_winner(folder: Path, spec: StudySpec, trial_id: str) -> tuple[Predictions | None, str]:
    """Predict validation images with the best weights of a trial.

    Returns:
        The predictions, or None and the reason why they are impossible here.
    """
    try:
        best = read_best(trial_folder(folder, trial_id) / BEST)
        size = int(best.settings["data.image_size"])
        store = open_if_here(spec.stores[size], size, best.fingerprint)
        if store is None:
            return None, f"the data of {size} px that the study was trained on are not on this machine"
        return predict_best(best, store.val, store.classes), ""
    except (UserError, Breakdown, OSError, KeyError, RuntimeError) as error:
        return None, " ".join(str(error).split())[:300] or type(error).__name__


def js_interval(predictions: Predictions) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean JS over images, bits, as in the model card."""
    return bootstrap_intervals({"js": predictions.js_N})["js"]


def rivals_of(leader: TrialRecord, records: Iterable[TrialRecord], predictions: Predictions) -> list[str]:
    """List a few best trials of other configurations that are behind by less than the upper margin of the interval.

    With other images or seeds, one of them may be better than the best trial.
    """
    assert leader.best is not None
    margin = js_interval(predictions)[1] - float(predictions.js_N.mean())
    others = [r for r in best_configurations(records, _RIVALS + 1) if r.trial_id != leader.trial_id]
    return [r.trial_id for r in others if r.best and r.best["val_js"] <= leader.best["val_js"] + margin]


def confusion(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Count images by their most probable class, [target, prediction]."""
    count = len(predictions.classes)
    pairs = predictions.true_NK.argmax(axis=1) * count + predictions.predicted_NK.argmax(axis=1)
    return np.bincount(pairs, minlength=count * count).reshape(count, count).astype(np.int64)


def errors_by_entropy(predictions: Predictions) -> list[Bin]:
    """Return the mean JS of images in groups of equal size, from low to high entropy of the targets."""
    entropy_N = predictions.target_entropy
    rank_N = np.empty(len(entropy_N), np.int64)
    rank_N[np.argsort(entropy_N, kind="stable")] = np.arange(len(entropy_N))
    groups = max(1, min(_GROUPS, len(entropy_N) // 5))
    return bins_of(entropy_N, predictions.js_N, rank_N * groups // len(entropy_N))


def extreme_faces(predictions: Predictions) -> tuple[list[Face], list[Face]]:
    """Return the images with the best and with the worst predictions."""
    best, worst = extreme_rows(predictions)
    return _faces(predictions, best), _faces(predictions, worst)


def extreme_rows(predictions: Predictions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows of the best and of the worst predictions, each with the most extreme first."""
    order = np.argsort(predictions.js_N, kind="stable")
    shown = min(_FACES, len(order) // 2)
    return order[:shown], order[::-1][:shown]


def predictions_table(predictions: Predictions) -> pd.DataFrame:
    """Return a row for each image: id, JS, entropy of the target, and both distributions."""
    columns = {"image": predictions.ids, "js": predictions.js_N, "target_entropy": predictions.target_entropy}
    for kind, prob_NK in (("true", predictions.true_NK), ("predicted", predictions.predicted_NK)):
        columns |= {f"{kind}_{name}": prob_NK[:, k] for k, name in enumerate(predictions.classes)}
    return pd.DataFrame(columns).sort_values("js", ascending=False)


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
