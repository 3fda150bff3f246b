import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from raytune_emotion.config import LossConfig
from raytune_emotion.learn.losses import LOSSES, mixture

K = 5
EQUAL_WEIGHTS = dict.fromkeys(LOSSES, 1 / len(LOSSES))
modest = settings(max_examples=15)
CONTRACT = {**LOSSES, "mixture": mixture(EQUAL_WEIGHTS)}

logits = hnp.arrays(np.float64, (2, K), elements=st.floats(-1e4, 1e4, width=32))


@st.composite
def distributions(draw):
    """[2, K], with zeros among them, and rows that have a single class."""
    weights = draw(hnp.arrays(np.int64, (2, K), elements=st.integers(0, 4)))
    weights[weights.sum(1) == 0, 0] = 1
    return weights / weights.sum(1, keepdims=True)


def value(name, x, p):
    return CONTRACT[name](torch.from_numpy(x), torch.from_numpy(p)).numpy()


@pytest.mark.parametrize("name", CONTRACT)
class TestContract:
    @modest
    @given(x=logits, p=distributions())
    def test_is_finite_and_so_is_its_gradient_even_at_extremes(self, name, x, p):
        for dtype in (torch.float32, torch.float64):
            x_BK = torch.tensor(x, dtype=dtype, requires_grad=True)
            loss_B = CONTRACT[name](x_BK, torch.tensor(p, dtype=dtype))
            assert loss_B.shape == (2,)
            assert loss_B.isfinite().all()
            loss_B.sum().backward()
            assert x_BK.grad.isfinite().all()

    @modest
    @given(x=logits, p=distributions())
    def test_is_not_negative(self, name, x, p):
        assert (value(name, x, p) >= -1e-12).all()

    @modest
    @given(p=distributions())
    def test_is_least_at_the_target(self, name, p):
        at_target = value(name, np.log(np.maximum(p, 1e-300)), p)
        least = entropy(p, axis=1) * {"ce": 1, "mixture": EQUAL_WEIGHTS["ce"]}.get(name, 0)
        np.testing.assert_allclose(at_target, least, atol=1e-12)

    def test_its_gradient_is_that_of_its_value(self, name):
        torch.manual_seed(0)
        p_BK = torch.rand(4, K, dtype=torch.float64).softmax(-1)
        p_BK[0] = torch.eye(K)[3]
        x_BK = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: CONTRACT[name](x, p_BK), x_BK)

    def test_a_constant_added_to_the_logits_changes_nothing(self, name):
        generator = np.random.default_rng(1)
        x, p = generator.normal(size=(2, K)), generator.dirichlet(np.ones(K), 2)
        np.testing.assert_allclose(value(name, x, p), value(name, x + 100, p), rtol=1e-9)


@modest
@given(x=hnp.arrays(np.float64, (2, K), elements=st.floats(-30, 30)), p=distributions())
def test_values_are_those_of_scipy_and_of_the_definitions(x, p):
    q = np.exp(x - x.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(value("kl", x, p), entropy(p, q, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value("ce", x, p), entropy(p, axis=1) + entropy(p, q, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value("js", x, p), jensenshannon(p, q, axis=1, base=2) ** 2, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(value("mse", x, p), ((p - q) ** 2).mean(1), atol=1e-12)
    np.testing.assert_allclose(value("l1", x, p), abs(p - q).mean(1), atol=1e-12)


@modest
@given(x=logits, p=distributions())
def test_js_is_at_most_one_bit(x, p):
    assert (value("js", x, p) <= 1 + 1e-12).all()


def test_js_of_what_has_nothing_in_common_is_one_bit():
    p = np.eye(K)[:1]
    assert value("js", 1e4 * np.eye(K)[1:2], p) == pytest.approx(1)


@pytest.mark.parametrize("name", ["mse", "l1", "js"])
def test_some_losses_are_symmetric(name):
    p, q = np.random.default_rng(2).dirichlet(np.ones(K), (2, 3))
    np.testing.assert_allclose(value(name, np.log(q), p), value(name, np.log(p), q), rtol=1e-12)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    x_BK, p_BK = torch.randn(5, K), torch.rand(5, K).softmax(-1)
    mixed = mixture(LossConfig(kl=0.75, mse=0.25).weights)(x_BK, p_BK)
    torch.testing.assert_close(mixed, 0.75 * LOSSES["kl"](x_BK, p_BK) + 0.25 * LOSSES["mse"](x_BK, p_BK))


def test_every_loss_of_the_configuration_exists():
    assert list(LOSSES) == list(LossConfig.__dataclass_fields__)
