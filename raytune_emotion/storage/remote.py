"""Read and write files at a URI: on S3, GCS, Azure or, as `file:`, in a folder.

Each file is replaced in one step: a reader finds the old file or the new one. A request that fails for a temporary
reason is tried again after a wait, because servers fail and come back. Callers use these functions through `Location`.
"""

import contextlib
import errno
import fnmatch
import functools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from pyarrow import NativeFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.interruption import wait_unless_interrupted
from raytune_emotion.known_errors import first_line, is_disk_full
from raytune_emotion.storage.atomic import atomic_write
from raytune_emotion.terminal import warn

#: Waits before each further attempt, seconds. In every attempt, pyarrow itself tries for some seconds.
_WAITS = (1.0, 5.0, 20.0)
#: Further waits within `outlast_outages`, seconds: a quarter of an hour.
_OUTAGE_WAITS = (30.0,) * 30
#: Longest time for a check of a URI, seconds.
_CHECK_S = 30.0
#: Options of pyarrow by scheme. S3: a small upload takes one request instead of three. GCS: pyarrow itself tries for
#: some seconds, as at S3; its default is a quarter of an hour, in which it hears no signal.
_OPTIONS = {"s3": ("allow_delayed_open", "true")} | dict.fromkeys(("gs", "gcs"), ("retry_limit_seconds", "10"))
#: Size of the pieces of a copy, bytes.
_CHUNK = 16 * 2**20
#: Number of parallel requests.
_AT_ONCE = 16
#: Types of file systems that replace a file in one step by a copy of an object, and by a move of a file.
_COPY, _MOVE = ("s3", "gcs", "abfs"), ("local",)
#: Largest object that S3 copies in one step, bytes.
_LARGEST_COPY = 5 * 2**30
#: Name of an upload until it is complete. An interrupted upload may leave such a file.
_PART = re.compile(r".*\.[0-9a-f]{8}\.part")
#: Errors that would occur again: error numbers of the system, and words of object stores.
_PERMANENT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
_PERMANENT_WORDS = re.compile(
    r"\b(NO_SUCH_BUCKET|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE"
    r"|SIGNATURE_DOES_NOT_MATCH|MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED)\b"
)

#: Advice on a URI that cannot be used.
_ADVICE = (
    "name a folder, or a URI such as s3://bucket/prefix?region=eu-west-1 of a bucket that exists, with valid"
    " credentials"
)

#: Environment variables for credentials, by scheme; for every other scheme, those of S3 are named.
_CREDENTIALS = dict.fromkeys(("gs", "gcs"), "GOOGLE_APPLICATION_CREDENTIALS") | dict.fromkeys(
    ("abfs", "abfss"), "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"
)
#: Names of options whose values are secrets. `credential_kind`, an option of Azure, only names a way to log in.
_SECRET = re.compile(
    r"secret|token|password|credential([^_]|_[^k]|$)|signature|access_?key|account_?key|^sig$", re.IGNORECASE
)

_T = TypeVar("_T")


def join(uri: str, *names: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *map(quote, names)])))


def name_of(uri: str) -> str:
    """Return the last part of a URI's path; for the root of a bucket, the bucket's name."""
    parts = urlsplit(uri)
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.netloc


