"""Detect without the slow import of PyTorch that a machine has no GPU, to refuse a wrong option at once."""

import ctypes
from pathlib import Path

from raytune_emotion.errors import UserError

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
