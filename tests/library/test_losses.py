import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raytune_emotion import (
    CombinedLoss,
    CrossEntropyLoss,
    JSLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    get_loss_function,
)
from raytune_emotion.errors import UserError
from raytune_emotion.learn import losses

K = 13
NAMES = ("mse", "l1", "kl", "ce", "js")
CLASSES = {"mse": MSELoss, "l1": L1Loss, "kl": KLDivLoss, "ce": CrossEntropyLoss, "js": JSLoss}
modest = settings(max_examples=30)

logits = hnp.arrays(np.float32, (3, K), elements=st.floats(-5, 5, width=32))
#: Anything a careless script hands over as probabilities: rows need not even sum to one.
extremes = st.sampled_from([0.0, 1.0, 1e-30, 1e-7, 0.5])
numbers = hnp.arrays(np.float32, (3, K), elements=extremes | st.floats(0, 1, width=32))


def rows_of(weights):
    """Probabilities, zeros and ones among them."""
    weights = np.where(weights.sum(1, keepdims=True) == 0, 1, weights)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


distributions = hnp.arrays(np.int64, (3, K), elements=st.integers(0, 3)).map(rows_of)


@pytest.mark.parametrize("name", NAMES)
class TestEveryLoss:
    @modest
    @given(x=logits, p=distributions)
    def test_equals_that_of_the_commands(self, name, x, p):
        x_BK, p_BK = torch.from_numpy(x), torch.from_numpy(p)
        expected = losses.LOSSES[name](x_BK, p_BK).mean().item()
        assert get_loss_function(name)(x_BK.softmax(-1), p_BK).item() == pytest.approx(expected, abs=1e-6)

    @modest
    @given(x=logits, p=distributions)
    def test_has_the_gradient_of_that_of_the_commands(self, name, x, p):
        p_BK, gradients = torch.from_numpy(p).double(), []
        for loss in (
            lambda x_BK: get_loss_function(name)(x_BK.softmax(-1), p_BK),
            lambda x_BK: losses.LOSSES[name](x_BK, p_BK).mean(),
        ):
            x_BK = torch.tensor(x, dtype=torch.float64, requires_grad=True)
            loss(x_BK).backward()
            gradients.append(x_BK.grad)
        if name != "l1":  # whose gradient at a difference of zero is any
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)

    @modest
    @given(q=numbers, p=numbers)
    def test_is_finite_and_so_is_its_gradient_for_any_numbers(self, name, q, p):
        for dtype in (torch.float16, torch.float32, torch.float64):
            q_BK = torch.tensor(q, dtype=dtype, requires_grad=True)
            value = get_loss_function(name)(q_BK, torch.tensor(p, dtype=dtype))
            assert value.shape == ()
            assert value.isfinite()
            value.float().backward()
            assert dtype == torch.float16 or q_BK.grad.isfinite().all()

    @pytest.mark.parametrize("make", [torch.zeros, torch.ones, lambda *shape: torch.eye(K)[: shape[0]]])
    def test_is_finite_at_zeros_ones_and_single_classes(self, name, make):
        p_BK = torch.eye(K)[[1, 2]]
        q_BK = make(2, K).requires_grad_()
        value = get_loss_function(name)(q_BK, p_BK)
        value.backward()
        assert value.isfinite()
        assert q_BK.grad.isfinite().all()

    @modest
    @given(p=distributions)
    def test_is_least_where_the_prediction_is_the_target(self, name, p):
        p_BK, loss = torch.from_numpy(p), get_loss_function(name)
        other = p_BK.roll(1, dims=0) * 0.5 + p_BK * 0.5
        assert loss(p_BK, p_BK) <= loss(other, p_BK) + 2e-6
        if name != "ce":
            assert loss(p_BK, p_BK).abs() < 2e-5

    def test_refuses_shapes_that_differ(self, name):
        with pytest.raises(UserError, match=r"expected the shape of the predictions, \(2, 13\), got \(13,\)"):
            get_loss_function(name)(torch.rand(2, K), torch.rand(K))


def test_js_lies_between_zero_and_one_bit():
    one, other = torch.eye(K)[:1], torch.eye(K)[1:2]
    assert JSLoss()(one, one).item() == pytest.approx(0, abs=1e-5)
    assert JSLoss()(one, other).item() == pytest.approx(1, abs=1e-4)


def test_a_prediction_of_zero_can_recover():
    logits_BK = torch.tensor([[60.0, 0.0]], requires_grad=True)
    KLDivLoss()(logits_BK.double().softmax(-1), torch.tensor([[0.0, 1.0]])).backward()
    assert logits_BK.grad[0, 1] < 0


def test_epsilon_bounds_what_a_zero_costs():
    zero, one = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for epsilon in (1e-3, 1e-7):
        assert get_loss_function("ce", epsilon=epsilon)(zero, one).item() == pytest.approx(-np.log(epsilon), rel=1e-3)


def test_a_name_gives_its_class():
    assert {name: type(get_loss_function(name)) for name in NAMES} == CLASSES


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="expected one of mse, l1, kl, ce, js, got 'jsd'; did you mean js"):
        get_loss_function("jsd")


@modest
@given(x=logits, p=distributions, w=st.floats(0, 1))
def test_a_combined_loss_equals_the_mixture_of_the_commands(x, p, w):
    x_BK, p_BK = torch.from_numpy(x), torch.from_numpy(p)
    combined = CombinedLoss([(KLDivLoss(), w), (JSLoss(), 1 - w)])
    expected = losses.mixture({"kl": w, "js": 1 - w})(x_BK, p_BK).mean().item()
    assert combined(x_BK.softmax(-1), p_BK).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("parts", [[], [(MSELoss(), -1.0)], [(MSELoss(), float("nan"))]])
def test_a_combined_loss_refuses_weights_that_are_none(parts):
    with pytest.raises(UserError, match="CombinedLoss: expected"):
        CombinedLoss(parts)
