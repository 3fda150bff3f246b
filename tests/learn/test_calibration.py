"""Temperatures: how they are fitted and judged, and which models can have one."""

import dataclasses
import hashlib

import numpy as np
import pytest
import timm
import torch

from raytune_emotion.data.store import Split
from raytune_emotion.learn.calibration import at_temperature, calibrate, divide_logits
from raytune_emotion.learn.predictions import Predictions


def predictions_of(factor: float, count: int = 400) -> Predictions:
    """Return predictions whose logits are those of the truth, times a factor."""
    logits_NK = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true_NK = logits_NK.softmax(-1).numpy()
    split = Split(tuple(str(n) for n in range(count)), true_NK.astype(np.float32), ())
    plain = Predictions(("a", "b", "c", "d"), split.ids, true_NK, true_NK, np.zeros(count), np.arange(count), split)
    return at_temperature(plain, 1 / factor)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_temperature_of_a_model_that_is_wrongly_sure_is_found(factor):
    found = calibrate(predictions_of(factor))
    assert found.temperature == pytest.approx(factor, rel=1e-3)
    assert found.helps
    assert found.kl[1] < 1e-6 < found.kl[0]
    assert found.js[1] < 1e-6 < found.js[0]
    assert found.fitted_on + found.judged_on == 400


def test_halves_follow_from_the_ids_alone():
    predictions = predictions_of(2.0)
    evens = [hashlib.sha256(str(n).encode()).digest()[0] % 2 == 0 for n in range(400)]
    assert calibrate(predictions).fitted_on == sum(evens)
    order = np.random.default_rng(0).permutation(400)
    shuffled = dataclasses.replace(
        predictions,
        ids=tuple(predictions.ids[n] for n in order),
        true_NK=predictions.true_NK[order],
        predicted_NK=predictions.predicted_NK[order],
    )
    assert calibrate(shuffled).temperature == pytest.approx(calibrate(predictions).temperature, rel=1e-9)


def test_temperature_that_does_not_help_the_other_half_is_not_kept():
    """The half that it is fitted on wants another one than the half that it is judged on."""
    hot, cold = predictions_of(3.0), predictions_of(0.5)
    fit_N = np.array([hashlib.sha256(id_.encode()).digest()[0] % 2 == 0 for id_ in hot.ids])
    predicted_NK = np.where(fit_N[:, None], hot.predicted_NK, cold.predicted_NK)
    found = calibrate(dataclasses.replace(hot, predicted_NK=predicted_NK))
    assert found.temperature == pytest.approx(3.0, rel=1e-3)
    assert not found.helps


def test_too_few_images_are_not_calibrated():
    assert calibrate(predictions_of(2.0, count=12)) is None


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_nfnet", "test_byobnet"])
def test_logits_are_divided(backbone):
    model = timm.create_model(backbone, num_classes=5, **({"img_size": 64} if "vit" in backbone else {})).eval()
    x_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(x_BCHW)
        assert divide_logits(model, 1.7, x_BCHW)
        assert torch.allclose(model(x_BCHW), before / 1.7, atol=1e-5)


def test_model_whose_last_layer_cannot_be_scaled_stays_as_it_was():
    model = timm.create_model("test_resnet", num_classes=5).eval()
    x_BCHW = torch.randn(2, 3, 64, 64)
    forward = model.forward_head
    model.forward_head = lambda x, **options: (100 * forward(x, **options)).tanh()  # almost only signs
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert not divide_logits(model, 1.7, x_BCHW)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_logits_of_a_model_without_a_last_layer_are_not_divided_by_almost_1_either():
    model = timm.create_model("test_resnet", num_classes=0).eval()
    assert not divide_logits(model, 1.0001, torch.randn(2, 3, 64, 64))
