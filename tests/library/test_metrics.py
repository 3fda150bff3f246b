import numpy as np
import pytest
import torch

from raytune_emotion import MetricsCalculator
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.learn.metrics import distances_of, per_sample
from raytune_emotion.library.metrics import METRICS

torch.manual_seed(0)
LOGITS, TARGETS = 3 * torch.randn(40, 13), torch.softmax(4 * torch.randn(40, 13), -1)
TARGETS[:5] = torch.eye(13)[:5]


def test_every_metric_equals_that_of_the_commands():
    expected = per_sample(LOGITS, TARGETS, distances_of(EMOTIONS))
    calculator = MetricsCalculator()
    assert calculator.metrics == METRICS == tuple(expected)
    found = calculator.compute_per_sample(LOGITS.softmax(-1), TARGETS)
    means = calculator.compute_all(LOGITS.softmax(-1), TARGETS)
    for name, value_N in expected.items():
        torch.testing.assert_close(found[name], value_N, rtol=0, atol=1e-6)
        assert means[name] == pytest.approx(value_N.mean().item(), abs=1e-6)


def test_arrays_are_taken_as_tensors_are():
    asked = MetricsCalculator(["tvd", "js"])
    q, p = LOGITS.softmax(-1), TARGETS
    assert asked.compute_all(q.numpy(), p.numpy()) == asked.compute_all(q, p)
    assert list(asked.compute_all(q, p)) == ["tvd", "js"]
    backwards = asked.compute_all(q.numpy()[::-1, ::-1], p.numpy()[::-1, ::-1])
    assert backwards == pytest.approx(asked.compute_all(q, p))


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_zeros_and_ones_give_finite_numbers(make):
    values = MetricsCalculator().compute_all(make((3, 13)), np.eye(13)[:3])
    assert all(np.isfinite(value) for value in values.values())


def test_other_classes_have_no_distance_in_the_plane():
    calculator = MetricsCalculator(classes=("yes", "no"))
    assert "emd_va" not in calculator.compute_all(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    with pytest.raises(UserError, match="'emd_va'"):
        MetricsCalculator(["emd_va"], classes=("yes", "no"))


def test_all_unknown_metrics_are_told_at_once():
    with pytest.raises(UserError) as refused:
        MetricsCalculator(["js", "jss", "kll"])
    assert len(refused.value.faults) == 2
    assert "got 'jss'; did you mean js" in refused.value.faults[0]


@pytest.mark.parametrize("shapes", [((2, 13), (3, 13)), ((13,), (13,)), ((0, 13), (0, 13))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(UserError, match=r"expected two of one shape \[N, K\]"):
        MetricsCalculator().compute_all(*map(torch.rand, shapes))


def test_logits_are_refused():
    """Divided by their sum, they would have a JS that looks like one."""
    with pytest.raises(UserError) as refused:
        MetricsCalculator().compute_all(torch.linspace(-2, 4, 13)[None], np.full((1, 13), -1 / 13))
    assert [fault.split(":")[0] for fault in refused.value.faults] == ["predictions", "targets"]
    assert "apply a softmax to logits" in refused.value.faults[0]


def test_the_columns_must_be_those_of_the_classes():
    with pytest.raises(UserError, match="expected 13 columns, one a class, got 5"):
        MetricsCalculator().compute_all(torch.rand(2, 5), torch.rand(2, 5))


def test_a_whole_split_gives_the_numbers_of_an_evaluation(store):
    from raytune_emotion import create_loaders, create_model
    from raytune_emotion.learn.evaluation import evaluate

    model = create_model("test_resnet", pretrained=False, image_size=32).eval()
    _, val = create_loaders(store.path, batch_size=10)
    with torch.inference_mode():
        parts = [(model(images), targets) for images, targets in val]
    found = MetricsCalculator().compute_all(*map(torch.cat, zip(*parts, strict=True)))
    expected = evaluate(model.backbone, store.val, classes=store.classes, device=torch.device("cpu"))
    assert found == pytest.approx(expected, abs=1e-6)
