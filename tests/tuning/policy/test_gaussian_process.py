import numpy as np
import pytest
from scipy.spatial.distance import cdist

from raytune_emotion.tuning.policy.gaussian_process import Kernel, Posterior


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def kernel(rng):
    return Kernel(variance=1.7, length_D=rng.uniform(0.2, 5, 6), noise=0.02)


def test_the_kernel_is_materns_of_five_halves_also_between_points_that_are_the_same(kernel, rng):
    x_MD, y_ND = rng.random((40, 6)), rng.random((30, 6))
    y_ND[:5] = x_MD[:5]
    r_MN = np.sqrt(5) * cdist(x_MD / kernel.length_D, y_ND / kernel.length_D)
    expected_MN = 1.7 * (1 + r_MN + r_MN**2 / 3) * np.exp(-r_MN)
    np.testing.assert_allclose(kernel(x_MD, y_ND), expected_MN, rtol=1e-12, atol=1e-13)


def test_to_believe_what_is_predicted_is_to_have_seen_it(kernel, rng):
    x_ND, z_N, running_RD, asked_MD = (
        rng.random((50, 6)),
        rng.standard_normal(50),
        rng.random((7, 6)),
        rng.random((9, 6)),
    )
    posterior = Posterior(kernel, x_ND, z_N)
    seen = Posterior(kernel, np.concatenate([x_ND, running_RD]), np.concatenate([z_N, posterior.mean(running_RD)]))
    posterior.believe(running_RD[:3])
    posterior.believe(running_RD[3:])
    for mean_or_std, expected in zip(posterior(asked_MD), seen(asked_MD), strict=True):
        np.testing.assert_allclose(mean_or_std, expected, rtol=1e-9)


def test_a_trial_that_runs_where_another_was_seen_changes_nothing_but_the_spread():
    x_ND = np.repeat(np.linspace(0, 1, 5), 4)[:, None]
    posterior = Posterior(Kernel(1.0, np.array([3.0]), 1e-12), x_ND, np.sin(x_ND[:, 0]))
    before = posterior.mean(x_ND)
    posterior.believe(x_ND)
    mean_N, std_N = posterior(x_ND)
    np.testing.assert_array_equal(mean_N, before)
    assert np.isfinite(std_N).all()
