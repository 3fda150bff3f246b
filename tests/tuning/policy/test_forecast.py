import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, minimize
from scipy.stats import spearmanr

from raytune_emotion.tuning.policy import forecast, gaussian_process
from raytune_emotion.tuning.policy.acquisition import expected_improvement
from raytune_emotion.tuning.policy.encoding import Columns, encoding_of
from raytune_emotion.tuning.policy.forecast import Curve, Forecast
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import draw
from tests.support.studies import SEARCH_SPACE

LENGTH = 6
SPACE = SEARCH_SPACE | {
    "train.batch_size": {"choice": [16, 32, 64]},
    "augment.flip": {"uniform": [0.0, 0.5]},
    "start": [],
}


@pytest.fixture(scope="module")
def space():
    return parse_space(SPACE, "space")


def final(configuration):
    """A made-up best value: a valley in the learning rate, and lesser matters."""
    lr = math.log10(configuration["optim.lr"])
    better = 0.5 if configuration["model.backbone"] == "test_vit" else 0.0
    return 0.2 * math.exp(0.4 * (lr + 3 + better) ** 2 + 0.2 * configuration["loss.mse"] + 0.1 * better)


def curve(configuration, reports=LENGTH):
    """Falls by a quarter at each report, to its end."""
    whole = final(configuration)
    return Curve(configuration, {r: whole * 0.75 ** (r - LENGTH) for r in range(1, reports + 1)})


def test_configurations_lie_in_the_unit_cube(space):
    encoding = encoding_of(space)
    drawn = [*draw(space, 50, seed=0)]
    x_ND = encoding(drawn)
    assert x_ND.min() >= 0
    assert x_ND.max() <= 1
    axes = dict(zip([*encoding.ranges, "resnet", "vit"], x_ND.T, strict=True))
    assert {*np.round(axes["train.batch_size"], 6)} == {0, 0.5, 1}
    assert (axes["resnet"] == [each["model.backbone"] == "test_resnet" for each in drawn]).all()
    # Both branches on one scale, which is the logarithm's.
    low, high = math.log(1e-5), math.log(1e-2)
    assert axes["optim.lr"] == pytest.approx([(math.log(each["optim.lr"]) - low) / (high - low) for each in drawn])
    assert encoding([{}])[0, : len(encoding.ranges)].tolist() == [0.5] * len(encoding.ranges)


def test_what_a_branch_switches_off_lies_at_the_low_end_of_its_orders_of_magnitude():
    decays = {"optim.name": {"choice": ["adam", "sgd"]}, "optim.weight_decay": {"log_uniform": [1e-4, 1e-2]}}
    space = parse_space(decays | {"when": [{"if": {"optim.name": ["sgd"]}, "optim.weight_decay": 0}]})
    encoding = encoding_of(space)
    seen = [{"optim.name": "sgd", "optim.weight_decay": 0}, {"optim.name": "adam", "optim.weight_decay": 1e-3}]
    assert encoding(seen) == pytest.approx(np.array([[0, 0, 1], [0.5, 1, 0]]))


def test_configurations_by_columns_lie_where_they_lie_one_by_one(space):
    encoding = encoding_of(space)
    listed = [*draw(space, 20, seed=0), {}, {"optim.lr": None, "model.backbone": "of another study"}]
    keys = ["optim.lr", *encoding.choices]  # not all: the others are missing
    known = [{key: each[key] for key in keys if each.get(key) is not None} for each in listed]
    columns = {key: np.array([each.get(key, np.nan) for each in known], object) for key in keys}
    assert (encoding(Columns(columns)) == encoding(known)).all()
    assert (encoding(known[-1:]) == encoding(listed[-1:])).all()


def test_a_choice_of_nothing_is_the_same_by_columns_and_one_by_one():
    encoding = encoding_of(parse_space({"augment.recipe": {"choice": [None, "light"]}}))
    columns = Columns({"augment.recipe": np.array([None, "light"], object)})
    assert (encoding(columns) == encoding([{"augment.recipe": None}, {"augment.recipe": "light"}])).all()


def rank_correlation(forecast, space):
    unseen = [*draw(space, 60, seed=9)]
    return spearmanr(forecast(unseen)[0], [final(each) for each in unseen]).statistic