def parent_of(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def refuse_credentials(uri: str, instead: str = "") -> None:
    """Refuse a URI with a secret: URIs are written into studies, and every user of the machine sees them in `ps`.

    Args:
        uri: the URI to check.
        instead: environment variables for the message that may hold the secret; empty: those of the URI's store.

    Raises:
        UserError: the URI contains a secret, which the message leaves out.
    """
    address, _, options = uri.partition("?")
    instead = instead or _CREDENTIALS.get(uri.partition(":")[0], "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    hidden = re.sub("://[^/@]*:.*@", "://***@", address)  # not by urlsplit, which breaks a secret at a slash
    if hidden != address or any(_SECRET.search(key) for key, _ in parse_qsl(options, keep_blank_values=True)):
        raise UserError(
            f"{hidden}: contains credentials, which would be written into studies or logs; put them into the"
            f" environment, such as {instead}"
        )


def refuse_odd_name(uri: str) -> None:
    """Refuse a URI whose last part cannot be the name of a folder on this machine, or that has a fragment.

    Raises:
        UserError: the last part is no such name, or the URI contains a #, which would not be part of the path.
    """
    if "#" in uri:
        raise UserError(f"{uri}: contains a #; write %23 for a # in a name")
    if (name := name_of(uri)) and (not _is_inside(name) or "/" in name):
        raise UserError(f"{uri}: its last part, {name!r}, is not the name of a folder; name a folder")


def refuse_outside(where: str, folder: Path, names: Iterable[str]) -> None:
    """Refuse names of untrusted origin that point outside of the folder into which they would be written.

    Raises:
        UserError: a sentence for each such name.
    """
    if outside := [name for name in names if not _is_inside(name)]:
        raise UserError(
            f"{where}: contains {name!r}, which would be written outside of {folder}; remove it there"
            for name in outside
        )


def check(uri: str, *, write: bool) -> None:
    """Check early whether files at a URI can be read and, with `write`, written.

    Raises:
        UserError: they cannot, or there is no answer within half a minute.
    """
    # Use a child process: a call to a server that does not answer cannot be ended otherwise.
    command = [sys.executable, "-c", "from raytune_emotion.storage.remote import _check; _check()"]
    try:
        # Signals of the terminal reach this process alone: it ends the child.
        found = subprocess.run(
            command, input=json.dumps([uri, write]), capture_output=True, text=True, timeout=_CHECK_S, check=False,
            start_new_session=True,
        )  # fmt: skip
        fault = found.stdout.strip()
        if found.returncode:
            fault = found.stderr.strip().rpartition("\n")[2] or f"its check ended with code {found.returncode}"
    except subprocess.TimeoutExpired:
        fault = f"no answer in {_CHECK_S:g} s"
    if fault:
        raise UserError(f"{uri}: cannot be {'written to' if write else 'read'} ({fault}); {_ADVICE}")


def exists(uri: str) -> bool:
    return bool(_with_retries(uri, lambda filesystem, path: filesystem.get_file_info(path)).type != FileType.NotFound)


def is_file(uri: str) -> bool:
    return bool(_with_retries(uri, lambda filesystem, path: filesystem.get_file_info(path)).type == FileType.File)


def list_folder(uri: str) -> list[FileInfo]:
    """List the entries of the folder at a URI, without subfolders' content; return an empty list if it is missing."""
    return [info for info in _list_all(uri) if not _PART.fullmatch(info.base_name)]


def delete_parts(uri: str) -> None:
    """Delete the parts of interrupted uploads from the folder at a URI. No other process may use it meanwhile."""
    delete(uri, [info.base_name for info in _list_all(uri) if _PART.fullmatch(info.base_name)])


def _list_all(uri: str) -> list[FileInfo]:
    return _with_retries(uri, _entries)


def _entries(filesystem: FileSystem, path: str) -> list[FileInfo]:
    """List the entries of a folder; return an empty list if it is missing.

    At GCS, pyarrow lists subfolders only together with all of their content (arrow 35993).
    """
    deep = filesystem.type_name == "gcs"
    infos = filesystem.get_file_info(FileSelector(path, recursive=deep, allow_not_found=True))
    if not deep:
        return list(infos)
    found: dict[str, FileInfo] = {}
    for info in infos:
        name, _, below = info.path.removeprefix(f"{path}/").partition("/")
        found[name] = FileInfo(f"{path}/{name}", FileType.Directory) if below else info
    return list(found.values())


def sizes(uri: str, names: Iterable[str]) -> list[int | None]:
    """Return the size of each file at a URI in bytes; None for a missing one."""
    names = list(names)  # a further attempt iterates again
    return _with_retries(
        uri, lambda filesystem, path: [i.size for i in filesystem.get_file_info([f"{path}/{name}" for name in names])]
    )


def newest(uri: str, name: str) -> str | None:
    """Return the folder at a URI whose file of this name is the newest; None if no folder has it."""

    def look(filesystem: FileSystem, path: str) -> list[Any]:
        folders = [info.path for info in _entries(filesystem, path) if info.type == FileType.Directory]
        found = filesystem.get_file_info([f"{folder}/{name}" for folder in folders])
        return [info for info in found if info.type == FileType.File]

    files = [info for info in _with_retries(uri, look) if _is_inside(info.path.split("/")[-2])]
    return Path(max(files, key=lambda info: info.mtime_ns).path).parent.name if files else None


def names(uri: str, *patterns: str) -> list[str]:
    """List the files at a URI and below that match a pattern, as paths relative to it; `*` matches `/` too."""

    def look(filesystem: FileSystem, path: str) -> list[str]:
        infos = filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        files = [info for info in infos if info.type == FileType.File and not _PART.fullmatch(info.base_name)]
        return [info.path.removeprefix(f"{path}/") for info in files]

    found = _with_retries(uri, look)
    return sorted(name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def read(uri: str, name: str) -> bytes | None:
    """Read a small file; return None if it is missing."""

    def get(filesystem: FileSystem, path: str) -> bytes:
        with filesystem.open_input_stream(f"{path}/{name}") as source:
            content = bytes(source.read())
            _refuse_mixture(filesystem, f"{path}/{name}", source)
            return content

    with contextlib.suppress(FileNotFoundError):
        return _with_retries(uri, get)
    return None


def read_all(uri: str, names: Iterable[str]) -> Iterator[bytes | None]:
    """Read small files in parallel, as `read` does, and yield them in order."""
    return _map(functools.partial(read, uri), names)


def pull(uri: str, folder: Path, names: Iterable[str]) -> None:
    """Copy files from a URI into a folder; skip missing files.

    Raises:
        UserError: a name points outside of the folder.
        Breakdown: all attempts failed.
    """
    names = list(names)
    refuse_outside(uri, folder, names)

    def get(name: str, filesystem: FileSystem, path: str) -> None:
        with filesystem.open_input_stream(f"{path}/{name}") as source:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / name) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
                _refuse_mixture(filesystem, f"{path}/{name}", source)

    _for_each(uri, names, get)


def push(folder: Path, uri: str, names: Iterable[str]) -> None:
    """Copy files of a folder to a URI, one after the other, each in one step.

    Raises:
        Breakdown: all attempts failed.
    """

    def put(name: str, filesystem: FileSystem, path: str) -> None:
        _put(folder / name, filesystem, f"{path}/{name}")

    for name in names:
        _with_retries(uri, functools.partial(put, name))


def delete(uri: str, names: Iterable[str]) -> None:
    """Delete files at a URI, as far as they exist.

    Raises:
        Breakdown: all attempts failed.
    """
    _for_each(uri, names, lambda name, filesystem, path: filesystem.delete_file(f"{path}/{name}"))


def _refuse_mixture(filesystem: FileSystem, file: str, source: NativeFile) -> None:
    """Raise an error if a file was replaced while it was read, so that it is read again.

    An object store is asked for the size and then for ranges of bytes. Each request gets the object of its moment. On a
    disk, an open file stays the same.
    """
    if filesystem.type_name in _COPY:
        with filesystem.open_input_stream(file) as now:
            if now.metadata() != source.metadata():
                raise OSError(f"{file}: replaced while it was read")


def _put(file: Path, filesystem: FileSystem, target: str) -> None:
    """Upload a file beside the target, then replace the target by it.

    A stream cannot be aborted: an exception or its destructor closes it, which completes an object from the part that
    was written. Therefore no stream is opened at the target.
    """
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    with file.open("rb") as source:
        if filesystem.type_name == "s3" and file.stat().st_size > _LARGEST_COPY:
            raise Breakdown(
                f"{target}: S3 cannot replace a file larger than 5 GiB in one step; keep the results in a folder"
            )
        if filesystem.type_name in _MOVE:
            filesystem.create_dir(target.rpartition("/")[0])
        try:
            # pyarrow's `copy_files` is not used: it closes its output in a destructor, where errors are lost.
            with filesystem.open_output_stream(part) as stream:
                shutil.copyfileobj(source, stream, _CHUNK)
            if filesystem.type_name in _MOVE:
                filesystem.move(part, target)
            else:
                filesystem.copy_file(part, target)
                filesystem.delete_file(part)
        except BaseException as error:
            with contextlib.suppress(OSError):
                filesystem.delete_file(part)
            # The bucket or the part is missing. Callers would take this error for a missing file.
            if isinstance(error, FileNotFoundError):
                raise OSError(first_line(error)) from error
            raise


def _for_each(uri: str, names: Iterable[str], action: Callable[[str, FileSystem, str], None]) -> None:
    def one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _with_retries(uri, functools.partial(action, name))

    for _ in _map(one, names):
        pass


def _map(action: Callable[[str], _T], names: Iterable[str]) -> Iterator[_T]:
    """Apply an action to names in parallel, and yield its results in order. After an error, it begins no further name.

    A server that is away would otherwise be waited for again.
    """
    errors: list[BaseException] = []

    def one(name: str) -> _T:
        if errors:
            raise errors[0]
        try:
            return action(name)
        except BaseException as error:
            errors.append(error)
            raise

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(one, names)


@contextlib.contextmanager
def outlast_outages() -> Iterator[None]:
    """Let requests of this process wait for an absent server for a quarter of an hour, because work would be lost.

    After a signal, they wait only as long as outside of the block.
    """
    global _outlasting
    _outlasting += 1
    try:
        yield
    finally:
        _outlasting -= 1


#: Number of blocks of `outlast_outages` that run.
_outlasting = 0


def _with_retries(uri: str, action: Callable[[FileSystem, str], _T]) -> _T:
    tries = 1
    try:
        while True:
            try:
                return action(*_open_or_refuse(uri))
            except FileNotFoundError:
                raise
            except OSError as error:
                if is_disk_full(error):
                    raise
                times = f"failed {tries} times in a row, the last time with: " if tries > 1 else "failed: "
                fault = f"{uri}: {times}{first_line(error)}"
                if _is_permanent(error) or not _wait(uri, tries, fault):
                    raise Breakdown(fault) from error
            tries += 1
    finally:
        _outages.discard(uri)


#: URIs whose outage was reported. The lock lets one of many threads report it.
_outages, _outages_lock = set[str](), threading.Lock()


def _report_outage(uri: str, fault: str) -> None:
    with _outages_lock:
        is_new = uri not in _outages
        _outages.add(uri)
    if is_new:
        warn(f"{fault}; it is tried again for a quarter of an hour")


def _wait(uri: str, tries: int, fault: str) -> bool:
    """Wait after a number of failed attempts, and tell whether another one is due."""
    if tries <= len(_WAITS):
        time.sleep(_WAITS[tries - 1])
        return True
    further = tries - len(_WAITS) - 1
    if not _outlasting or further >= len(_OUTAGE_WAITS):
        return False
    if not further:
        _report_outage(uri, fault)
    return wait_unless_interrupted(_OUTAGE_WAITS[further])


def _is_permanent(error: OSError) -> bool:
    return error.errno in _PERMANENT or _PERMANENT_WORDS.search(str(error)) is not None


def _open_or_refuse(uri: str) -> tuple[FileSystem, str]:
    """Open a URI.

    Raises:
        UserError: no file system supports the scheme or the options.
    """
    try:
        return _open(uri)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{uri}: cannot be used ({first_line(error)}); {_ADVICE}") from error


@functools.lru_cache(maxsize=8)
def _open(uri: str) -> tuple[FileSystem, str]:
    found = None
    name, value = _OPTIONS.get(urlsplit(uri).scheme, ("", ""))
    if name and name not in uri:
        with contextlib.suppress(ValueError):  # another version of pyarrow may not have it
            found = FileSystem.from_uri(f"{uri}{'&' if '?' in uri else '?'}{name}={value}")
    filesystem, path = found or FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def _check() -> None:
    """Print why the URI on standard input cannot be used; print nothing if it can."""
    uri, write = json.load(sys.stdin)
    try:
        filesystem, path = _open(uri)
        if not path:
            raise ValueError("it names no bucket and no folder")
        if filesystem.type_name not in (*_COPY, *_MOVE):
            raise ValueError(f"a file system of type {filesystem.type_name} cannot replace a file in one step")
        if not write:
            filesystem.get_file_info(FileSelector(path, allow_not_found=True))
            return
        # The name is unique, so that no other command deletes the file. Readers skip a leftover file as a part.
        file = f"{path}/.check.{uuid.uuid4().hex[:8]}.part"
        _put(Path(__file__), filesystem, file)
        filesystem.delete_file(file)
    except (OSError, ValueError, NotImplementedError) as error:
        print(first_line(error))


def _is_inside(name: str) -> bool:
    """Tell whether a relative name of untrusted origin stays in its folder."""
    return bool(name) and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/")) and "\0" not in name
