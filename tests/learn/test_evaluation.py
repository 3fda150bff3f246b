import math

import numpy as np
import pytest

from raytune_emotion.learn.evaluation import baseline
from tests.support.training import shortened


def test_the_baseline_is_that_of_the_training_mean(store):
    mean = store.train.prob_NK.astype(np.float64).mean(0)
    assert baseline(store)["mse"] == pytest.approx(((store.val.prob_NK - mean) ** 2).mean())
    assert all(math.isfinite(value) for value in baseline(store).values())


def test_the_baseline_is_finite_for_a_class_that_training_lacks(store):
    unseen = shortened(store, 10)
    unseen.train.prob_NK[:, 3] = 0
    assert math.isfinite(baseline(unseen)["kl"])
