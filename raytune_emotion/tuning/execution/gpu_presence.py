"""Tell without PyTorch, whose import takes seconds, that a machine has no GPU: a wrong option is refused at once."""

import ctypes
from pathlib import Path

from raytune_emotion.errors import UserError

#: CUDA's driver library. PyTorch loads it by this name; where that fails, PyTorch has no NVIDIA GPU.
_CUDA = "libcuda.so.1"
#: What a driver makes: of AMD, of Windows' Linux, and of NVIDIA, whose library may lie where PyTorch alone looks.
_DEVICES = (Path("/dev/kfd"), Path("/dev/dxg"), Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"))


def refuse_absent_gpu(wanted: float | str | None, address: str | None) -> None:
    """Refuse a GPU for each worker where this machine certainly has none and is to run them.

    Where a driver is installed, nothing is refused: PyTorch is asked later.

    Args:
        wanted: GPUs per worker: a number or `auto`; None or 0 for none.
        address: of the cluster that decides in this machine's place; None: this machine.

    Raises:
        UserError: there is no GPU.
    """
    if wanted and address is None and not may_have_gpu():
        raise UserError(no_gpu("this machine", wanted))


def no_gpu(where: str, wanted: float | str) -> str:
    """Say that a GPU is asked for where there is none."""
    number = wanted if isinstance(wanted, str) else f"{wanted:g}"
    # Not "leave the option out": a study that goes on has a number though nobody has typed it.
    advice = "ask for --gpus-per-worker 0 to train on cores"
    return f"--gpus-per-worker {number}: {where} has no GPU that PyTorch can use; {advice}"


def may_have_gpu() -> bool:
    """Tell whether PyTorch may find a GPU here: False is certain."""
    if any(path.exists() for path in _DEVICES):
        return True
    try:
        ctypes.CDLL(_CUDA)
    except OSError:
        return False
    return True
