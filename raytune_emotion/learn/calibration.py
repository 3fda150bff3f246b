"""Calibrate a model with a temperature: its logits are divided by one number, which is fitted on soft labels.

The temperature is fitted on one half of the validation images and tested on the other half. It is kept only if it
lowers both KL and JS there (Guo et al., "On calibration of modern neural networks", ICML 2017, here with soft instead
of hard labels). It is merged into the last layer, so that it applies in every format and every program.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from raytune_emotion.learn import losses
from raytune_emotion.learn.device import exact_fp32
from raytune_emotion.learn.metrics import per_sample
from raytune_emotion.learn.predictions import Predictions, half_of, log_of

#: Smallest number of images in a half.
_LEAST = 10
#: Largest temperature; the smallest is its inverse.
_LARGEST = 10.0


@dataclass(frozen=True)
class Calibration:
    """A temperature, and its effect on images on which it was not fitted."""

    temperature: float
    fitted_on: int  # number of images
    judged_on: int  # number of other images, for kl and js
    kl: tuple[float, float]  # nats, without and with the temperature
    js: tuple[float, float]  # bits, likewise

    @property
    def helps(self) -> bool:
        """Tell whether the temperature improves the predictions of images on which it was not fitted."""
        return self.kl[1] < self.kl[0] and self.js[1] < self.js[0]


def calibrate(predictions: Predictions) -> Calibration | None:
    """Fit a temperature on half of the images, chosen by a hash of their ids; return None for too few images."""
    fit_N = half_of(predictions.ids)
    if min(fit_N.sum(), (~fit_N).sum()) < _LEAST:
        return None
    logits_NK, true_NK = log_of(predictions.predicted_NK), torch.from_numpy(predictions.true_NK)

    def mean(loss: losses.Loss, half_N: npt.NDArray[np.bool_], temperature: float) -> float:
        return float(loss(logits_NK[half_N] / temperature, true_NK[half_N]).mean())

    found = minimize_scalar(
        lambda log_t: mean(losses.kl, fit_N, math.exp(log_t)),
        bounds=(-math.log(_LARGEST), math.log(_LARGEST)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    temperature = math.exp(found.x)
    kl, js = ((mean(loss, ~fit_N, 1.0), mean(loss, ~fit_N, temperature)) for loss in (losses.kl, losses.js))
    return Calibration(temperature, int(fit_N.sum()), int((~fit_N).sum()), kl, js)


def at_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Return the predictions with their logits divided by a temperature."""
    logits_NK = log_of(predictions.predicted_NK) / temperature
    js_N = per_sample(logits_NK, torch.from_numpy(predictions.true_NK), None)["js"]
    return dataclasses.replace(predictions, predicted_NK=logits_NK.softmax(-1).numpy(), js_N=js_N.numpy())


def divide_logits(model: nn.Module, temperature: float, x_BCHW: torch.Tensor) -> bool:
    """Divide a model's logits by a temperature, in its last layer, and try it on images.

    Returns:
        Whether the logits are divided; if not, the model is unchanged.
    """
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    named = known.get("classifier") or ()
    modules = dict(model.named_modules())
    layers = [modules.get(name) for name in ((named,) if isinstance(named, str) else named)]
    parameters = [
        parameter for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d) for parameter in layer.parameters()
    ]
    if not parameters:
        return False
    with torch.no_grad(), exact_fp32():
        before_BK, kept = model(x_BCHW), [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.div_(temperature)
        if torch.allclose(model(x_BCHW), before_BK / temperature, rtol=1e-3, atol=1e-4):
            return True
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.copy_(before)
    return False
