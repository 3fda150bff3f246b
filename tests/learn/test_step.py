import contextlib
import gc
import itertools
import types
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from raytune_emotion.config import OptimConfig
from raytune_emotion.data import loader
from raytune_emotion.data.loader import Batch
from raytune_emotion.learn import losses
from raytune_emotion.learn import step as step_module
from raytune_emotion.learn.optim import build_optimizer
from raytune_emotion.learn.step import Step, make_targets

CPU = torch.device("cpu")

distributions = arrays(np.float32, (20, 5), elements=st.floats(0.015625, 1, width=32)).map(
    lambda raw: (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
)


@given(prob_NK=distributions, smoothing=st.floats(0, 0.99))
def test_smoothed_targets_are_distributions_with_the_same_mean(prob_NK, smoothing):
    made = make_targets(prob_NK, smoothing=smoothing, balance=0, device=CPU)
    targets = made.smooth(torch.from_numpy(prob_NK))
    assert made.weigh(torch.from_numpy(prob_NK)) is None
    torch.testing.assert_close(targets.sum(1), torch.ones(20))
    torch.testing.assert_close(targets.mean(0), torch.from_numpy(prob_NK).mean(0), rtol=1e-4, atol=1e-5)
    spread = (torch.from_numpy(prob_NK) - targets.mean(0)) * (1 - smoothing)
    torch.testing.assert_close(targets - targets.mean(0), spread, rtol=1e-3, atol=1e-5)


@given(prob_NK=distributions, balance=st.floats(0.1, 1))
def test_rows_weigh_one_in_the_mean_and_more_the_rarer_their_class(prob_NK, balance):
    prob_N = torch.from_numpy(prob_NK)
    made = make_targets(prob_NK, smoothing=0, balance=balance, device=CPU)
    weight_N = made.weigh(prob_N)
    assert torch.equal(made.smooth(prob_N), prob_N)
    assert weight_N.mean().item() == pytest.approx(1, rel=1e-4)
    counts = np.bincount(prob_NK.argmax(1), minlength=5)
    by_row = counts[prob_NK.argmax(1)]
    expected = by_row.astype(float) ** -balance
    torch.testing.assert_close(weight_N.double(), torch.from_numpy(expected / expected.mean()), rtol=1e-4, atol=1e-6)


def test_in_full_balance_all_classes_that_occur_weigh_the_same():
    prob_NK = np.eye(3, dtype=np.float32)[[0] * 8 + [1] * 2]
    weight_N = make_targets(prob_NK, smoothing=0, balance=1, device=CPU).weigh(torch.from_numpy(prob_NK))
    assert weight_N[:8].sum().item() == pytest.approx(weight_N[8:].sum().item())


def test_a_mixture_weighs_what_its_own_row_does():
    """The likeliest class of a mixture may be one that no row has as its likeliest."""
    prob_BK = np.array([[0.6, 0, 0.4], [0, 0.6, 0.4]], np.float32)
    batch = Batch(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.from_numpy(prob_BK), np.arange(2))
    half = torch.full((2, 1, 1, 1), 0.5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    step = Step(
        net, torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False),
        losses.mixture({"kl": 1.0}), mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32, device=CPU, batch_rows=2,
        workers=1, targets=make_targets(prob_BK, smoothing=0, balance=1, device=CPU), grad_clip=0, capture=False,
    )  # fmt: skip
    step([(batch, {"share": half, "mixup": half})], 0.1)
    assert step.loss_sum.item() > 0


class Headed(nn.Module):
    """A backbone, with gradients far larger than those of its classifier."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc = nn.Linear(3 * 8 * 8, 4), nn.Linear(4, 3)

    def forward(self, x_BCHW):
        return self.fc(self.backbone(100 * x_BCHW.flatten(1)))

    def get_classifier(self):
        return self.fc


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_frozen_has_no_part_in_the_norm_of_the_gradients_nor_in_the_state_of_the_optimizer(name):
    torch.manual_seed(0)
    model, prob_BK = Headed(), np.full((2, 3), 1 / 3, np.float32)
    optimizer = build_optimizer(model, OptimConfig(name=name, momentum=0.5))
    step = Step(
        model, optimizer, torch.amp.GradScaler("cpu", enabled=False), losses.mixture({"kl": 1.0}), mean=(0, 0, 0),
        std=(1, 1, 1), dtype=torch.float32, device=CPU, batch_rows=2, workers=1,
        targets=make_targets(prob_BK, smoothing=0, balance=0, device=CPU), grad_clip=1e-3, capture=False,
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    inputs = [(Batch(images, torch.from_numpy(prob_BK), np.arange(2)), {})]
    began = {key: value.clone() for key, value in model.state_dict().items()}

    def moved(part):
        return sum((value - began[key]).square().sum() for key, value in part.items()).sqrt().item()

    def has_state(layer):
        return any(value.any() for p in layer.parameters() for value in optimizer.state.get(p, {}).values())

    step(inputs, 1.0, only_head=True)
    head = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    assert moved(rest) == 0
    assert has_state(model.fc)
    assert not has_state(model.backbone)
    if name == "sgd":
        # The length of its own gradient, which is cut: that of the backbone is far longer.
        assert moved(head) == pytest.approx(1e-3, rel=1e-4)
    step(inputs, 1.0)
    assert moved(rest) > 0
    assert has_state(model.backbone)


@pytest.fixture
def graphs(monkeypatch):
    """A device on which graphs are captured, of which nothing is computed here; the streams on which it happened."""
    used = types.SimpleNamespace(captures=[], launches=[], error=None)
    pool = itertools.count()
    now = []

    class Stream:
        def __init__(self, device):
            self.number = next(pool) % 32  # as torch's

        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, **options):
            used.captures.append(now[-1])

        def capture_end(self):
            if used.error is not None:
                raise used.error

        def replay(self):
            pass

    @contextlib.contextmanager
    def on(stream):
        now.append(stream.number)
        used.launches.append(stream.number)
        yield
        now.pop()

    for name, value in {
        "Stream": Stream, "CUDAGraph": Graph, "stream": on, "current_stream": Stream, "synchronize": print,
        "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    caches = step_module._capture_stream, loader._side_stream
    for cache in caches:
        cache.cache_clear()
    yield used
    for cache in caches:
        cache.cache_clear()


def captured_step():
    model, prob_BK = Headed(), np.full((2, 3), 1 / 3, np.float32)
    optimizer = build_optimizer(model, OptimConfig(name="adamw"))
    step = Step(
        model, optimizer, torch.amp.GradScaler("cpu", enabled=False), losses.mixture({"kl": 1.0}), mean=(0, 0, 0),
        std=(1, 1, 1), dtype=torch.float32, device=CPU, batch_rows=2, workers=1,
        targets=make_targets(prob_BK, smoothing=0, balance=0, device=CPU), grad_clip=0, capture=True,
    )  # fmt: skip
    inputs = [(Batch(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.from_numpy(prob_BK), np.arange(2)), {})]
    return step, optimizer, lambda: [step(inputs, 0.1) for _ in range(4)]


def test_no_run_of_a_process_is_captured_on_the_stream_of_the_loader(graphs):
    loads = loader._side_stream(CPU).number
    for _ in range(10):
        step, optimizer, train = captured_step()
        train()
        assert step.captured
        assert not any(group["capturable"] for group in optimizer.param_groups), "it warns outside of a graph"
    assert len(graphs.captures) == 10
    assert {*graphs.launches} == {*graphs.captures}, "memory that was freed stays with its stream"
    assert loads not in graphs.launches


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError),
        (RuntimeError("operation not permitted when stream is capturing"), None),
    ],
)
def test_a_capture_that_fails_keeps_nothing_of_its_step(graphs, error, raised):
    class Held:
        pass

    held = []
    step, _, train = captured_step()
    launch = step._launch

    def hold(inputs):
        of_this_step = Held()
        held.append(weakref.ref(of_this_step))
        launch(inputs)
        if len(held) == 4:
            raise error

    step._launch = hold
    gc.disable()
    try:
        with pytest.raises(raised) if raised else pytest.warns(UserWarning, match="cannot be captured"):
            train()
        error.__traceback__ = None  # the parameter of this test outlives it
        assert held[-1]() is None
    finally:
        gc.enable()
    assert not step.captured
