"""Set the memory limit and precision of a device, compile models, and recognise out-of-memory errors."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import nn

from raytune_emotion.learn.torch_patches import OUT_OF_MEMORY, suppress_compile_errors

T = TypeVar("T")

#: GPU memory that CUDA uses for a process in addition to torch's: context, kernels and libraries; bytes.
_CONTEXT = 600 * 2**20


def find_device() -> torch.device:
    """Return the GPU of this process if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def allowance(total: float, share: float) -> float:
    """Return the GPU memory that torch may use in a process with a share of the GPU, bytes, so that all have room."""
    return total if share >= 1 else max(0.0, share * total - _CONTEXT)


def limit_memory(device: torch.device, share: float) -> None:
    """Limit torch in this process to its share of a GPU's memory. Do nothing on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(allowance(total, share) / total, device.index)


def reduce_fragmentation() -> None:
    """Let torch map GPU memory in growing segments, for trials of different batch sizes. Call it before CUDA starts."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


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
    return cast("nn.Module", torch.compile(model, dynamic=False))


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Switch off TF32 within the block. cuDNN uses it for fp32 convolutions on a GPU, with 10 of 23 mantissa bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
