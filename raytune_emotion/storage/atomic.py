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

#: Name of the lock file of a folder. The file is never deleted.
LOCK = ".lock"
#: Error about a destination that must not be replaced, with advice.
EXISTS = "exists already; name another destination, or remove it"
#: Age at which folders of killed processes are deleted, seconds.
_STALE_SECONDS = 60
#: Errors of a file system that has no locks. Every other error is about the lock file.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
#: Errors about a lock file in a folder that is not there, or in which the user may not write.
_OF_THE_USER = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it replaces `path` when the block succeeds and is deleted when it fails."""
    # Processes of several machines may write the same file, and those of containers have the same small numbers.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # follows the umask
        yield temporary
        # Some writers make files that only the owner can read. Some file systems do not support modes.
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
    """Yield a new folder beside dest; it replaces dest when the block succeeds, and is deleted otherwise.

    A reader finds the old folder or the new one, or for a moment none, but never a mixture.

    Raises:
        UserError, Breakdown: nothing can be written there.
    """
    old = dest.with_name(f".{dest.name}.old")
    try:
        with folder_beside(dest) as new:
            if old.exists() and not dest.exists():
                old.rename(dest)  # a process was killed between the two renames
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
    """Yield a new folder beside dest for this process alone. It is deleted at the end, unless it was renamed.

    Folders that killed processes have left there are deleted, too.
    """
    ours = f".{dest.name}.{socket.gethostname()}."
    folder = dest.parent / f"{ours}{uuid.uuid4().hex[:12]}.part"
    dest.parent.mkdir(parents=True, exist_ok=True)
    sweep(dest.parent, _STALE_SECONDS, glob.escape(ours) + "*.part")
    folder.mkdir()
    try:
        # The lock is held while this process lives. It tells folders in use from those of killed processes.
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new temporary folder that only this user can read. It is deleted at the end.

    Folders that killed processes have left there are deleted, too.
    """
    with folder_beside(Path(tempfile.gettempdir()) / "raytune_emotion") as folder:
        folder.chmod(0o700)
        yield folder


@contextlib.contextmanager
def resumable_folder(dest: Path) -> Iterator[Path]:
    """Yield a folder beside dest; it becomes dest when the block succeeds.

    A UserError deletes it. After any other error, or when the process is killed, a folder with files is kept for the
    next attempt. Only one process at a time runs the block; others wait.

    Raises:
        UserError: dest exists, before or after the block or the wait; or nothing can be written beside it.
    """
    folder = dest.parent / f".{dest.name}.part"
    with contextlib.ExitStack() as stack:
        while True:
            with _destination_errors(dest):
                folder.mkdir(parents=True, exist_ok=True)
            # FileNotFoundError: the previous holder of the lock has renamed or removed the folder.
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
                folder.rmdir()  # succeeds only if the folder is empty
            raise


class FolderLock:
    """The lock of a folder, as `exclusive_lock` yields it."""

    def __init__(self, folder: Path, *, is_locked: bool) -> None:
        """Represent the lock of a folder, which the file system has locked for this process, unless it has no locks."""
        self.folder, self._path = folder, folder / LOCK
        self._is_claimed = is_locked
        self._content = None if is_locked else self._path.read_bytes()

    def claim(self) -> bool:
        """Take over the folder before anything is written there, and tell whether that is allowed.

        It is not allowed once another process has taken over since this one opened the lock. Further calls only tell
        whether this process still holds the lock.
        """
        if not self._is_claimed and self.is_held():
            token = uuid.uuid4().hex
            write_text(self._path, token)
            self._is_claimed, self._content = True, token.encode()
        return self.is_held()

    def is_held(self) -> bool:
        """Tell whether no other process has taken over since this one opened or claimed the lock."""
        if self._content is None:
            return True
        try:
            return self._path.read_bytes() == self._content
        except (FileNotFoundError, NotADirectoryError):  # the folder is gone
            return False
        except OSError:  # a server that fails for a moment has given the lock to nobody
            return True


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[FolderLock]:
    """Hold the exclusive lock of a folder during the block. Claim it before you write into the folder.

    A file system without locks, such as Lustre mounted without flock, gives the lock to the process that claimed it
    last. That process writes a token into the lock's file, so that the one before notices.

    Raises:
        UserError: another process holds it, or the user may not write the lock's file.
        Breakdown: the lock's file cannot be written for another reason.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Lock a file that is open for writing: NFS shares a lock of a folder with no other machine.
            file = stack.enter_context((folder / LOCK).open("ab"))
            lock = FolderLock(folder, is_locked=_flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder}: another process is using it; wait until it ends, or end it") from None
        except OSError as error:
            raise _lock_error(folder / LOCK, error) from error
        yield lock


def _lock_error(file: Path, error: OSError) -> UserError | Breakdown:
    """Return the exception to raise if a lock's file cannot be locked."""
    if is_disk_full(error):
        return Breakdown(f"{file}: no space left on the disk; free some space, and try again")
    said = f"{file}: cannot be locked ({error.strerror})"
    if error.errno in _OF_THE_USER:
        return UserError(f"{said}; name a folder that you may write to")
    return Breakdown(f"{said}; the system or its storage has failed: repair it, and try again")


def sweep(parent: Path, seconds: float, pattern: str = ".*.part") -> None:
    """Delete the folders of killed processes that are unchanged for at least this number of seconds."""
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
    """Return the exception to raise if a destination cannot be written."""
    if is_disk_full(error):
        return Breakdown(f"{dest}: no space left on the disk; free some space, or name another destination")
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
            # Without locks, two processes may write the same files to the folder, and `sweep` deletes nothing.
            _flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _flock(fd: int, how: int) -> bool:
    """Lock a file, and tell whether its file system has locks."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
