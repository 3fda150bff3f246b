"""Set what a process takes of its device: memory and precision; tell whether an error says that memory ran out."""

import contextlib
import os
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

#: Bytes of a GPU that CUDA takes for a process beside what torch asks for: its context, kernels, and libraries.
_CONTEXT = 600 * 2**20

#: CUDA and its libraries, which take memory beside torch, and torch's allocator on a CPU say it in words.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def find_device() -> torch.device:
    """Return the GPU of this process if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def allowance(total: float, share: float) -> float:
    """Return the bytes of a GPU that torch may take for a process with a share of it, so that all have room."""
    return total if share >= 1 else max(0.0, share * total - _CONTEXT)


def limit_memory(device: torch.device, share: float) -> None:
    """Keep torch in this process to its share of a GPU's memory. Does nothing on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(allowance(total, share) / total, device.index)


def reduce_fragmentation() -> None:
    """Have torch map GPU memory in segments that grow, for trials whose batches differ. Call it before CUDA starts."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def compile_model(model: nn.Module) -> nn.Module:
    """Compile a model for batches of one shape. What cannot be compiled is run as it is, with a warning."""
    # Earlier runs of this process would count against torch's limit of shapes. Their code stays in its cache on disk.
    torch.compiler.reset()
    torch._dynamo.config.suppress_errors = True
    return cast("nn.Module", torch.compile(model, dynamic=False))


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Switch off TF32, which cuDNN otherwise uses for convolutions in fp32 on a GPU: ten bits of a mantissa's 23."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield
