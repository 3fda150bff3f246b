"""Read and write files at a URI: on S3, GCS, Azure or, as `file:`, in a folder.

Each file is replaced in one step: a reader finds the old one or the new one. A request that fails for a reason that
passes is tried again some time later, as servers are gone for a while and come back. What callers use is `Location`.
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
from raytune_emotion.known_errors import first_line, is_disk_full
from raytune_emotion.storage.atomic import atomic_write

_WAITS = (1.0, 5.0, 20.0)  # s, before another try; pyarrow itself has tried for some seconds each time
_CHECK_S = 30.0
_CHUNK = 16 * 2**20  # bytes
_AT_ONCE = 16
#: How each kind of file system puts a file in the place of another in one step: an object is copied, a file is moved.
_COPY, _MOVE = ("s3", "gcs", "abfs"), ("local",)
_LARGEST_COPY = 5 * 2**30  # bytes, of S3
#: What is uploaded bears such a name until it is whole. An upload that breaks off may leave it.
_PART = re.compile(r".*\.[0-9a-f]{8}\.part")
#: What the system, and a store of objects in words, say of a request that would fail again.
_PERMANENT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
_PERMANENT_WORDS = re.compile(
    r"\b(NO_SUCH_BUCKET|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE"
    r"|SIGNATURE_DOES_NOT_MATCH|MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED)\b"
)

#: What to do about a URI that cannot be used.
_ADVICE = (
    "name a folder, or a URI such as s3://bucket/prefix?region=eu-west-1 of a bucket that exists, with valid"
    " credentials"
)

#: Names of options whose values are secrets.
_SECRET = re.compile(r"secret|token|password|credential|signature|access_?key|account_?key|^sig$", re.IGNORECASE)

_T = TypeVar("_T")


def join(uri: str, *names: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *map(quote, names)])))


def name_of(uri: str) -> str:
    """Return the last part of a URI's path; of the root of a bucket, the bucket's name."""
    parts = urlsplit(uri)
    return unquote(parts.path.rstrip("/").rpartition("/")[2]) or parts.netloc


def parent_of(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def refuse_credentials(uri: str, instead: str = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") -> None:
    """Refuse a URI that holds a secret: it is written into studies, and every user of the machine sees it in `ps`.

    Args:
        uri: to look at.
        instead: environment variables that may hold the secret, for the message.

    Raises:
        UserError: without the secret.
    """
    address, _, options = uri.partition("?")
    hidden = re.sub("://[^/@]*:.*@", "://***@", address)  # not by its parts: a secret with a slash is no part
    if hidden != address or any(_SECRET.search(key) for key, _ in parse_qsl(options, keep_blank_values=True)):
        raise UserError(
            f"{hidden}: has credentials in it, which would be written into studies or logs; leave them to the"
            f" environment, such as {instead}"
        )


def refuse_odd_name(uri: str) -> None:
    """Refuse a URI whose last part would be another folder where it names a folder of this machine.

    Raises:
        UserError: it is such a one.
    """
    if (name := name_of(uri)) and (not _is_inside(name) or "/" in name):
        raise UserError(f"{uri}: its last part, {name!r}, is no name of a folder; name one")


def refuse_outside(where: str, folder: Path, names: Iterable[str]) -> None:
    """Refuse names that somebody else has chosen and that lead out of the folder they are to be written into.

    Raises:
        UserError: a sentence for each of them.
    """
    if outside := [name for name in names if not _is_inside(name)]:
        raise UserError(
            f"{where}: holds {name!r}, which would be written outside of {folder}; remove it there" for name in outside
        )


def check(uri: str, *, write: bool) -> None:
    """Find out whether files can be read and, if asked for, written at a URI, before anything depends on it.

    Raises:
        UserError: they cannot, or there is no answer within half a minute.
    """
    # In a process of its own: a call to a server that does not answer cannot be ended otherwise.
    command = [sys.executable, "-c", "from raytune_emotion.storage.remote import _check; _check()"]
    try:
        found = subprocess.run(
            command, input=json.dumps([uri, write]), capture_output=True, text=True, timeout=_CHECK_S, check=False
        )
        fault = found.stdout.strip() if found.returncode == 0 else found.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        fault = f"no answer in {_CHECK_S:g} s"
    if fault:
        raise UserError(f"{uri}: cannot be {'written to' if write else 'read'} ({fault}); {_ADVICE}")


def exists(uri: str) -> bool:
    return bool(_with_retries(uri, lambda filesystem, path: filesystem.get_file_info(path)).type != FileType.NotFound)


def is_file(uri: str) -> bool:
    return bool(_with_retries(uri, lambda filesystem, path: filesystem.get_file_info(path)).type == FileType.File)


def list_folder(uri: str) -> list[FileInfo]:
    """List what is in the folder at a URI, not below; nothing where there is none."""
    return [info for info in _list_all(uri) if not _PART.fullmatch(info.base_name)]


def delete_parts(uri: str) -> None:
    """Delete what uploads that broke off have left in the folder at a URI. Nobody else may be at work in it."""
    delete(uri, [info.base_name for info in _list_all(uri) if _PART.fullmatch(info.base_name)])


def _list_all(uri: str) -> list[FileInfo]:
    return _with_retries(
        uri, lambda filesystem, path: list(filesystem.get_file_info(FileSelector(path, allow_not_found=True)))
    )


def sizes(uri: str, names: Iterable[str]) -> list[int | None]:
    """Return the bytes of each file at a URI; None where it is missing."""
    names = list(names)  # for every attempt
    return _with_retries(
        uri, lambda filesystem, path: [i.size for i in filesystem.get_file_info([f"{path}/{name}" for name in names])]
    )


def newest(uri: str, name: str) -> str | None:
    """Return the folder at a URI whose file of this name is the newest; None where none has it."""

    def look(filesystem: FileSystem, path: str) -> list[Any]:
        folders = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
        found = filesystem.get_file_info([f"{info.path}/{name}" for info in folders if info.type == FileType.Directory])
        return [info for info in found if info.type == FileType.File]

    files = [info for info in _with_retries(uri, look) if _is_inside(info.path.split("/")[-2])]
    return Path(max(files, key=lambda info: info.mtime_ns).path).parent.name if files else None


def names(uri: str, *patterns: str) -> list[str]:
    """List the files at a URI and below that match a pattern, by their path from there; `*` matches `/` too."""

    def look(filesystem: FileSystem, path: str) -> list[str]:
        infos = filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        files = [info for info in infos if info.type == FileType.File and not _PART.fullmatch(info.base_name)]
        return [info.path.removeprefix(f"{path}/") for info in files]

    found = _with_retries(uri, look)
    return sorted(name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def read(uri: str, name: str) -> bytes | None:
    """Read a small file; None where it is missing."""

    def get(filesystem: FileSystem, path: str) -> bytes:
        with filesystem.open_input_stream(f"{path}/{name}") as source:
            content = bytes(source.read())
            _refuse_mixture(filesystem, f"{path}/{name}", source)
            return content

    with contextlib.suppress(FileNotFoundError):
        return _with_retries(uri, get)
    return None


def read_all(uri: str, names: Iterable[str]) -> Iterator[bytes | None]:
    """Read small files as `read` does, in their order, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(functools.partial(read, uri), names)


