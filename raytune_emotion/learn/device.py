"""Say how much memory of a device a trial may take, and recognise when it has too little."""

import torch

#: Bytes of a GPU that CUDA takes for a process beside what torch asks for: its context, kernels, and libraries.
_CONTEXT = 600 * 2**20


def allowance(total: float, share: float) -> float:
    """Bytes of a GPU that torch may take for a process with a share of it, so that all together have room."""
    return total if share >= 1 else max(0.0, share * total - _CONTEXT)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error says that the device has too little memory."""
    # CUDA and its libraries, which take memory beside torch, say it in words.
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
