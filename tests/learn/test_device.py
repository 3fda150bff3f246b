import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from raytune_emotion.learn.device import (
    compile_model,
    exact_fp32,
    find_device,
    halve_until_it_fits,
    is_out_of_memory,
    limit_memory,
    reduce_fragmentation,
)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_errors_of_the_device_that_say_memory_ran_out(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_a_call_gets_fewer_rows_until_they_fit_or_are_too_few():
    def call(rows):
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    tried = []
    assert halve_until_it_fits(call, 16) == 2
    assert tried == [16, 8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        halve_until_it_fits(call, 16, least=4)
    with pytest.raises(RuntimeError, match="something else"):
        halve_until_it_fits(lambda rows: (_ for _ in ()).throw(RuntimeError("something else")), 16)


@pytest.mark.parametrize(
    ("device", "share", "limits"),
    [
        ("cuda:1", 0.5, [((8 * 1024 / 2 - 600) / (8 * 1024), 1)]),  # 600 MiB are of CUDA itself
        ("cuda:1", 1.0, [(1.0, 1)]),
        ("cuda:1", 2.0, [(1.0, 1)]),
        ("cuda:1", 0.05, [(0.0, 1)]),
        ("cpu", 0.5, []),
    ],
)
def test_torch_gets_its_share_of_the_memory_of_a_gpu_without_that_of_cuda(monkeypatch, device, share, limits):
    limited = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *about: limited.append(about))
    limit_memory(torch.device(device), share)
    assert limited == limits


@pytest.mark.parametrize(
    ("has_gpu", "gpus", "device"),
    [(True, None, "cuda"), (True, "auto", "cuda"), (True, 0.5, "cuda"), (True, 0, "cpu"), (False, None, "cpu")],
)
def test_a_gpu_is_the_device_if_there_is_one_and_it_is_wanted(monkeypatch, has_gpu, gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert find_device(gpus) == torch.device(device)


def gradients(net, model, x_BCHW):
    """Train one step, as a run does."""
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK = net(x_BCHW)
    logits_BK.float().logsumexp(1).sum().backward()
    return logits_BK, *(parameter.grad for parameter in model.parameters())


def test_compiled_code_serves_every_dropout_and_learns_the_same(monkeypatch):
    traced, torch_compile = [], torch.compile

    def backend(graph, inputs):
        traced.append(graph.code)
        return graph

    monkeypatch.setattr(torch, "compile", lambda call, dynamic: torch_compile(call, dynamic=dynamic, backend=backend))
    x_BCHW = torch.randn(4, 3, 32, 32)
    learnt = []
    for dropout in (0.1, 0.9):
        model = timm.create_model("test_resnet", num_classes=8, drop_rate=dropout)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        compiled = gradients(compile_model(model), model, x_BCHW)
        assert model.state_dict().keys() == before.keys()
        assert "forward_features" not in vars(model), "an evaluation would be compiled, too"
        model.load_state_dict(before)
        plain = gradients(model, model, x_BCHW)
        assert all(torch.equal(*both) for both in zip(compiled, plain, strict=True))
        learnt.append(plain[-1])
    first, second = traced
    assert first == second
    assert not torch.equal(*learnt)


def test_a_model_without_features_is_compiled_whole(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    model = nn.Linear(1, 1)
    assert compile_model(model) is model


@pytest.mark.parametrize("allowed", [False, True])  # NVIDIA's containers allow it for products of matrices
def test_exact_fp32_switches_tf32_off_and_back_on(allowed):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    usual = matmul.allow_tf32
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    try:
        matmul.allow_tf32 = allowed
        with exact_fp32():
            assert not cudnn.allow_tf32
            assert not matmul.allow_tf32
            assert cudnn.enabled == before[0]
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before
        assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = usual


_NEWER = """
import torch
from raytune_emotion.learn.device import exact_fp32
backends = torch.backends
backends.{switch}.fp32_precision = "{value}"
switches = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
before = [switch.fp32_precision for switch in switches]
with exact_fp32():
    assert [switch.fp32_precision for switch in switches] == ["ieee"] * 3
assert [switch.fp32_precision for switch in switches] == before
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has had it since 2.9")
@pytest.mark.parametrize(("switch", "value"), [("cuda.matmul", "tf32"), ("cudnn.conv", "ieee")])
def test_exact_fp32_works_in_a_program_that_uses_the_newer_switches(switch, value):
    """In a process of its own, because nothing sets these switches back to what they were at the start."""
    subprocess.run([sys.executable, "-c", _NEWER.format(switch=switch, value=value)], check=True)


def test_memory_of_a_gpu_is_mapped_in_segments_that_grow(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is put back as it was
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    reduce_fragmentation()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    reduce_fragmentation()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    reduce_fragmentation()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "it would have priority"
