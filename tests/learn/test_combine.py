"""Ensembles and soups: how members are chosen, and how the gain is measured."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from torch.nn import BatchNorm2d
from torch.nn.modules.module import register_module_forward_pre_hook

from raytune_emotion.data.augment import normalise
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.combine import (
    Soup,
    choose_ensemble,
    choose_soup,
    images_per_second,
    js_of,
    list_compatible,
    mean_weights,
    predict_whole,
    unseen_js,
    unseen_js_of_ensemble,
)
from raytune_emotion.learn.graphs import Ensemble, PixelsToProbabilities
from raytune_emotion.learn.model import load_model, mean_std
from raytune_emotion.learn.predictions import half_of
from tests.support.exports import untrained_best

CPU = torch.device("cpu")
K = len(EMOTIONS)
ALL = np.ones(200, bool)


def targets(rows=200, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(K, 0.5), rows))


def noisy(true_NK, strength, seed):
    """Predictions with errors of their own."""
    noise_NK = torch.from_numpy(np.random.default_rng(seed).normal(0, strength, true_NK.shape))
    return (true_NK.clamp_min(1e-3).log() + noise_NK).softmax(-1)


def test_js_is_that_of_the_definition():
    p_NK, q_NK = targets(20), targets(20, seed=1)
    m_NK = (p_NK + q_NK) / 2
    expected_N = ((p_NK * (p_NK / m_NK).log2()).sum(-1) + (q_NK * (q_NK / m_NK).log2()).sum(-1)) / 2
    assert js_of(q_NK, p_NK) == pytest.approx(expected_N.numpy())
    assert np.isfinite(js_of(torch.eye(K)[:1].double(), torch.eye(K)[1:2].double())).all()


def test_an_ensemble_begins_with_the_best_and_takes_what_differs():
    true_NK = targets()
    best, copy, other = noisy(true_NK, 1.0, 1), noisy(true_NK, 1.02, 1), noisy(true_NK, 1.1, 2)
    assert choose_ensemble([other, best, copy], true_NK, ALL, 1) == (1,)
    assert choose_ensemble([other, best, copy], true_NK, ALL, 2) == (1, 0)


def test_an_ensemble_leaves_out_what_makes_it_worse():
    true_NK = targets()
    good, bad = noisy(true_NK, 0.3, 1), torch.full_like(true_NK, 1 / K)
    assert choose_ensemble([bad, good, bad], true_NK, ALL, 3) == (1,)


def test_a_choice_looks_at_its_rows_alone():
    true_NK = targets()
    rows = np.arange(200) < 100
    first, second = noisy(true_NK, 0.3, 1), noisy(true_NK, 0.8, 2)
    first[100:], second[100:] = noisy(true_NK, 5.0, 3)[100:], true_NK[100:]
    assert choose_ensemble([first, second], true_NK, rows, 1) == (0,)
    assert choose_ensemble([first, second], true_NK, ~rows, 1) == (1,)


def test_halves_are_a_function_of_each_id():
    ids = [str(number) for number in range(1000)]
    half = half_of(ids)
    assert 400 < half.sum() < 600
    assert list(half_of(ids[::-1])) == list(half[::-1])
    assert half[5] == (hashlib.sha256(b"5").digest()[0] % 2 == 0)


def test_a_choice_is_measured_on_what_it_has_not_seen():
    """A model that is right on one half and wrong on the other looks best wherever it is chosen, and is not."""
    ids = [str(number) for number in range(200)]
    true_NK, half = targets(), torch.from_numpy(half_of(ids))
    overfit = [torch.where(mask[:, None], true_NK, torch.full_like(true_NK, 1 / K)) for mask in (half, ~half)]
    uniform = float(js_of(torch.full_like(true_NK, 1 / K), true_NK).mean())
    assert unseen_js_of_ensemble(overfit, ids, true_NK, 1) == pytest.approx(uniform, rel=0.05)


def test_the_gain_of_different_models_is_found():
    ids, true_NK = [str(number) for number in range(200)], targets()
    models = [noisy(true_NK, 1.0, seed) for seed in range(3)]
    single, combined = (unseen_js_of_ensemble(models, ids, true_NK, most) for most in (1, 3))
    assert combined < single


def test_nothing_is_measured_where_a_half_is_empty():
    true_NK = targets(1)
    assert unseen_js(lambda rows: (0,), lambda members: true_NK, ["5"], true_NK) is None


def test_a_soup_takes_what_does_not_harm():
    true_NK = targets()
    together = {(0,): 1.0, (1,): 0.9, (2,): 1.2, (1, 0): 0.8, (1, 0, 2): 2.0}
    asked = []

    def predict(members):
        asked.append(members)
        return noisy(true_NK, together[members], 7)

    assert choose_soup(predict, 3, true_NK, ALL) == (1, 0)
    assert asked[-1] == (1, 0, 2)


def test_weights_are_averaged_and_counters_are_not():
    states = [{"w": torch.tensor([value]), "n": torch.tensor(count)} for value, count in ((1.0, 4), (2.0, 9))]
    mixed = mean_weights(states)
    assert mixed["w"].tolist() == [1.5]
    assert mixed["n"].item() == 4
    assert mixed["w"].dtype == torch.float32


def test_only_models_alike_are_averaged():
    first, second = untrained_best("test_resnet", 32, seed=1), untrained_best("test_resnet", 32, seed=2)
    others = [untrained_best("test_vit", 32), untrained_best("test_resnet", 48)]
    assert list_compatible([first, *others, second]) == [0, 3]


def soup_of(backbone, store, device=CPU):
    """Two untrained models, the mean of their weights as a model, and what makes a soup of them."""
    bests = [untrained_best(backbone, 32, store.classes, seed=seed) for seed in (1, 2)]
    mean = dataclasses.replace(bests[0], weights=mean_weights([best.weights for best in bests]))
    known = [predict_whole(best, store.val, CPU) for best in bests]
    return bests, mean, Soup(bests, store, known, device)


def test_a_soup_predicts_with_its_weights_once(store):
    bests, _, soup = soup_of("test_resnet", store)
    assert torch.equal(soup.predict((1,)), predict_whole(bests[1], store.val, CPU))
    assert torch.equal(soup.predict((1, 0)), predict_whole(soup.best((1, 0)), store.val, CPU))
    assert soup.predict((0, 1)) is soup.predict((1, 0))


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_the_parameters_of_a_soup_are_the_mean_of_its_members(store, backbone):
    bests, mean, soup = soup_of(backbone, store)
    mixed = soup.best((0, 1))
    names = [name for name, _ in load_model(mean).named_parameters()]
    assert all(torch.equal(mixed.weights[name], mean.weights[name]) for name in names)
    assert soup.best((1,)) is bests[1]


def test_batchnorm_of_a_soup_has_the_statistics_of_what_it_sees_in_training_images(store):
    _, mean, soup = soup_of("test_resnet", store)
    mixed = soup.best((0, 1))
    model = load_model(mean)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BatchNorm2d)}
    assert len(layers) > 1
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen.update({name: inputs[0]}))
        layer.train()
    with torch.no_grad():
        images_NHWC = torch.from_numpy(store.train.gather(np.arange(len(store.train))))
        model(normalise(images_NHWC, *mean_std(model)))
    for name, values_BCHW in seen.items():
        for statistic, of in (("running_mean", torch.mean), ("running_var", torch.var)):
            found_C, before_C = (its.weights[f"{name}.{statistic}"] for its in (mixed, mean))
            assert torch.allclose(found_C, of(values_BCHW, (0, 2, 3)), rtol=1e-3, atol=1e-4)
            assert not torch.allclose(found_C, before_C, rtol=1e-3, atol=1e-4)


def test_a_soup_is_the_same_each_time(store):
    first, second = (soup_of("test_resnet", store)[2].best((0, 1)) for _ in range(2))
    assert all(torch.equal(second.weights[name], tensor) for name, tensor in first.weights.items())


def test_a_soup_is_made_with_fewer_images_at_once_where_the_device_has_too_little_memory(store):
    def refuse(module, inputs):
        if len(inputs[0]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    soup, with_room = (soup_of("test_resnet", store)[2] for _ in range(2))
    hook = register_module_forward_pre_hook(refuse)
    try:
        found_NK = soup.predict((0, 1))
    finally:
        hook.remove()
    # The statistics of BatchNorm are the mean over other batches.
    assert torch.allclose(found_NK, with_room.predict((0, 1)), atol=0.02)


def test_models_are_run_on_the_device_that_is_asked_for(store):
    """On the device `meta`, on which tensors have no values that could be read at the end."""
    _, mean, soup = soup_of("test_vit", store, torch.device("meta"))
    for predict in (lambda: soup.predict((0, 1)), lambda: predict_whole(mean, store.val, torch.device("meta"))):
        with pytest.raises(NotImplementedError, match="meta tensor"):
            predict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_soup_on_a_gpu_is_that_of_the_cpu(store):
    here, there = (soup_of("test_resnet", store, torch.device(name))[2] for name in ("cpu", "cuda"))
    assert torch.allclose(there.predict((0, 1)), here.predict((0, 1)), atol=1e-4)
    assert {tensor.device for tensor in there.best((0, 1)).weights.values()} == {CPU}


def test_an_ensemble_is_the_mean_of_its_members_from_pixels_on():
    images_NHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    members = [
        PixelsToProbabilities(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, K)), (0.5,) * 3, (0.5,) * 3)
        for _ in range(2)
    ]
    with torch.inference_mode():
        expected = (members[0](images_NHWC) + members[1](images_NHWC)) / 2
        assert torch.allclose(Ensemble(members)(images_NHWC), expected)
    assert images_per_second(Ensemble(members), 32, seconds=0) > 0
