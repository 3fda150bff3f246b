import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linprog
from scipy.spatial import distance
from scipy.stats import wasserstein_distance

from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.metrics import MetricSums, distances_of, per_sample
from raytune_emotion.learn.transport import transport_cost

K = len(EMOTIONS)


def by_linear_programme(d, p, q):
    """The transport cost as its textbook programme, one row."""
    k = len(p)
    leaves, arrives = np.kron(np.eye(k), np.ones(k)), np.kron(np.ones(k), np.eye(k))
    # The last equation follows from the others, and rounding must not contradict it.
    solved = linprog(d.ravel(), A_eq=np.vstack([leaves, arrives])[:-1], b_eq=np.concatenate([p, q])[:-1])
    assert solved.status == 0
    return solved.fun


@pytest.fixture(scope="module")
def rows():
    """Logits, predictions and targets; the targets have zeros, and one predictions' row equals its target."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.full(K, 0.3), 20)
    p = np.where(p < 0.02, 0, p)
    p /= p.sum(1, keepdims=True)
    x = generator.normal(size=(20, K)) * 2
    x[7] = np.where(p[7] > 0, np.log(np.maximum(p[7], 1e-300)), -1e5)
    q = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    return x, q, p


@pytest.fixture(scope="module")
def metrics(rows):
    x, _, p = rows
    values = per_sample(torch.from_numpy(x), torch.from_numpy(p), distances_of(EMOTIONS))
    return {name: value_B.numpy() for name, value_B in values.items()}


def test_the_metrics_of_the_design_are_there(metrics):
    in_order = "js kl ce tvd mse l1 emd emd_va chebyshev clark canberra cosine intersection accuracy"
    assert " ".join(metrics) == in_order
    assert {value_B.shape for value_B in metrics.values()} == {(20,)}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("js", lambda p, q: distance.jensenshannon(p, q, base=2) ** 2),
        ("tvd", lambda p, q: distance.cityblock(p, q) / 2),
        ("mse", lambda p, q: distance.sqeuclidean(p, q) / K),
        ("l1", lambda p, q: distance.cityblock(p, q) / K),
        ("emd", lambda p, q: wasserstein_distance(range(K), range(K), p, q)),
        ("emd_va", lambda p, q: by_linear_programme(distances_of(EMOTIONS).numpy(), p, q)),
        ("chebyshev", distance.chebyshev),
        ("canberra", distance.canberra),
        ("clark", lambda p, q: np.linalg.norm((p - q)[p + q > 0] / (p + q)[p + q > 0])),
        ("cosine", lambda p, q: 1 - distance.cosine(p, q)),
        ("intersection", lambda p, q: 1 - distance.cityblock(p, q) / 2),
        ("accuracy", lambda p, q: np.argmax(p) == np.argmax(q)),
    ],
)
def test_values_are_those_of_scipy(metrics, rows, name, reference):
    _, q, p = rows
    expected = [reference(*pair) for pair in zip(p, q, strict=True)]
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-6, atol=2e-9)


def test_equal_distributions_are_no_distance_apart(metrics):
    for name, value_B in metrics.items():
        if name != "ce":
            assert value_B[7] == pytest.approx(1 if name in ("cosine", "intersection", "accuracy") else 0, abs=1e-9), (
                name
            )


def test_a_class_that_neither_side_gives_mass_counts_zero():
    x_BK = torch.tensor([[0.0, 0.0, -1e5]])
    values = per_sample(x_BK, torch.tensor([[0.5, 0.5, 0.0]]), None)
    assert values["clark"].item() == values["canberra"].item() == 0


def test_classes_without_a_place_in_the_plane_have_no_transport_cost():
    assert distances_of(("yes", "no")) is None
    assert "emd_va" not in per_sample(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), None)


@settings(max_examples=40)
@given(data=st.data(), k=st.integers(2, 7))
def test_transport_is_exact_on_any_metric_with_all_its_ties(data, k):
    """Points on a small grid: distances are often equal, points in line or one upon the other."""
    points = data.draw(hnp.arrays(np.int64, (k, 2), elements=st.integers(0, 3))).astype(float)
    weights = data.draw(hnp.arrays(np.int64, (2, k), elements=st.integers(0, 3)))
    weights[weights.sum(1) == 0, 0] = 1
    p, q = weights / weights.sum(1, keepdims=True)
    d = np.linalg.norm(points[:, None] - points, axis=-1)
    cost = transport_cost(torch.from_numpy(d), torch.from_numpy(p - q)[None]).item()
    assert cost == pytest.approx(by_linear_programme(d, p, q), abs=1e-8)


def test_transport_of_one_step_is_the_distance():
    d_KK = distances_of(EMOTIONS)
    diff_BK = torch.eye(K, dtype=torch.float64)[:1] - torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(transport_cost(d_KK, diff_BK), d_KK[0], rtol=0, atol=1e-9)


def test_transport_takes_few_pivots_and_drops_each_row_at_its_optimum(monkeypatch):
    einsum, rows = torch.einsum, []
    monkeypatch.setattr(torch, "einsum", lambda *args: rows.append(len(args[1])) or einsum(*args))
    p, q = np.random.default_rng(0).dirichlet(np.ones(K), (2, 4000))
    transport_cost(distances_of(EMOTIONS), torch.from_numpy(p - q))
    assert rows[0] == 4000
    assert sum(rows) / 4000 < 25


def test_transport_ends_where_there_is_nothing_to_walk_on():
    d_KK = distances_of(EMOTIONS)
    assert transport_cost(d_KK, torch.full((2, K), torch.nan, dtype=torch.float64)).isnan().all()
    assert transport_cost(d_KK, torch.empty(0, K, dtype=torch.float64)).shape == (0,)


def test_means_do_not_depend_on_how_the_rows_were_added(rows, metrics):
    x, _, p = rows
    sums = MetricSums()
    for part in (slice(0, 7), slice(7, 7), slice(7, 20)):
        sums.add(per_sample(torch.from_numpy(x[part]), torch.from_numpy(p[part]), distances_of(EMOTIONS)))
    assert sums.means() == pytest.approx({name: value_B.mean() for name, value_B in metrics.items()}, rel=1e-12)
