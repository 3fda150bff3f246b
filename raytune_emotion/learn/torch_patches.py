"""Contain all uses of private interfaces of torch, each with its reason.

`tests/learn/test_torch_contract.py` names each of them. Those of timm are in a separate module, because the import of
torch takes seconds.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.optim import SGD

if TYPE_CHECKING:  # TensorBoard takes a second, and few processes write events
    from torch.utils.tensorboard import SummaryWriter

#: Parts of the messages of CUDA, its libraries and torch's allocator on a CPU, for which torch raises a `RuntimeError`
#: and not its `OutOfMemoryError` (pytorch 128601).
OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    # The libraries allocate memory for themselves at their first call.
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDNN_STATUS_NOT_INITIALIZED",
    # A convolution for which no algorithm had enough memory (pytorch 108645).
    "GET was unable to find an engine to execute this computation",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


def misfits_of(error: Exception) -> list[str]:
    """Return what an error says of weights that do not fit a model, line by line; nothing for other errors.

    `load_state_dict` raises a plain `RuntimeError`.
    """
    first, *lines = str(error).splitlines() or [""]
    return [line.strip() for line in lines] if "loading state_dict" in first else []


def suppress_compile_errors() -> None:
    """Make torch run the parts of a model that it cannot compile uncompiled, with a warning.

    `torch.compile` has no such option, and raises an error.
    """
    torch._dynamo.config.suppress_errors = True


def limit_compile_threads(count: int) -> None:
    """Let `torch.compile` use this number of processes. The user's variable of the environment wins.

    By default it is the number of cores, up to 32, for each of the trials on a machine. torch reads the variable at its
    import of a module that timm has imported.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        import torch._inductor.config

        torch._inductor.config.compile_threads = count


def zero_momentum(sgd: SGD) -> None:
    """Begin SGD with a momentum of zero, which does not change the first step.

    If a scaler skips the first step, as it often does, the fused kernel would leave an uninitialised momentum.
    """
    for group in sgd.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def write_hparams(writer: "SummaryWriter", settings: Mapping[str, bool | int | float | str], metric: str) -> None:
    """Write the settings of a run, and the name of its metric, for TensorBoard's page HParams.

    `SummaryWriter.add_hparams` would write them as another run, in a subfolder (pytorch 32651).
    """
    from torch.utils.tensorboard.summary import hparams

    # The first of the three summaries lists the page's columns. TensorBoard would use the columns of one run for all
    # (pytorch 39250), but runs differ in their conditional settings. Without it, TensorBoard collects the columns of
    # all runs.
    _, begin, end = hparams(dict(settings), {metric: None})  # type: ignore[no-untyped-call]
    for summary in (begin, end):
        writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
