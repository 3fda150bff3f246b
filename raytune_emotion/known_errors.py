"""Turn known errors of Python and its libraries, caused by the user, the machine or the network, into sentences."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Errors of the system about a path that the user has named.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
#: Errors of the system about a folder in the place of a file, or a file in the place of a folder.
_OF_ANOTHER_KIND = (errno.EISDIR, errno.ENOTDIR)
#: Errors of the system when a disk, a server or a connection fails.
_FAILED = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENXIO)
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

_MORE_FILES = "raise the limit, such as by `ulimit -n 65536`"
_MORE_PROCESSES = "the system starts no more processes or threads; raise the limit (`ulimit -u`), or end others"
_MORE_MEMORY = (
    "use a smaller train.batch_size or data.image_size, or a larger train.accumulate; or raise the memory limit "
    "(`ulimit -v`, the container's, the job's)"
)
_ON_CORES = "use the cores, by --gpus-per-worker 0 to train or --device cpu to predict"
_MORE_GPU_MEMORY = f"end other programs on the GPU, use a smaller train.batch_size, or {_ON_CORES}"
_HUB = "connect this machine to the Hugging Face hub, or name a folder of weights as model.weights_dir"


@dataclass(frozen=True)
class KnownError:
    """Describe one kind of error by the name of its class, or of a base class, and by a condition."""

    name: str  # with its module, so that the library of the error need not be imported
    when: Callable[[Any], bool]
    code: int  # exit code: 2 if the user must change the input or the machine, 1 if the work was broken off
    sentence: Callable[[Any], str]


def _always(error: Any) -> bool:
    return True


def _number_in(*numbers: int) -> Callable[[Any], bool]:
    return lambda error: getattr(error, "errno", None) in numbers


def _says(*words: str) -> Callable[[Any], bool]:
    return lambda error: any(word in str(error) for word in words)


def _place(error: Any) -> str:
    """Return the file of a system error with the message of the system."""
    name = error.filename2 or error.filename  # the file to replace, not its temporary file
    said = error.strerror or first_line(error)
    return said if name is None else f"{os.fsdecode(name) if isinstance(name, str | bytes) else name}: {said}"


def _of_the_hub(error: Any) -> str:
    return f"the Hugging Face hub: {first_line(error)}; {_HUB}"


def _of_a_full_disk(error: Any) -> str:
    advice = "free some space, and try again; --resume continues a search or a training"
    return f"no space left on the disk: {first_line(error)}; {advice}"


def _of_the_database(error: Any) -> str:
    return f"the database of the study: {first_line(error)}; continue with --resume"


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that a disk, or the user's quota on it, is full."""
    # Safetensors puts the system's error as text into an error of its own.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error; the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
    """Return the name of the class of an error and the first line of its message, if it has one."""
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


