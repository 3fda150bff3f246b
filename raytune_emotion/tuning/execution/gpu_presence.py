"""Detect that a machine has no GPU, without the slow import of PyTorch, or one that PyTorch cannot use."""

import ctypes
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line

#: CUDA's driver library. PyTorch loads it by this name. If that fails, PyTorch has no NVIDIA GPU.
_CUDA = "libcuda.so.1"
#: Files of drivers: AMD, WSL, and NVIDIA, whose library may be in a folder that only PyTorch searches.
_DEVICES = (Path("/dev/kfd"), Path("/dev/dxg"), Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"))


def refuse_absent_gpu(wanted: float | str | None, address: str | None) -> None:
    """Refuse GPUs for workers of this machine if it certainly has none.

    If a driver is installed, nothing is refused; PyTorch is asked later.

    Args:
        wanted: GPUs per worker: a number or `auto`; None or 0 for none.
        address: address of the cluster that runs the workers; None: this machine.

    Raises:
        UserError: there is no GPU.
    """
    if wanted and address is None and not may_have_gpu():
        raise UserError(no_gpu("this machine", wanted))


def refuse_broken_gpu(wanted: float | str | None) -> None:
    """Refuse to train on this machine if it has a GPU that PyTorch cannot use, such as below an old driver.

    Otherwise the training would run on the cores, or its trials would fail. PyTorch is imported if there may be a GPU.

    Args:
        wanted: GPUs per worker: a number or `auto`; None: one if there are GPUs; 0: train on cores.

    Raises:
        UserError: PyTorch cannot use the GPU.
    """
    if wanted != 0 and (fault := gpu_fault()):
        raise UserError(
            f"this machine has a GPU, but PyTorch cannot use it ({fault}); install a driver (NVIDIA: 580 or newer) and "
            f"a build of PyTorch for it, or train on cores with --gpus-per-worker 0"
        )


def gpu_fault() -> str:
    """Return why PyTorch cannot use the GPUs of this machine; "" if it can, or if there are none."""
    if not may_have_gpu():
        return ""
    import torch  # it takes seconds

    # PyTorch counts GPUs without CUDA.
    if not torch.cuda.device_count():
        return ""
    with warnings.catch_warnings(action="ignore"):
        if torch.cuda.is_available():
            return _unknown_gpu()
    try:
        # It names the reason each time; the warning comes only once in a process.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return re.split(r"\.(?: +(?=[A-Z])|$)", first_line(error))[0]
    return "CUDA finds no GPU"


def _unknown_gpu() -> str:
    """Name the first GPU for which this build of PyTorch has no code; "" if there is none, and for AMD's GPUs."""
    import torch

    if torch.version.cuda is None:
        return ""
    known = torch.cuda.get_arch_list()
    for number in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(number)
        if not has_code(capability, known):
            name, (major, minor) = torch.cuda.get_device_name(number), capability
            return f"it has no code for {name}, whose compute capability is {major}.{minor}"
    return ""


def has_code(capability: tuple[int, int], architectures: Collection[str]) -> bool:
    """Tell whether code for CUDA architectures, such as `sm_90`, runs on a GPU of a compute capability.

    Machine code (sm) runs on the same major version with an equal or higher minor one, intermediate code (compute) on
    every newer GPU, and code with a letter on its own version alone (CUDA Programming Guide, "Compute Capability").
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, version = architecture.partition("_")
        digits = version.rstrip("af")
        own = int(digits[:-1]), int(digits[-1:])
        if own == capability or (digits == version and kind == "compute" and own <= capability):
            return True
        if digits == version and kind == "sm" and own[0] == major and own[1] <= minor:
            return True
    return not architectures


def no_gpu(where: str, wanted: float | str) -> str:
    """Return the error that there is no GPU."""
    number = wanted if isinstance(wanted, str) else f"{wanted:g}"
    # The advice is not "leave the option out": a resumed study has a number although nobody has typed it.
    advice = "use --gpus-per-worker 0 to train on cores"
    return f"--gpus-per-worker {number}: {where} has no GPU that PyTorch can use; {advice}"


def may_have_gpu() -> bool:
    """Tell whether PyTorch may find a GPU here. False means that there is certainly none."""
    if any(path.exists() for path in _DEVICES):
        return True
    try:
        ctypes.CDLL(_CUDA)
    except OSError:
        return False
    return True