def test_what_was_stopped_early_counts_as_far_as_it_went(space):
    drawn = [*draw(space, 24, seed=1)]
    # The worst are stopped after a third. Taken for final, their values would say that nothing else matters.
    bound = np.median([final(each) for each in drawn])
    seen = [curve(each, LENGTH if final(each) < bound else LENGTH // 3) for each in drawn]
    forecast = Forecast(encoding_of(space), seen)
    assert rank_correlation(forecast, space) > 0.8
    mean_M, _ = forecast(drawn)
    assert np.median(abs(mean_M - np.log([final(each) for each in drawn]))) < 0.05


def test_where_trials_fail_the_worst_is_expected(space):
    drawn = [*draw(space, 40, seed=2)]
    seen = [Curve(each, {}) if each["train.batch_size"] == 64 else curve(each) for each in drawn]
    unseen = [*draw(space, 60, seed=9)]
    mean_M, _ = Forecast(encoding_of(space), seen)(unseen)
    large = np.array([each["train.batch_size"] == 64 for each in unseen])
    assert mean_M[large].mean() > mean_M[~large].mean() + 0.3


@pytest.mark.parametrize("earlier", [False, True], ids=["of this study", "of an earlier one alone"])
def test_what_is_believed_is_not_looked_for_again(space, earlier):
    forecast = Forecast(encoding_of(space), [curve(each) for each in draw(space, 12, seed=3)])
    if earlier:
        forecast = Forecast(encoding_of(space), [], [forecast])
    (there, elsewhere) = draw(space, 2, seed=4)
    mean_before, std_before = forecast([there, elsewhere])
    forecast.believe([there])
    mean_after, std_after = forecast([there, elsewhere])
    assert mean_after == pytest.approx(mean_before, abs=1e-6)
    assert std_after[0] < 0.3 * std_before[0]
    assert std_after[1] > 0.4 * std_before[1]


def test_a_loss_that_is_not_in_a_mixture_weighs_nothing(space):
    encoding = encoding_of(space)
    mixture = {"loss.kl": 0.5, "loss.js": 0.5}
    whole = encoding([{**mixture, "loss.mse": 0.0}])
    assert (encoding([mixture]) == whole).all()
    assert (encoding(Columns({key: np.array([value], object) for key, value in mixture.items()})) == whole).all()


def test_many_failed_trials_do_not_crowd_out_the_others(space):
    drawn = [*draw(space, 460, seed=7)]
    seen = [curve(each, 1) if number < 60 else Curve(each, {}) for number, each in enumerate(drawn)]
    points = forecast._points(seen, LENGTH)
    assert len(points.settings) == 60 + 100
    assert points.settings[-1] == drawn[-1], "the newest"


def test_an_earlier_study_helps_where_it_holds_and_is_left_where_it_does_not(space):
    encoding = encoding_of(space)
    # Other data: all values differ, the order does not.
    same = Forecast(encoding, [Curve(each, {1: 3 * final(each) ** 0.5}) for each in draw(space, 60, seed=5)])
    adverse = Forecast(encoding, [Curve(each, {1: 1 / final(each)}) for each in draw(space, 60, seed=5)])
    assert rank_correlation(Forecast(encoding, [], [same]), space) > 0.9
    few, many = ([curve(each) for each in draw(space, count, seed=6)] for count in (5, 40))
    cold = rank_correlation(Forecast(encoding, few), space)
    assert rank_correlation(Forecast(encoding, few, [same]), space) > max(0.9, cold)
    cold = rank_correlation(Forecast(encoding, many), space)
    assert rank_correlation(Forecast(encoding, many, [adverse]), space) > cold - 0.05


def test_what_is_known_of_settings_helps_while_trials_are_few(space):
    encoding = encoding_of(space)
    few = [[curve(each) for each in draw(space, 6, seed=seed)] for seed in range(10, 18)]
    known = [rank_correlation(Forecast(encoding, seen), space) for seen in few]
    unknown = [rank_correlation(Forecast(encoding, seen, lengths={}), space) for seen in few]
    assert np.median(known) > np.median(unknown)


def test_settings_are_known_by_the_longest_beginning_of_their_names():
    lengths = {"optim": 5.0, "optim.lr": 0.7, "loss": 3.5}
    names = ("optim.lr", "optim.weight_decay", "loss.kl", "losses", "data")
    found = {key: forecast.length_prior(key, lengths) for key in names}
    assert {key: known and known[0] for key, known in found.items()} == {
        "optim.lr": 0.7, "optim.weight_decay": 5.0, "loss.kl": 3.5, "losses": None, "data": None,
    }  # fmt: skip


def test_the_fit_goes_by_the_slope_of_what_it_minimises(space, monkeypatch):
    fitted = []
    monkeypatch.setattr(
        gaussian_process,
        "minimize",
        lambda loss, start, **kwargs: fitted.append(loss) or minimize(loss, start, **kwargs),
    )
    Forecast(encoding_of(space), [curve(each) for each in draw(space, 12, seed=7)])
    dims = encoding_of(space)([{}]).shape[1] + 1
    for seed in range(3):
        theta = np.random.default_rng(seed).normal(0, 0.7, dims + 2)
        off = check_grad(lambda at: fitted[0](at)[0], lambda at: fitted[0](at)[1], theta)
        assert off < 1e-4 * np.linalg.norm(fitted[0](theta)[1])


@settings(max_examples=20)
@given(mean=st.floats(-2, 2), std=st.floats(0.01, 2), best=st.floats(-2, 2))
def test_expected_improvement_is_what_draws_improve_in_the_mean(mean, std, best):
    drawn = np.random.default_rng(0).normal(mean, std, 20_000)
    (expected,) = expected_improvement(np.array([mean]), np.array([std]), best)
    assert expected == pytest.approx(np.maximum(best - drawn, 0).mean(), abs=0.03 * std)
