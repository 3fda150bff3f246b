"""Combine trained models: the mean of their predictions (an ensemble), or of their weights (a soup).

Members are chosen greedily: the best model first, then each time the one whose addition lowers the validation JS most
(Caruana et al., "Ensemble selection from libraries of models", 2004), or whose addition does not raise it (Wortsman et
al., "Model soups", 2022). The gain of a choice is measured on images that the choice has not seen: chosen on one half
of the validation set and measured on the other, both ways round. The models themselves, and their epochs, were selected
on the whole set before.

The statistics of a BatchNorm layer belong to the weights below it. So a soup estimates its own, on training images
(Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raytune_emotion.data.augment import normalise
from raytune_emotion.data.loader import batches
from raytune_emotion.data.store import Split, Store
from raytune_emotion.errors import UserError
from raytune_emotion.learn import losses
from raytune_emotion.learn.checkpoint import Best, weights_to_save
from raytune_emotion.learn.device import exact_fp32, halve_until_it_fits
from raytune_emotion.learn.evaluation import ROWS, predict_share, rows_of_side
from raytune_emotion.learn.metrics import logits_of
from raytune_emotion.learn.model import batchnorm_layers, load_model, mean_std
from raytune_emotion.learn.predictions import half_of

#: Largest number of training images for the statistics of BatchNorm.
STATISTICS_ROWS = 512

Rows = npt.NDArray[np.bool_]
#: Returns the joint prediction of members with these numbers, [N, K].
Predict = Callable[[tuple[int, ...]], Tensor]
#: Chooses members by the predictions of these rows.
Choose = Callable[[Rows], tuple[int, ...]]


def js_of(predicted_NK: Tensor, true_NK: Tensor) -> npt.NDArray[np.float64]:
    """Return the JS of each row, bits."""
    js_N: npt.NDArray[np.float64] = losses.js(logits_of(predicted_NK), true_NK.double()).numpy()
    return js_N


def choose_ensemble(predictions: Sequence[Tensor], true_NK: Tensor, rows: Rows, most: int) -> tuple[int, ...]:
    """Choose the members of an ensemble: fewer than `most` if no other model lowers the JS.

    Args:
        predictions: of each model, [N, K].
        true_NK: the targets.
        rows: that may be looked at.
        most: number of members.

    Returns:
        The numbers of the members, the best model first.
    """
    chosen: tuple[int, ...] = ()
    best = np.inf
    while len(chosen) < most:
        left = [number for number in range(len(predictions)) if number not in chosen]
        found = [(_mean_js(mean_of(predictions, (*chosen, number)), true_NK, rows), number) for number in left]
        if not found or min(found)[0] >= best:
            break
        best, number = min(found)
        chosen = (*chosen, number)
    return chosen


def choose_soup(predict: Predict, count: int, true_NK: Tensor, rows: Rows) -> tuple[int, ...]:
    """Choose the members of a soup: starting with the best model, add each next one unless the JS rises.

    Args:
        predict: with the mean of the members' weights.
        count: number of models.
        true_NK: the targets.
        rows: that may be looked at.
    """
    alone = sorted((_mean_js(predict((number,)), true_NK, rows), number) for number in range(count))
    best, first = alone[0]
    chosen: tuple[int, ...] = (first,)
    for _, number in alone[1:]:
        js = _mean_js(predict((*chosen, number)), true_NK, rows)
        if js <= best:
            best, chosen = js, (*chosen, number)
    return chosen


def unseen_js(choose: Choose, predict: Predict, ids: Sequence[str], true_NK: Tensor) -> float | None:
    """Measure the JS of members on images that have not chosen them, bits; None if a half of the images is empty.

    The members are chosen on one half and measured on the other, both ways round.

    Args:
        choose: the members, by the rows of a half.
        predict: with members together.
        ids: of the images.
        true_NK: the targets.
    """
    first = half_of(ids)
    if not first.any() or first.all():
        return None
    halves = ((first, ~first), (~first, first))
    return sum(_mean_js(predict(choose(seen)), true_NK, unseen) for seen, unseen in halves) / 2


def unseen_js_of_ensemble(
    predictions: Sequence[Tensor], ids: Sequence[str], true_NK: Tensor, most: int
) -> float | None:
    """Measure the JS of an ensemble of at most `most` models in the same way; with one, that of the best model."""
    return unseen_js(
        lambda rows: choose_ensemble(predictions, true_NK, rows, most),
        lambda members: mean_of(predictions, members),
        ids,
        true_NK,
    )


def mean_of(predictions: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    """Return the mean prediction of the members."""
    return torch.stack([predictions[number] for number in members]).mean(0)


def predict_whole(best: Best, split: Split, device: torch.device) -> Tensor:
    """Predict all images of a split with a checkpoint, on a device. Return [N, K], float64, on the CPU."""
    model = load_model(best).to(device)
    logits_NK, _ = halve_until_it_fits(lambda rows: predict_share(model, split, device=device, rows=rows), ROWS)
    return logits_NK.cpu().double().softmax(-1)


class Soup:
    """Mean weights of models of one backbone, and their predictions for validation. Each mixture is predicted once."""

    def __init__(self, bests: Sequence[Best], store: Store, known: Sequence[Tensor], device: torch.device) -> None:
        """Start without a mixture.

        Args:
            bests: their checkpoints, of one backbone, image size and list of classes.
            store: that they were trained on.
            known: what each predicts alone for the validation split.
            device: to predict on.
        """
        self._bests, self._store, self._device = bests, store, device
        self._known: dict[tuple[int, ...], Tensor] = {(number,): prob_NK for number, prob_NK in enumerate(known)}

    def best(self, members: Sequence[int]) -> Best:
        """Return the mean of the members' weights, as a checkpoint with the settings of the first."""
        first = self._bests[members[0]]
        if len(members) == 1:
            return first
        weights = mean_weights([self._bests[number].weights for number in members])
        return estimate_statistics(dataclasses.replace(first, weights=weights), self._store.train, self._device)

    def predict(self, members: tuple[int, ...]) -> Tensor:
        """Predict the validation split with the mean of the members' weights, [N, K]."""
        key = tuple(sorted(members))
        if key not in self._known:
            self._known[key] = predict_whole(self.best(members), self._store.val, self._device)
        return self._known[key]


