"""Every private interface of torch and timm that this project uses, by name and signature.

A new version of torch or timm breaks this test, with a list; `pyproject.toml` keeps a new torch away until somebody has
looked. The words of CUDA's libraries for a lack of memory are missing here: only a full GPU says them.
"""

import dataclasses
import inspect

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from timm.models import PretrainedCfg, get_deprecated_models
from torch import nn
from torch._inductor import config as inductor
from torch.nn.modules import batchnorm

from raytune_emotion.known_errors import known_error
from raytune_emotion.learn.device import is_out_of_memory
from raytune_emotion.learn.model import BatchNorm
from raytune_emotion.learn.timm_patches import architectures
from raytune_emotion.learn.torch_patches import (
    limit_compile_threads,
    misfits_of,
    suppress_compile_errors,
    zero_momentum,
)
from tests.support.interfaces import check_interface

#: Where it is, and its parameters where it is called; None where it is an attribute.
_PRIVATE = {
    "torch._dynamo.config:suppress_errors": None,
    "torch._inductor.config:compile_threads": None,
    "torch.utils.tensorboard.summary:hparams": ("hparam_dict", "metric_dict", "hparam_domain_discrete"),
    "torch.utils.tensorboard.writer:FileWriter.add_summary": ("self", "summary", "global_step", "walltime"),
}
#: What `learn/model.py` and `learn/origin.py` read or replace of timm's description of weights.
_OF_WEIGHTS = {
    "classifier", "custom_load", "file", "first_conv", "fixed_input_size", "hf_hub_filename", "hf_hub_id", "input_size",
    "label_offset", "license", "mean", "num_classes", "pool_size", "std",
}  # fmt: skip


@pytest.mark.parametrize("name", _PRIVATE)
def test_a_private_interface_is_as_it_was(name):
    check_interface(name, _PRIVATE[name])


def test_a_model_that_cannot_be_compiled_runs_uncompiled(monkeypatch):
    monkeypatch.setattr("torch._dynamo.config.suppress_errors", False)  # so that it is put back as it was

    def backend(graph, inputs):
        raise NotImplementedError

    suppress_compile_errors()
    model = torch.compile(nn.Flatten(), backend=backend)
    assert model(torch.ones(2, 3, 4)).shape == (2, 12)


def test_code_is_compiled_with_the_threads_of_the_trial_or_as_the_user_wishes(monkeypatch):
    monkeypatch.setattr(inductor, "compile_threads", 5)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    limit_compile_threads(3)
    assert inductor.compile_threads == 5
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    limit_compile_threads(3)
    assert inductor.compile_threads == 3


def test_the_momentum_of_sgd_has_the_name_that_is_set():
    weight = nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    zero_momentum(sgd)
    (momentum,) = sgd.state[weight].values()
    weight.grad = torch.ones(2)
    sgd.step()
    assert torch.equal(momentum, torch.ones(2))


def test_what_torch_says_when_memory_is_short_is_known():
    """Without these words, a trial that needs too much memory is not tried in smaller micro-batches."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert not isinstance(raised.value, torch.OutOfMemoryError), "the words are needed no more"
    assert is_out_of_memory(raised.value)
    assert "out of memory" in known_error(raised.value)[1]


def test_what_torch_says_of_weights_that_do_not_fit_is_known():
    with pytest.raises(RuntimeError) as raised:
        nn.Linear(1, 1).load_state_dict({"bias": torch.zeros(2)})
    missing, other_size = misfits_of(raised.value)
    assert missing == 'Missing key(s) in state_dict: "weight".'
    assert other_size.startswith("size mismatch for bias: ")


def test_every_layer_that_has_statistics_of_batches_is_of_a_public_class():
    classes = [kind for _, kind in inspect.getmembers(batchnorm, inspect.isclass)]
    public = {kind for kind in classes if issubclass(kind, batchnorm._BatchNorm) and kind.__name__ in batchnorm.__all__}
    # A lazy layer becomes one of the others when it first sees a batch.
    assert {getattr(kind, "cls_to_become", kind) for kind in public} == {*BatchNorm.__args__}
    assert issubclass(BatchNormAct2d, BatchNorm)
    assert issubclass(SyncBatchNormAct, BatchNorm)


def test_the_names_of_models_in_the_source_are_those_that_timm_takes():
    """Otherwise, a backbone that there is would be refused."""
    assert architectures() == {*timm.list_models(), *(name for name in get_deprecated_models() if "." not in name)}
    assert all(timm.is_model(name) for name in ("resnet18", "test_resnet", "tv_resnet34"))


def test_the_description_of_weights_has_the_fields_that_are_used():
    assert _OF_WEIGHTS - {field.name for field in dataclasses.fields(PretrainedCfg)} == set()
    assert isinstance(PretrainedCfg.has_weights, property)
