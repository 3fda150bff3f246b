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
            f"a build of PyTorch for it, choose another GPU with CUDA_VISIBLE_DEVICES, or train on cores with "
            f"--gpus-per-worker 0"
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
            return ""
    try:
        # It names the reason each time; the warning comes only once in a process.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return re.split(r"\.(?: +(?=[A-Z])|$)", first_line(error))[0]
    return "CUDA finds no GPU"


def code_fault(gpu: int) -> str:
    """Return why this build of PyTorch has no code for a GPU of this process; "" if it has. This starts CUDA here."""
    import torch

    # AMD's GPUs have other names of architectures.
    if torch.version.cuda is None or has_code(torch.cuda.get_device_capability(gpu), torch.cuda.get_arch_list()):
        return ""
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"it has no code for {torch.cuda.get_device_name(gpu)}, whose compute capability is {major}.{minor}"


def has_code(capability: tuple[int, int], architectures: Collection[str]) -> bool:
    """Tell whether code for CUDA architectures, such as `sm_90`, runs on a GPU of a compute capability.

    Machine code (sm) runs on the same major version with an equal or higher minor one, intermediate code (compute) on
    every newer GPU, and code with the letter a on its own version alone (CUDA Programming Guide, "Compute Capability").
    """
    for architecture in architectures:
        kind, _, version = architecture.partition("_")
        digits = version.rstrip("af")
        own = int(digits[:-1]), int(digits[-1:])
        runs_on_newer = own[0] == capability[0] or kind == "compute"
        if own == capability or (own < capability and runs_on_newer and not version.endswith("a")):
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
