"""What is said of errors of the system and of libraries, and which are faults of this program."""

import errno
import importlib
from concurrent.futures.process import BrokenProcessPool

import httpx2
import huggingface_hub.errors
import pytest
import ray.exceptions
import torch
from safetensors import SafetensorError

from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import KNOWN, known_error

#: Libraries that others of our requirements use, or used, to fetch weights.
_MAY_BE_ABSENT = ("httpx", "requests")


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_the_class_of_a_row_is_there_by_that_name(row):
    """A library that renames an error breaks this test, in place of the sentence that the user is to read."""
    module, _, name = row.name.rpartition(".")
    if module.partition(".")[0] in _MAY_BE_ABSENT:
        pytest.importorskip(module)
    # Where Python code finds it may be another module than the one in its name.
    public = {"safetensors._safetensors_rust": "safetensors", "ray.train": "ray.train.v2.api.exceptions"}
    found = getattr(importlib.import_module(public.get(module, module)), name)
    assert issubclass(found, BaseException)
    assert f"{found.__module__}.{found.__qualname__}" == row.name


def raised_in_another_process(error: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("task", "a traceback\nof two lines", error)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "trials.csv"), 1, "no space left on the disk: "),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), 1, "no space left on the disk: "),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "no space left on the disk: "),
        (
            OSError(errno.EMFILE, "Too many open files", "a.jpg"),
            2,
            "a.jpg: Too many open files; raise the limit, such as by `ul",
        ),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            2,
            "Resource temporarily unavailable; the system starts no more",
        ),
        (
            RuntimeError("can't start new thread"),
            2,
            "the system starts no more processes or threads; raise the limit (`ulimit -u`)",
        ),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            2,
            "out of memory: Cannot allocate memory; use a smaller train.batch",
        ),
        (MemoryError(), 2, "out of memory; use a smaller"),
        (
            BrokenProcessPool("A process in the process pool was terminated abruptly"),
            1,
            "a worker process was killed, probably because memory is short; end other programs, and try again: "
            "packing continues where it stopped",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            2,
            "out of memory: CUDA out of memory. Tried; end other programs on the GPU, use a smaller train.batch_size, "
            "or use the cores, by --gpus-per-worker 0 to train or --device cpu to predict",
        ),
        (RuntimeError("CUDA error: out of memory"), 2, "out of memory: CUDA error: out of memory; end other programs"),
        (
            RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ..."),
            2,
            "the GPU cannot be used: CUDA error: CUDA-capable device(s) is/are busy or unavailable; end other programs",
        ),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), 2, "the GPU cannot be"),
        (RuntimeError("No CUDA GPUs are available"), 2, "the GPU cannot be used: No CUDA GPUs are available; end"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            2,
            "out of memory: [enforce fail at alloc_cpu.cpp:127] err == 0",
        ),
        (
            OSError(errno.EIO, "Input/output error", "optuna.journal"),
            1,
            "optuna.journal: Input/output error; the storage or",
        ),
        (OSError(errno.ESTALE, "Stale file handle"), 1, "Stale file handle; the storage or the network failed"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "a connection broke: [Errno"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", ".trials.csv.tmp", None, "r/trials.csv"),
            2,
            "r/trials.csv: Is a directory; move it away, or name another path",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "trials/a"), 2, "trials/a: Not a directory; move it"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), 2, "/a: Permission denied; name another path"),
        (
            httpx2.ProxyError("407 Proxy Authentication Required"),
            2,
            "the Hugging Face hub: 407 Proxy Authentication Re",
        ),
        (
            huggingface_hub.errors.LocalEntryNotFoundError("Cannot find the file\nand more"),
            2,
            "the Hugging Face hub: Cannot find the file; con",
        ),
        (SafetensorError("Error while deserializing header"), 2, "a file of weights is damaged: Error while"),
        (RuntimeError("Symlink loop from 'a'"), 2, "Symlink loop from 'a': a link that points to itself; name another"),
        (RuntimeError("Could not determine home directory."), 2, "this user has no home folder; set one"),
        (ray.exceptions.AuthenticationError("no token"), 2, "the Ray cluster asks for a token: no token"),
        (
            ray.exceptions.NodeDiedError("The node died.\nThe cause is unknown."),
            1,
            "Ray: The node died.; start again, or",
        ),
        (raised_in_another_process(OSError(errno.EIO, "Input/output error", "a")), 1, "a: Input/output error; the"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_of_the_machine_is_a_sentence(error, code, said):
    found = known_error(error)
    assert found is not None
    assert found[0] == code
    assert found[1].startswith(said)
    assert "\n" not in found[1]


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("1 // 0"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        PermissionError(errno.EPERM, "it says not of which file"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        raised_in_another_process(ZeroDivisionError("1 // 0")),
        UserError("said elsewhere"),
    ],
    ids=lambda error: f"{type(error).__name__}",
)
def test_a_fault_of_ours_is_not_hidden(error):
    assert known_error(error) is None
