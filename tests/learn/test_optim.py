import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from raytune_emotion.config import OptimConfig
from raytune_emotion.learn.optim import build_optimizer, lr_factor, plateau_falls, reports_since_best

RUN = {"steps_per_epoch": 10, "total_steps": 100, "evals_per_epoch": 2}


def factors(config, val_js=()):
    return [lr_factor(config, step=step, val_js=val_js, **RUN) for step in range(100)]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.ones(1, 1, 4))

    def no_weight_decay(self):
        return {"token"}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_only_weights_of_more_dimensions_than_one_decay(name):
    model = Small().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == {"conv.weight"}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_momentum_is_of_each_optimizer(name):
    group = build_optimizer(Small(), OptimConfig(name=name, momentum=0.7)).param_groups[0]
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_step_that_the_scaler_skips_changes_nothing(name):
    model, scaler = Small(), torch.amp.GradScaler("cpu")
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for gradient in (math.inf, 1.0):
        assert all(map(torch.equal, model.parameters(), before))
        scaler.scale(sum(parameter.sum() for parameter in model.parameters())).backward()
        for parameter in model.parameters():
            parameter.grad *= gradient
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    # The first step of any of them is lr times the gradient, or its sign.
    for parameter, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value - 0.1)


def test_layers_learn_the_slower_the_further_they_are_from_the_head():
    model = timm.create_model("test_vit", num_classes=13)
    scale_of = {}
    for group in build_optimizer(model, OptimConfig(layer_decay=0.5)).param_groups:
        scale_of |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    named = {name: scale_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(named) == len(scale_of)
    assert named["head.weight"] == 1
    assert named["patch_embed.proj.weight"] == min(named.values())
    blocks = [named[f"blocks.{i}.attn.qkv.weight"] for i in range(len(model.blocks))]
    assert blocks == [named["patch_embed.proj.weight"] * 2**i for i in range(1, len(blocks) + 1)]


def test_the_head_has_groups_of_its_own():
    model = timm.create_model("test_resnet", num_classes=13)
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    head = {id(p) for group in groups if group["head"] for p in group["params"]}
    assert head == {id(p) for p in model.get_classifier().parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_momentum_from_nothing_is_that_of_torch():
    models = [Small() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(models[0], OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0))
    plain = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, fused=True)
    for _ in range(3):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            sum(parameter.square().sum() for parameter in model.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_warm_up_is_linear_and_reaches_the_peak():
    for schedule in ("constant", "cosine", "plateau"):
        rising = factors(OptimConfig(schedule=schedule, warmup_epochs=2.0))[:21]
        assert rising[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
        assert rising[20] == 1


def test_a_warm_up_of_part_of_a_step_never_exceeds_the_peak():
    assert max(factors(OptimConfig(schedule="constant", warmup_epochs=0.05))) == 1


def test_cosine_falls_to_nothing_and_constant_stays():
    falling = factors(OptimConfig(schedule="cosine", warmup_epochs=2.0))[20:]
    assert falling == sorted(falling, reverse=True)
    assert falling[40] == pytest.approx(0.5)
    assert 0 < falling[-1] < 1e-3
    assert set(factors(OptimConfig(schedule="constant"))) == {1}


def test_plateau_counts_its_patience_in_epochs():
    config = OptimConfig(schedule="plateau", plateau_patience=2.0, plateau_factor=0.1)
    val_js = [0.5, 0.4, 0.41, 0.42, 0.43]  # 2 reports an epoch: 1.5 epochs without a better one
    assert set(factors(config, val_js)) == {1}
    assert set(factors(config, [*val_js, 0.44])) == {0.1}


@settings(max_examples=50)
@given(val_js=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), max_size=20), patience=st.integers(1, 4))
def test_plateau_is_that_of_torch_without_its_state(val_js, patience):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch falls when there are more bad reports than its patience, this when there are as many.
    reference = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience - 1, threshold=0, eps=0)
    for value in val_js:
        reference.step(value)
    assert optimizer.param_groups[0]["lr"] == 0.5 ** plateau_falls(val_js, patience)


def test_the_first_of_equals_is_the_best():
    assert reports_since_best([0.3, 0.2, 0.2, 0.25]) == 2
    assert reports_since_best([0.3]) == 0