def pull(uri: str, folder: Path, names: Iterable[str]) -> None:
    """Copy files from a URI into a folder; a missing file is skipped.

    Raises:
        UserError: a name leads out of the folder.
        Breakdown: it fails again and again.
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
        Breakdown: it fails again and again.
    """

    def put(name: str, filesystem: FileSystem, path: str) -> None:
        _put(folder / name, filesystem, f"{path}/{name}")

    for name in names:
        _with_retries(uri, functools.partial(put, name))


def delete(uri: str, names: Iterable[str]) -> None:
    """Delete those of the files at a URI that exist.

    Raises:
        Breakdown: it fails again and again.
    """
    _for_each(uri, names, lambda name, filesystem, path: filesystem.delete_file(f"{path}/{name}"))


def _refuse_mixture(filesystem: FileSystem, file: str, source: NativeFile) -> None:
    """Fail where a file was replaced while it was read, so that it is read again.

    A store of objects is asked for the size and then for ranges of bytes, each of the object that is there by then. A
    file on a disk stays the one that was opened.
    """
    if filesystem.type_name in _COPY:
        with filesystem.open_input_stream(file) as now:
            if now.metadata() != source.metadata():
                raise OSError(f"{file}: was replaced while it was read")


def _put(file: Path, filesystem: FileSystem, target: str) -> None:
    """Upload a file beside the target, then put it in the target's place.

    A stream cannot be given up: whatever closes it, be it an exception or its destructor, completes an object of what
    was written. So none is ever opened at the target.
    """
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    with file.open("rb") as source:
        if filesystem.type_name == "s3" and file.stat().st_size > _LARGEST_COPY:
            raise Breakdown(
                f"{target}: S3 replaces no file of more than 5 GiB in one step; keep the results in a folder"
            )
        if filesystem.type_name in _MOVE:
            filesystem.create_dir(target.rpartition("/")[0])
        try:
            # Not by pyarrow's `copy_files`, which closes what it writes in a destructor, where errors are lost.
            with filesystem.open_output_stream(part) as stream:
                shutil.copyfileobj(source, stream, _CHUNK)
            if filesystem.type_name in _MOVE:
                filesystem.move(part, target)
            else:
                filesystem.copy_file(part, target)
                filesystem.delete_file(part)
        except BaseException:
            with contextlib.suppress(OSError):
                filesystem.delete_file(part)
            raise


