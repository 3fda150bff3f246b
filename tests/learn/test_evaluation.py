import math

import numpy as np
import pytest
import torch

from raytune_emotion.learn import evaluation
from raytune_emotion.learn.evaluation import baseline, predict_rows, rows_of_side
from raytune_emotion.learn.model import build_model
from tests.support.training import CPU, run_config, shortened


def test_rows_are_predicted_in_the_order_that_is_asked_until_the_time_is_over(store):
    model, rows_N = build_model(run_config()), np.arange(len(store.val))[::-1].copy()
    logits_NK, true_NK = predict_rows(model, store.val, rows_N, device=CPU)
    assert torch.equal(true_NK, torch.from_numpy(store.val.prob_NK[rows_N]))
    first_BK, _ = predict_rows(model, store.val, rows_N, device=CPU, rows=5, until=0.0)
    torch.testing.assert_close(first_BK, logits_NK[:5])
    mirrored_NK, _ = predict_rows(model, store.val, rows_N, device=CPU, mirror=True)
    assert not torch.allclose(mirrored_NK, logits_NK)


def test_large_images_are_predicted_in_smaller_batches_on_a_cpu(store, monkeypatch):
    model, counts = build_model(run_config()), []
    model.register_forward_pre_hook(lambda module, given: counts.append(len(given[0])))
    monkeypatch.setattr(evaluation, "rows_of_side", lambda side: 3 if side == store.image_size else 0)
    predict_rows(model, store.val, np.arange(8), device=CPU)
    assert counts == [3, 3, 2]
    assert [rows_of_side(side) for side in (96, 512, 5000)] == [evaluation.ROWS, 24, 1]


def test_the_baseline_is_that_of_the_training_mean(store):
    mean = store.train.prob_NK.astype(np.float64).mean(0)
    assert baseline(store)["mse"] == pytest.approx(((store.val.prob_NK - mean) ** 2).mean())
    assert all(math.isfinite(value) for value in baseline(store).values())


def test_the_baseline_is_finite_for_a_class_that_training_lacks(store):
    unseen = shortened(store, 10)
    unseen.train.prob_NK[:, 3] = 0
    assert math.isfinite(baseline(unseen)["kl"])
