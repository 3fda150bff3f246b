"""Write files and folders atomically, and lock folders."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError as error:
    raise ImportError("raytune_emotion needs Linux or macOS; on Windows, run it in WSL") from error

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.known_errors import first_line, is_disk_full

#: The file of a folder's lock. It is never deleted.
LOCK = ".lock"
#: What is wrong with a destination that nobody may replace, and what to do.
EXISTS = "exists already; name another destination, or remove it"
_STALE_SECONDS = 60
#: What the system says of a file system without locks. Every other error is one of the lock's file.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it replaces `path` when the block succeeds and is deleted when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # follows the umask
        yield temporary
        # Some writers make files that their owner alone can read. Some file systems have no modes to change.
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(dest: Path) -> Iterator[Path]:
    """Yield a new folder beside dest; it becomes dest when the block succeeds and is deleted when it fails.

    Raises:
        UserError: dest exists, before or after the block; or nothing can be written beside it.
    """
    with contextlib.ExitStack() as stack:
        with _destination_errors(dest):
            folder = stack.enter_context(folder_beside(dest))
        yield folder
        _rename_to(dest, folder)


@contextlib.contextmanager
def replace_folder(dest: Path) -> Iterator[Path]:
    """Yield a new folder beside dest; it takes the place of dest when the block succeeds, and is deleted otherwise.

    A reader finds one of the two whole, or for a moment none.

    Raises:
        UserError, Breakdown: nothing can be written there.
    """
    old = dest.with_name(f".{dest.name}.old")
    try:
        with folder_beside(dest) as new:
            if old.exists() and not dest.exists():
                old.rename(dest)  # of a process that was killed in between
            shutil.rmtree(old, ignore_errors=True)
            yield new
            if dest.exists():
                dest.rename(old)
            try:
                new.rename(dest)
            except OSError:
                if old.exists():
                    old.rename(dest)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise destination_error(dest, error) from error


@contextlib.contextmanager
def folder_beside(dest: Path) -> Iterator[Path]:
    """Yield a new folder beside dest, this process's alone; at the end it is deleted, unless it has another name then.

    What killed processes have left there is deleted, too.
    """
    ours = f".{dest.name}.{socket.gethostname()}."
    folder = dest.parent / f"{ours}{uuid.uuid4().hex[:12]}.part"
    dest.parent.mkdir(parents=True, exist_ok=True)
    sweep(dest.parent, _STALE_SECONDS, glob.escape(ours) + "*.part")
    folder.mkdir()
    try:
        # Held while this process lives, so that what a killed one left can be told from what is in use.
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder among the system's temporary files, for this user alone; at the end it is deleted.

    What killed processes have left there is deleted, too.
    """
    with folder_beside(Path(tempfile.gettempdir()) / "raytune_emotion") as folder:
        folder.chmod(0o700)
        yield folder


@contextlib.contextmanager
def resumable_folder(dest: Path) -> Iterator[Path]:
    """Yield a folder beside dest; it becomes dest when the block succeeds.

    A UserError deletes it. After any other error, or when the process is killed, it stays if it holds a file, and the
    next attempt gets it. One process at a time is in the block; others wait.

    Raises:
        UserError: dest exists, before or after the block or the wait; or nothing can be written beside it.
    """
    folder = dest.parent / f".{dest.name}.part"
    with contextlib.ExitStack() as stack:
        while True:
            with _destination_errors(dest):
                folder.mkdir(parents=True, exist_ok=True)
            # Whoever held the lock has renamed the folder, or removed it.
            with contextlib.suppress(FileNotFoundError):
                lock = stack.enter_context(_locked(folder))
                if os.path.samestat(folder.stat(), os.fstat(lock)):
                    break
        try:
            yield folder
            _rename_to(dest, folder)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # one without a file
            raise


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder during the block, if its file system has locks.

    Raises:
        UserError: another process holds it, or the lock's file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            # A file that is open for writing: of a folder, NFS keeps the lock to this machine.
            lock = stack.enter_context((folder / LOCK).open("ab"))
            _flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work in it; wait for its end, or end it") from None
        except OSError as error:
            raise UserError(
                f"{folder / LOCK}: cannot be locked ({error.strerror}); name a folder that you may write to"
            ) from error
        yield


def is_taken(folder: Path) -> bool:
    """Tell whether something has the name; a folder with its lock alone, as a killed process leaves it, has not."""
    return os.path.lexists(folder) and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= {LOCK})


def sweep(parent: Path, seconds: float, pattern: str = ".*.part") -> None:
    """Delete the folders that killed processes have left and that nobody has touched for so many seconds."""
    for folder in parent.glob(pattern):
        with contextlib.suppress(OSError), _locked(folder, fcntl.LOCK_NB):
            if time.time() - folder.stat().st_mtime > seconds:
                shutil.rmtree(folder)


@contextlib.contextmanager
def _destination_errors(dest: Path) -> Iterator[None]:
    if os.path.lexists(dest):
        raise _exists(dest)
    try:
        yield
    except OSError as error:
        raise destination_error(dest, error) from error


def destination_error(dest: Path, error: Exception) -> UserError | Breakdown:
    """Return what to raise where a destination cannot be written."""
    if is_disk_full(error):
        return Breakdown(f"{dest}: no space left on the disk; make room, or name another destination")
    where = getattr(error, "filename", None)
    said = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"{dest}: cannot be written ({said}{f': {where}' if where else ''}); name another destination")


def _rename_to(dest: Path, folder: Path) -> None:
    try:
        folder.rename(dest)
    except OSError:
        if dest.exists():
            raise _exists(dest) from None
        raise


def _exists(dest: Path) -> UserError:
    return UserError(f"{dest}: {EXISTS}")


@contextlib.contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        if how:
            fcntl.flock(fd, fcntl.LOCK_EX | how)
        else:
            # Without locks two processes at a time write the same to the folder, and nothing sweeps it.
            _flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _flock(fd: int, how: int) -> None:
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