def estimate_statistics(best: Best, train: Split, device: torch.device) -> Best:
    """Estimate the statistics of a checkpoint's BatchNorm layers, if it has any, on images without augmentation.

    They are the mean over batches of training images, always the same ones. All other layers stay in evaluation mode.
    """
    model = load_model(best).to(device)
    layers = [layer for layer in batchnorm_layers(model) if layer.track_running_stats]
    if not layers:
        return best
    rows_N = np.random.default_rng(0).permutation(len(train))[:STATISTICS_ROWS]

    def estimate(most: int) -> None:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # every batch counts alike
            layer.train()
        rows = np.array_split(rows_N, math.ceil(len(rows_N) / most))  # of about the same length: none has one row alone
        with torch.no_grad(), exact_fp32():
            for batch in batches(train, rows, device):
                model(normalise(batch.x_BHWC, *mean_std(model)))

    halve_until_it_fits(estimate, max(2, rows_of_side(best.settings["data.image_size"])), least=2)
    return dataclasses.replace(best, weights=weights_to_save(model))


def mean_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average the tensors of several models. Integer counters are copied from the first model."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def list_compatible(bests: Sequence[Best]) -> list[int]:
    """Return the numbers of the models that can be averaged with the first: same backbone, tensors, size and classes.

    Raises:
        UserError: there is no model.
    """
    if not bests:
        raise UserError("there is no model to combine")
    kinds = [_kind_of(best) for best in bests]
    return [number for number, kind in enumerate(kinds) if kind == kinds[0]]


def _kind_of(best: Best) -> tuple[Any, ...]:
    fixed = ("model.backbone", "data.image_size", "data.classes")
    return {name: tensor.shape for name, tensor in best.weights.items()}, *(best.settings.get(key) for key in fixed)


def images_per_second(model: nn.Module, image_size: int, *, rows: int = 32, seconds: float = 1.0) -> float:
    """Measure the images per second of a model from pixels to probabilities on the CPU of this machine."""
    images_NHWC = torch.zeros(rows, image_size, image_size, 3, dtype=torch.uint8)
    with torch.inference_mode():
        model(images_NHWC)
        began, taken = time.perf_counter(), [0.0]
        while len(taken) < 3 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            model(images_NHWC)
            taken.append(time.perf_counter() - start)
    return rows / float(np.median(taken[1:]))


def _mean_js(predicted_NK: Tensor, true_NK: Tensor, rows: Rows) -> float:
    at = torch.from_numpy(rows)
    return float(js_of(predicted_NK[at], true_NK[at]).mean())