def _for_each(uri: str, names: Iterable[str], action: Callable[[str, FileSystem, str], None]) -> None:
    def one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _with_retries(uri, functools.partial(action, name))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(one, names))


def _with_retries(uri: str, action: Callable[[FileSystem, str], _T]) -> _T:
    waits = iter(_WAITS)
    tries = 1
    while True:
        try:
            return action(*_open_or_refuse(uri))
        except FileNotFoundError:
            raise
        except OSError as error:
            if is_disk_full(error):
                raise
            wait = None if _is_permanent(error) else next(waits, None)
            if wait is None:
                times = f"failed {tries} times in a row, the last time by: " if tries > 1 else "failed: "
                raise Breakdown(f"{uri}: {times}{first_line(error)}") from error
        time.sleep(wait)
        tries += 1


def _is_permanent(error: OSError) -> bool:
    return error.errno in _PERMANENT or _PERMANENT_WORDS.search(str(error)) is not None


def _open_or_refuse(uri: str) -> tuple[FileSystem, str]:
    """Open a URI.

    Raises:
        UserError: no file system has such a scheme, or such options.
    """
    try:
        return _open(uri)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{uri}: cannot be used ({first_line(error)}); {_ADVICE}") from error


@functools.lru_cache(maxsize=8)
def _open(uri: str) -> tuple[FileSystem, str]:
    found = None
    if uri.startswith("s3://"):
        # A small upload is then one request, and not three. The option is pyarrow's from version 21 on.
        with contextlib.suppress(ValueError):
            found = FileSystem.from_uri(f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true")
    filesystem, path = found or FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def _check() -> None:
    """Print why the URI on standard input cannot be used; nothing where it can be."""
    uri, write = json.load(sys.stdin)
    try:
        filesystem, path = _open(uri)
        if not path:
            raise ValueError("it names no bucket and no folder")
        if filesystem.type_name not in (*_COPY, *_MOVE):
            raise ValueError(f"in a file system of type {filesystem.type_name} no file can replace another in one step")
        if not write:
            filesystem.get_file_info(FileSelector(path, allow_not_found=True))
            return
        # A name of its own, so that no other command deletes it. Should it be left, readers pass it over as a part.
        file = f"{path}/.check.{uuid.uuid4().hex[:8]}.part"
        _put(Path(__file__), filesystem, file)
        filesystem.delete_file(file)
    except (OSError, ValueError, NotImplementedError) as error:
        print(first_line(error))


def _is_inside(name: str) -> bool:
    """Tell whether a relative name that somebody else has chosen stays in its folder."""
    return bool(name) and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/")) and "\0" not in name