#: Known errors. The first row that matches an error applies.
KNOWN = (
    KnownError(
        "builtins.OSError",
        is_disk_full,
        1,
        _of_a_full_disk,
    ),
    KnownError("builtins.OSError", _number_in(*_TOO_MANY_FILES), 2, lambda error: f"{_place(error)}; {_MORE_FILES}"),
    KnownError("builtins.OSError", _number_in(errno.EAGAIN), 2, lambda error: f"{_place(error)}; {_MORE_PROCESSES}"),
    KnownError(
        "builtins.OSError", _number_in(errno.ENOMEM), 2, lambda error: f"out of memory: {_place(error)}; {_MORE_MEMORY}"
    ),
    KnownError("huggingface_hub.errors.HfHubHTTPError", _always, 2, _of_the_hub),
    KnownError("huggingface_hub.errors.EntryNotFoundError", _always, 2, _of_the_hub),
    KnownError("huggingface_hub.errors.OfflineModeIsEnabled", _always, 2, _of_the_hub),
    KnownError("httpx2.HTTPError", _always, 2, _of_the_hub),
    KnownError("httpx.HTTPError", _always, 2, _of_the_hub),
    KnownError("requests.exceptions.RequestException", _always, 2, _of_the_hub),
    KnownError(
        "builtins.OSError",
        lambda error: error.errno in _REFUSED and error.filename is not None,
        2,
        lambda error: f"{_place(error)}; name another path, or change its permissions",
    ),
    KnownError(
        "builtins.OSError",
        lambda error: error.errno in _OF_ANOTHER_KIND and error.filename is not None,
        2,
        lambda error: f"{_place(error)}; move it away, or name another path",
    ),
    KnownError(
        "builtins.OSError",
        _number_in(*_FAILED),
        1,
        lambda error: f"{_place(error)}; the storage or the network failed: try again, or name another path",
    ),
    KnownError(
        "builtins.ConnectionError",
        lambda error: not isinstance(error, BrokenPipeError),
        1,
        lambda error: f"a connection broke: {first_line(error)}; try again",
    ),
    KnownError("builtins.MemoryError", _always, 2, lambda error: f"out of memory; {_MORE_MEMORY}"),
    KnownError(
        "torch.OutOfMemoryError", _always, 2, lambda error: f"out of memory: {first_line(error)}; {_MORE_GPU_MEMORY}"
    ),
    KnownError(
        "builtins.RuntimeError",
        lambda error: "CUDA" in str(error) and "out of memory" in str(error),
        2,
        lambda error: f"out of memory: {first_line(error)}; {_MORE_GPU_MEMORY}",
    ),
    KnownError(
        "builtins.RuntimeError",
        _says("DefaultCPUAllocator", "out of memory"),
        2,
        lambda error: f"out of memory: {first_line(error)}; {_MORE_MEMORY}",
    ),
    KnownError(
        "concurrent.futures.process.BrokenProcessPool",
        _always,
        1,
        lambda error: (
            "a worker process was killed, probably because memory is short; end other programs, and try again: "
            "packing continues where it stopped"
        ),
    ),
    KnownError(
        "builtins.RuntimeError",
        # Not every CUDA error: an illegal access is a fault of the program.
        _says("busy or unavailable", "no kernel image", "CUDA driver", "CUDA GPUs", "CUDA error: initialization"),
        2,
        lambda error: f"the GPU cannot be used: {first_line(error)}; end other programs on it, or {_ON_CORES}",
    ),
    KnownError("builtins.RuntimeError", _says("can't start new thread"), 2, lambda error: _MORE_PROCESSES),
    KnownError(
        "builtins.RuntimeError",
        _says("Symlink loop from"),
        2,
        lambda error: f"{first_line(error)}: a link that points to itself; name another path",
    ),
    KnownError(
        "builtins.RuntimeError",
        _says("Could not determine home directory"),
        2,
        lambda error: "this user has no home folder; set one: export HOME=/some/folder",
    ),
    KnownError(
        "safetensors._safetensors_rust.SafetensorError",
        is_disk_full,
        1,
        _of_a_full_disk,
    ),
    KnownError(
        "safetensors._safetensors_rust.SafetensorError",
        _always,
        2,
        lambda error: f"a file of weights is damaged: {first_line(error)}; restore it from a copy, or create it again",
    ),
    KnownError(
        "ray.exceptions.AuthenticationError",
        _always,
        2,
        lambda error: (
            f"the Ray cluster asks for a token: {first_line(error)}; get one with `(umask 077; ray get-auth-token "
            f"--generate)`, and export RAY_AUTH_MODE=token"
        ),
    ),
    KnownError(
        "ray.exceptions.RayError",
        _always,
        1,
        lambda error: f"Ray: {first_line(error)}; start again, or continue with --resume",
    ),
    KnownError(
        "ray.train.TrainingFailedError",
        _always,
        1,
        lambda error: f"the workers of a trial failed: {first_line(error)}; continue with --resume",
    ),
    KnownError(
        "optuna.exceptions.StorageInternalError",
        _always,
        1,
        # For a database, the cause says more than Optuna's own message.
        lambda error: f"the record of the study: {first_line(error.__cause__ or error)}; continue with --resume",
    ),
    KnownError("sqlalchemy.exc.SQLAlchemyError", _always, 1, _of_the_database),
    KnownError("psycopg.Error", _always, 1, _of_the_database),
)


def known_error(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the sentence for an error; None for a fault of this program."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and "ray.exceptions.RayTaskError" in _names(error):
        return known_error(cause)  # the error of another process
    names = _names(error)
    for row in KNOWN:
        if row.name in names and row.when(error):
            return row.code, row.sentence(error)
    return None


def _names(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
