"""Prepare a Ray session on this machine for this process alone, with its own folder, token and limits.

By default, Ray puts its sockets below TMPDIR, whose path may be too long for a socket, or into /tmp/ray, which may
belong to another user. Since 2.59, it also leaves a token in the user's home folder, where others may read it.
"""

import contextlib
import fcntl
import glob
import os
import resource
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raytune_emotion.errors import UserError
from raytune_emotion.terminal import warn

#: Largest length of the folder's path, bytes. A socket's path has at most 107 bytes; Ray's own names need up to 66.
_LONGEST = 40
#: Candidates for the folder of Ray's files, best first: folders, and variables that name one. The last are in memory.
_BASES = ("RAY_TMPDIR", "TMPDIR", "/tmp", "/var/tmp", "XDG_RUNTIME_DIR", "/dev/shm")
_PREFIX = "rte-"
#: Number of letters that `mkdtemp` appends.
_RANDOM = 8
#: Limits of a process below which Ray may fail: name, shell command, unit, and smallest sufficient value.
_LIMITS = (
    ("RLIMIT_NPROC", "ulimit -u", "processes and threads", 4096),
    ("RLIMIT_NOFILE", "ulimit -n", "open files", 4096),
    ("RLIMIT_AS", "ulimit -v", "bytes of address space", 2**45),
)


@contextlib.contextmanager
def local_ray() -> Iterator[dict[str, object]]:
    """Prepare a local Ray session: yield arguments of `ray.init`, and clean up at the end.

    The session's folder is removed at the end. If the block fails, it is kept for its logs, without the token.

    Raises:
        UserError: there is no folder for the session.
    """
    raise_limits()
    base = base_folder()
    sweep_sessions(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_MODE": "token"}
    failed = False
    try:
        with _owned(folder):
            yield {"_temp_dir": str(folder)}
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException:
        failed = True
        raise
    finally:
        token.unlink(missing_ok=True)
        if failed and any(folder.iterdir()):
            warn(f"Ray's logs are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Mark a session's folder as in use by this process. The mark remains only if the process is killed."""
    hidden, mark = folder / ".owner", folder / _mark()
    with hidden.open("wb") as lock:
        with contextlib.suppress(OSError):  # without locks, no folder is deleted
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(mark)  # it is locked before other processes can see it
        try:
            yield
        finally:
            for file in (mark, hidden):
                file.unlink(missing_ok=True)


def sweep_sessions(base: Path) -> None:
    """Delete the folders of sessions whose process was killed: their marks exist, but are not locked."""
    for mark in base.glob(f"{_PREFIX}*/{glob.escape(_mark())}"):
        with contextlib.suppress(OSError), mark.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mark.parent.stat().st_uid == os.getuid():
                shutil.rmtree(mark.parent, ignore_errors=True)


def _mark() -> str:
    # The name contains this machine, because a lock of another machine may be invisible here.
    return f"owner.{socket.gethostname()}"


def base_folder() -> Path:
    """Find a folder for Ray's files: the first of `_BASES` that is writable and has a short path.

    Raises:
        UserError: none can be used.
    """
    faults = []
    for name in _BASES:
        value = name if name.startswith("/") else os.environ.get(name)
        if not value:
            continue
        shown = name if value == name else f"{name}={value}"
        base = Path(value).absolute()  # Ray accepts no relative path
        if len(os.fsencode(base)) + 1 + len(_PREFIX) + _RANDOM > _LONGEST:
            faults.append(f"{shown} has a path of more than {_LONGEST - len(_PREFIX) - _RANDOM - 1} bytes")
        elif not os.access(base, os.W_OK | os.X_OK) or not base.is_dir():
            faults.append(f"{shown} is not a writable folder")
        else:
            return base
    raise UserError(f"no folder for Ray's sockets: {'; '.join(faults)}; set RAY_TMPDIR to a writable, short path")


def raise_limits() -> None:
    """Raise this process's soft limits of processes and open files as far as Ray needs. Children inherit them."""
    for name, _, _, enough in _LIMITS[:2]:  # a limit of memory was probably set on purpose
        with contextlib.suppress(ValueError, OSError, AttributeError):
            number = getattr(resource, name)
            soft, hard = resource.getrlimit(number)
            most = enough if hard == resource.RLIM_INFINITY else min(hard, enough)
            if soft != resource.RLIM_INFINITY and soft < most:
                resource.setrlimit(number, (most, hard))


def low_limits() -> str:
    """Describe the limits of this process that may be too low for Ray; "" if there are none."""
    low = []
    for name, command, what, enough in _LIMITS:
        with contextlib.suppress(ValueError, OSError, AttributeError):
            soft, _ = resource.getrlimit(getattr(resource, name))
            if soft != resource.RLIM_INFINITY and soft < enough:
                low.append(f"this process may have {soft} {what} (`{command}`)")
    return " and ".join(low)
