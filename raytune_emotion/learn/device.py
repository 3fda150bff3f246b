"""Set the memory limit and precision of a device, compile models, and recognise out-of-memory errors."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from raytune_emotion.learn.torch_patches import OUT_OF_MEMORY, limit_compile_threads, suppress_compile_errors

T = TypeVar("T")

#: GPU memory that CUDA uses for a process in addition to torch's: context, kernels and libraries; bytes.
_CONTEXT = 600 * 2**20


def find_device(gpus: float | str | None = None) -> torch.device:
    """Return the GPU of this process if it has one, else the CPU.

    Args:
        gpus: GPUs per worker of the study or command; 0: the CPU, whether or not there is a GPU.
    """
    return torch.device("cuda" if gpus != 0 and torch.cuda.is_available() else "cpu")


def allowance(total: float, share: float) -> float:
    """Return the GPU memory that torch may use in a process with a share of the GPU, bytes, so that all have room."""
    return total if share >= 1 else max(0.0, share * total - _CONTEXT)


def limit_memory(device: torch.device, share: float) -> None:
    """Limit torch in this process to its share of a GPU's memory. Do nothing on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(allowance(total, share) / total, device.index)


def withheld_part(device: torch.device, share: float) -> float:
    """Return which part of this process's share of a GPU's memory other processes hold, 0 to 1; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return float(is_out_of_memory(error))  # there is not even room for this question
    due = min(share, 1.0) * total
    return max(0.0, due - _CONTEXT - torch.cuda.memory_reserved(device) - free) / due


def reduce_fragmentation() -> None:
    """Let torch map GPU memory in growing segments, for trials of different batch sizes. Call it before CUDA starts.

    Settings of the user stay. The older of the two names has priority, and every version of torch knows it.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def is_of_host(error: BaseException) -> bool:
    """Tell whether an error says that the main memory was too small, not a GPU's."""
    return "DefaultCPUAllocator" in str(error)


def halve_until_it_fits(call: Callable[[int], T], rows: int, least: int = 1) -> T:
    """Call with a number of rows per batch, and with half of it each time the device has too little memory."""
    while True:
        try:
            return call(rows)
        except RuntimeError as error:
            if rows // 2 < least or not is_out_of_memory(error):
                raise
        # Only here, after the block, is the memory of the failed call free.
        rows //= 2
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def compile_model(model: nn.Module) -> nn.Module:
    """Compile a model for batches of one shape. Parts that cannot be compiled run uncompiled, with a warning."""
    # Without a reset, earlier runs of this process count against torch's limit of shapes. The cache on disk is kept.
    torch.compiler.reset()
    suppress_compile_errors()
    limit_compile_threads(torch.get_num_threads())
    if "forward_features" in type(model).forward.__code__.co_names:
        return _WithCompiledFeatures(model)
    return cast("nn.Module", torch.compile(model, dynamic=False))


class _WithCompiledFeatures(nn.Module):
    """A model of timm whose features are compiled, but not its head, which has the dropout.

    Compiled code contains the dropout as a constant. With the head, no trial with another dropout could use it again.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model: Any = model
        features: Any = model.forward_features
        self._features = torch.compile(features, dynamic=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        # Only here: the model is also evaluated, with other shapes.
        self._model.forward_features = self._features
        try:
            logits_BK: torch.Tensor = self._model(x_BCHW)
            return logits_BK
        finally:
            del self._model.forward_features


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Switch off TF32 within the block, which has 10 of the 23 mantissa bits of fp32.

    On a GPU, cuDNN uses it for convolutions. cuBLAS uses it for products of matrices only if that was switched on, as
    by a variable of the environment in NVIDIA's containers.
    """
    switches: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    name, off = "allow_tf32", cast("bool | str", False)
    try:
        before = [getattr(switch, name) for switch in switches]
    except RuntimeError:
        # The program has set the newer switches. torch then refuses to read the older ones.
        switches = *(getattr(torch.backends.cudnn, of) for of in ("conv", "rnn")), torch.backends.cuda.matmul
        name, off = "fp32_precision", "ieee"
        before = [getattr(switch, name) for switch in switches]
    for switch in switches:
        setattr(switch, name, off)
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)
