import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raytune_emotion.learn.step import make_targets

CPU = torch.device("cpu")

distributions = arrays(np.float32, (20, 5), elements=st.floats(0.015625, 1, width=32)).map(
    lambda raw: (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
)


@given(prob_NK=distributions, smoothing=st.floats(0, 0.99))
def test_smoothed_targets_are_distributions_with_the_same_mean(prob_NK, smoothing):
    targets, weight_N = make_targets(prob_NK, smoothing=smoothing, balance=0, device=CPU)(torch.from_numpy(prob_NK))
    assert weight_N is None
    torch.testing.assert_close(targets.sum(1), torch.ones(20))
    torch.testing.assert_close(targets.mean(0), torch.from_numpy(prob_NK).mean(0), rtol=1e-4, atol=1e-5)
    spread = (torch.from_numpy(prob_NK) - targets.mean(0)) * (1 - smoothing)
    torch.testing.assert_close(targets - targets.mean(0), spread, rtol=1e-3, atol=1e-5)


@given(prob_NK=distributions, balance=st.floats(0.1, 1))
def test_rows_weigh_one_in_the_mean_and_more_the_rarer_their_class(prob_NK, balance):
    prob_N = torch.from_numpy(prob_NK)
    same, weight_N = make_targets(prob_NK, smoothing=0, balance=balance, device=CPU)(prob_N)
    assert torch.equal(same, prob_N)
    assert weight_N.mean().item() == pytest.approx(1, rel=1e-4)
    counts = np.bincount(prob_NK.argmax(1), minlength=5)
    by_row = counts[prob_NK.argmax(1)]
    expected = by_row.astype(float) ** -balance
    torch.testing.assert_close(weight_N.double(), torch.from_numpy(expected / expected.mean()), rtol=1e-4, atol=1e-6)


def test_in_full_balance_all_classes_that_occur_weigh_the_same():
    prob_NK = np.eye(3, dtype=np.float32)[[0] * 8 + [1] * 2]
    _, weight_N = make_targets(prob_NK, smoothing=0, balance=1, device=CPU)(torch.from_numpy(prob_NK))
    assert weight_N[:8].sum().item() == pytest.approx(weight_N[8:].sum().item())
