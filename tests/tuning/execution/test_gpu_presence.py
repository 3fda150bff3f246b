"""Which GPUs PyTorch cannot use."""

import pytest
import torch

from raytune_emotion.tuning.execution.gpu_presence import code_fault, has_code

CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100a", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "known", "has"),
    [
        ((7, 0), CUDA_13, False),  # V100
        ((6, 1), CUDA_13, False),  # GTX 1080 Ti
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # code for 8.6 runs on it
        ((9, 0), CUDA_13, True),
        ((10, 0), CUDA_13, True),
        ((10, 3), CUDA_13, False),  # code with a letter is for 10.0 alone
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # from intermediate code
        ((13, 0), CUDA_13[:-1], False),
        ((10, 3), ("sm_100f",), True),  # and code with this letter for the family
        ((7, 0), (), True),  # nothing is known
    ],
)
def test_code_runs_on_gpus_of_its_major_version_and_intermediate_code_on_newer_ones(capability, known, has):
    assert has_code(capability, known) == has


@pytest.mark.parametrize(("capability", "fault"), [((9, 0), ""), ((7, 0), "it has no code for Tesla V100")])
def test_a_gpu_for_which_pytorch_has_no_code_is_a_fault(monkeypatch, capability, fault):
    """Otherwise CUDA says so only at the first kernel, in each trial again."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*CUDA_13])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0) if number == 0 else capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: ["H200", "Tesla V100"][number])
    assert code_fault(0) == ""
    assert code_fault(1) == (fault and f"{fault}, whose compute capability is 7.0")
