"""Represent a folder on this machine or at a URI by one type, so that callers need not distinguish them.

    results = parse_location("ray_results")               # or s3://bucket/prefix?region=eu-west-1
    study = results / "first"
    with study.write("study.yaml") as path:               # atomic: readers find the old file or the new one
        path.write_text("...")
    with study.copy_here("study.yaml", "trials/*/history.jsonl") as folder:
        ...                                               # a Path: the folder itself, or a temporary copy
    study.push(folder, ["trials.csv"])                    # does nothing if `folder` is the location itself

A program that works in a folder and keeps a location up to date calls `push` and `pull` at every step. They do nothing
if the folder is the location, so the program needs no branches. File names are relative, with slashes.
"""

import contextlib
import errno
import fnmatch
import glob
import hashlib
import io
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import (
    EXISTS,
    LOCK,
    atomic_write,
    exclusive_lock,
    resumable_folder,
    scratch_folder,
    sweep,
)
from raytune_emotion.storage.cache import cache_folder
from raytune_emotion.terminal import byte_size, escape, short_path, warn

#: Age at which files of abandoned attempts are deleted from the cache, seconds.
ABANDONED_S = 7 * 24 * 3600.0
#: Errors of the system that are about a file alone. After any other, the storage has failed, and may work again.
OF_THE_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL,
)  # fmt: skip
#: Name of the file at a URI that marks a running `build`: the files beside it belong to the block.
_BEGUN = ".begun"


class File(NamedTuple):
    name: str  # relative to the location, with slashes
    stamp: str  # at a URI, from the listing; empty in a folder: see `Location.stamp`


class Location(ABC):
    """A folder on this machine or at a URI. `str` shows it as the user wrote it.

    It can be sent to other processes and machines. A failed call raises OSError for a folder and, after several
    attempts, Breakdown for a URI.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the folder's own name: the last part of its path after links are resolved."""

    @property
    @abstractmethod
    def typed(self) -> str:
        """Return the path or the URI as it was typed."""

    @property
    @abstractmethod
    def typed_name(self) -> str:
        """Return the last part of the path as it was typed."""

    @abstractmethod
    def follow_links(self) -> "Location":
        """Return the location after links are resolved."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Return the absolute path or the URI, which `parse_location` can read in any process, on any machine."""

    @abstractmethod
    def __truediv__(self, name: str) -> "Location":
        """Return the folder `name` in this one; `name` may hold slashes."""

    @abstractmethod
    def check(self, *, write: bool) -> None:
        """Check early whether files here can be read and, with `write`, written.

        Raises:
            UserError: they cannot.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Tell whether there is such a folder."""

    @abstractmethod
    def split_file(self) -> "tuple[Location, str] | None":
        """Return the folder and the name of the file at this location; None if it is not a file."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Tell whether this is a folder, and not a file or a link."""

    @abstractmethod
    def list_folders(self, folder: str = "") -> list[str]:
        """List the names of the folders in a folder; return an empty list if it is missing."""

    @abstractmethod
    def list_files(self, folder: str = "") -> list[File]:
        """List the files in a folder, in no order. A broken link counts as a file, which cannot be read."""

    @abstractmethod
    def find(self, *patterns: str) -> list[str]:
        """List the files here and below that match a pattern, sorted; `*` matches `/` too."""

    @abstractmethod
    def newest(self, file: str) -> str | None:
        """Return the name of the subfolder whose file of this name is the newest; None if no subfolder has it."""

    @abstractmethod
    def stamp(self, file: File) -> str:
        """Return a file's size and modification time; an empty string if it is missing."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> list[int | None]:
        """Return the size of each file in bytes; None for a missing one."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Read a small file; return None if it is missing."""

    @abstractmethod
    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        """Read small files in their order; yield those errors that are OF_THE_FILE, and raise others."""

    @abstractmethod
    def write(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Write a file atomically: the block writes it at the path that it gets."""

    @abstractmethod
    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files from a folder of this machine to this location, one after the other, each atomically."""

    @abstractmethod
    def pull(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files from this location into a folder of this machine; skip missing files.

        Raises:
            UserError: a name points outside of the folder.
        """

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete the files, as far as they exist."""

    @abstractmethod
    def delete_parts(self) -> None:
        """Delete the parts of interrupted uploads from this folder. No other process may use the folder meanwhile."""

    @abstractmethod
    def copy_here(self, *patterns: str) -> contextlib.AbstractContextManager[Path]:
        """Provide the files that match a pattern in a folder of this machine: the folder itself, or a temporary copy.

        Raises:
            UserError: the location cannot be read; or an error of the block, which then names this location.
        """

    @abstractmethod
    def work_here(self, *names: str) -> contextlib.AbstractContextManager[Path]:
        """Provide a folder of this machine to work in: the folder itself, or a temporary one with these files.

        The caller must push the results that are to stay at a URI.
        """

    @abstractmethod
    def is_here(self, folder: Path) -> bool:
        """Tell whether a folder of this machine is the location itself, so that its lock is enough."""

    @abstractmethod
    def publish(self, last: str) -> contextlib.AbstractContextManager[Path]:
        """Provide a folder of this machine to write into: the folder itself, or one whose files are copied to the URI.

        When the block succeeds, they replace all files at the URI, as by `replace_files`.

        Args:
            last: name of the file without which the others are of no use.
        """

    @abstractmethod
    def check_out(self, *patterns: str) -> Path:
        """Bring the working folder up to date with the files that match a pattern, and return it.

        All other files in the working folder of a URI are deleted. The caller holds its lock.
        """

    @abstractmethod
    def set_aside_copy(self) -> None:
        """Move the files of a URI's working folder to a folder beside it, and say so. The caller holds its lock."""

    @abstractmethod
    def free_working_folder(self) -> None:
        """Remove the working folder of a URI, so that it can be made again. Its files are set aside.

        Raises:
            UserError: another process is using it.
        """

    @abstractmethod
    def can_be_built(self, first: str = _BEGUN, last: str = "") -> bool:
        """Tell whether the location is empty, or at a URI holds only files, among them `first` but not `last`."""

    @abstractmethod
    def build(self) -> "contextlib.AbstractContextManager[Location]":
        """Make a new folder: the block writes its files at the location that it gets.

        On this machine the folder appears at once, when the block succeeds. At a URI its files appear one by one, so
        the block must write last the file that marks the folder as complete. An interrupted build is kept for the next
        attempt. A UserError leaves nothing: at a URI, the block deletes its files.

        Raises:
            UserError: the folder exists; at a URI, there are other files.
        """

    @abstractmethod
    def cache_here(self, key: str, check: Callable[[Path], object], fetch: Callable[[Path], None]) -> Path:
        """Return the folder's path; for a URI, the path of its copy in this machine's cache, which is made once.

        Args:
            key: the name of the copy, which differs for different content.
            check: raises UserError for a copy that must be made again.
            fetch: fills a folder, which may hold files of an interrupted attempt.
        """

    @abstractmethod
    def find_here(self, key: str) -> Path | None:
        """Return the path as `cache_here` does, but fetch nothing; None if this machine has neither folder nor copy."""

    @abstractmethod
    def is_reachable(self) -> bool:
        """Tell whether this machine can access the location. Every machine can access a URI."""

    @abstractmethod
    def working_folder(self) -> Path:
        """Return the folder of this machine to work in: the folder itself, or one in the cache for the URI."""

    @abstractmethod
    def require_folder(self, advice: str) -> Path:
        """Return the folder's path; refuse a URI.

        Raises:
            UserError: this is a URI; the sentence ends with the advice.
        """


@dataclass(frozen=True)
class Folder(Location):
    path: Path

    def __str__(self) -> str:
        return short_path(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def typed(self) -> str:
        return str(self.path)

    @property
    def typed_name(self) -> str:
        return self.path.absolute().name  # `.` has no name of its own

    def follow_links(self) -> "Folder":
        return Folder(self.path.resolve())

    @property
    def address(self) -> str:
        return str(self.path.absolute())

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.path / name)

    def check(self, *, write: bool) -> None:
        nearest = next(parent for parent in (self.path, *self.path.absolute().parents) if os.path.lexists(parent))
        if not nearest.is_dir():
            raise UserError(f"{nearest}: is not a folder; name another path")
        if write and not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"{nearest}: cannot be written to; name another path")

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def split_file(self) -> tuple[Location, str] | None:
        return (Folder(self.path.parent), self.path.name) if self.path.is_file() else None

    def is_folder(self) -> bool:
        return self.path.is_dir() and not self.path.is_symlink()

    def list_folders(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self.path / folder) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list_files(self, folder: str = "") -> list[File]:
        start = f"{folder}/" if folder else ""
        with os.scandir(self.path / folder) as entries:
            return [File(f"{start}{entry.name}", "") for entry in entries if entry.is_file() or _leads_nowhere(entry)]

    def find(self, *patterns: str) -> list[str]:
        names = (str(file.relative_to(self.path)) for file in files_below(self.path))
        return sorted(name for name in names if _matches(name, patterns))

    def newest(self, file: str) -> str | None:
        times: dict[str, int] = {}
        for path in self.path.glob(f"*/{glob.escape(file)}"):
            with contextlib.suppress(FileNotFoundError):  # the file may be deleted meanwhile
                times[path.parent.name] = path.stat().st_mtime_ns
        return max(times, key=times.__getitem__, default=None)

    def stamp(self, file: File) -> str:
        with contextlib.suppress(OSError):
            stat = (self.path / file.name).stat()
            return f"{stat.st_size} {stat.st_mtime_ns}"
        return ""

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        files = [self.path / name for name in names]
        return [file.stat().st_size if file.is_file() else None for file in files]

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        for name in names:
            try:
                with io.FileIO(f"{self.path}/{name}") as file:  # in half the time of Path.read_bytes
                    yield file.readall()
            except OSError as error:
                if error.errno not in OF_THE_FILE:
                    raise
                yield error

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Path]:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path / name) as temporary:
            yield temporary

    def push(self, folder: Path, names: Iterable[str]) -> None:
        if not self.is_here(folder):
            for name in names:
                with self.write(name) as temporary:
                    shutil.copyfile(folder / name, temporary)

    def pull(self, folder: Path, names: Iterable[str]) -> None:
        if not self.is_here(folder):
            remote.refuse_outside(str(self), folder, names := list(names))
            Folder(folder).push(self.path, (name for name in names if (self.path / name).is_file()))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def delete_parts(self) -> None:
        pass  # files of a folder are written by `atomic_write`, which leaves no parts

    @contextlib.contextmanager
    def copy_here(self, *patterns: str) -> Iterator[Path]:
        yield self.path

    @contextlib.contextmanager
    def work_here(self, *names: str) -> Iterator[Path]:
        yield self.path

    def is_here(self, folder: Path) -> bool:
        return self.path.resolve() == folder.resolve()

    @contextlib.contextmanager
    def publish(self, last: str) -> Iterator[Path]:
        yield self.path

    def check_out(self, *patterns: str) -> Path:
        return self.working_folder()

    def set_aside_copy(self) -> None:
        pass

    def free_working_folder(self) -> None:
        pass

    def can_be_built(self, first: str = _BEGUN, last: str = "") -> bool:
        return not self.exists()

    @contextlib.contextmanager
    def build(self) -> Iterator[Location]:
        with resumable_folder(self.path) as folder:
            yield Folder(folder)

    def cache_here(self, key: str, check: Callable[[Path], object], fetch: Callable[[Path], None]) -> Path:
        return self.path

    def find_here(self, key: str) -> Path | None:
        return self.path if self.path.is_dir() else None

    def is_reachable(self) -> bool:
        return self.path.is_dir()

    def working_folder(self) -> Path:
        return self.path.absolute()

    def require_folder(self, advice: str) -> Path:
        return self.path


@dataclass(frozen=True)
class Remote(Location):
    uri: str

    def __post_init__(self) -> None:
        remote.refuse_credentials(self.uri)
        remote.refuse_odd_name(self.uri)

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return remote.name_of(self.uri)

    @property
    def typed(self) -> str:
        return self.uri

    @property
    def typed_name(self) -> str:
        return self.name

    def follow_links(self) -> "Remote":
        return self

    @property
    def address(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Remote":
        return Remote(remote.join(self.uri, name))

    def check(self, *, write: bool) -> None:
        remote.check(self.uri, write=write)

    def exists(self) -> bool:
        return remote.exists(self.uri)

    def split_file(self) -> tuple[Location, str] | None:
        return (Remote(remote.parent_of(self.uri)), self.name) if remote.is_file(self.uri) else None

    def is_folder(self) -> bool:
        return not remote.is_file(self.uri)

    def list_folders(self, folder: str = "") -> list[str]:
        return [info.base_name for info in remote.list_folder(self._below(folder)) if not info.is_file]

    def list_files(self, folder: str = "") -> list[File]:
        start, infos = f"{folder}/" if folder else "", remote.list_folder(self._below(folder))
        return [File(f"{start}{info.base_name}", f"{info.size} {info.mtime_ns}") for info in infos if info.is_file]

    def find(self, *patterns: str) -> list[str]:
        return remote.names(self.uri, *patterns)

    def newest(self, file: str) -> str | None:
        return remote.newest(self.uri, file)

    def stamp(self, file: File) -> str:
        return file.stamp

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        return remote.sizes(self.uri, names)

    def read(self, name: str) -> bytes | None:
        return remote.read(self.uri, name)

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        for content in remote.read_all(self.uri, names):
            yield FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) if content is None else content

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[Path]:
        with scratch_folder() as scratch:
            path = scratch / name
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
            remote.push(scratch, self.uri, [name])

    def push(self, folder: Path, names: Iterable[str]) -> None:
        remote.push(folder, self.uri, names)

    def pull(self, folder: Path, names: Iterable[str]) -> None:
        remote.pull(self.uri, folder, names)

    def delete(self, names: Iterable[str]) -> None:
        remote.delete(self.uri, names)

    def delete_parts(self) -> None:
        remote.delete_parts(self.uri)

    @contextlib.contextmanager
    def copy_here(self, *patterns: str) -> Iterator[Path]:
        self.check(write=False)
        with self.work_here(*self.find(*patterns)) as folder:
            try:
                yield folder
            except UserError as error:
                raise UserError(fault.replace(str(folder), self.uri) for fault in error.faults) from None

    @contextlib.contextmanager
    def work_here(self, *names: str) -> Iterator[Path]:
        with scratch_folder() as scratch:
            folder = scratch / self.name
            folder.mkdir()
            self.pull(folder, names)
            yield folder

    def is_here(self, folder: Path) -> bool:
        return False

    @contextlib.contextmanager
    def publish(self, last: str) -> Iterator[Path]:
        self.check(write=True)
        with scratch_folder() as scratch:
            folder = scratch / self.name
            yield folder
            replace_files(self, folder, last)
            self.delete_parts()

    def check_out(self, *patterns: str) -> Path:
        folder = self.working_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()
        self.pull(folder, self.find(*patterns))
        return folder

    def set_aside_copy(self) -> None:
        folder = self.working_folder()
        aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        for left in [path for path in folder.iterdir() if path.name != LOCK]:
            aside.mkdir(exist_ok=True)
            left.rename(aside / left.name)
        if aside.exists():
            warn(f"{self.uri}: files of an earlier study of this name on this machine are kept in {aside}")

    def free_working_folder(self) -> None:
        folder = self.working_folder()
        if folder.exists():
            with exclusive_lock(folder) as lock:
                lock.claim()
                self.set_aside_copy()
                shutil.rmtree(folder)

    def can_be_built(self, first: str = _BEGUN, last: str = "") -> bool:
        if remote.is_file(self.uri):
            return False
        found = {info.base_name: info.is_file for info in remote.list_folder(self.uri)}
        return not found or (all(found.values()) and first in found and last not in found)

    @contextlib.contextmanager
    def build(self) -> Iterator[Location]:
        if not self.can_be_built():
            raise UserError(f"{self.uri}: {EXISTS}")
        with self.write(_BEGUN) as path:
            path.touch()
        try:
            yield self
        except UserError:
            self.delete([_BEGUN])
            raise
        self.delete([_BEGUN])

    def cache_here(self, key: str, check: Callable[[Path], object], fetch: Callable[[Path], None]) -> Path:
        dest = _cache_of(key)
        if dest.exists():
            try:
                check(dest)
            except UserError as error:
                warn(f"{error}\n{dest}: fetched again")
                shutil.rmtree(dest, ignore_errors=True)
        sweep(dest.parent, ABANDONED_S)
        while not dest.exists():
            try:
                with resumable_folder(dest) as folder:
                    warn(f"{self.uri}: fetched once, into {dest}")
                    fetch(folder)
            except UserError:
                if not dest.exists():  # else another process was faster
                    raise
        return dest

    def find_here(self, key: str) -> Path | None:
        dest = _cache_of(key)
        return dest if dest.is_dir() else None

    def is_reachable(self) -> bool:
        return True

    def working_folder(self) -> Path:
        return cache_folder() / "studies" / hashlib.sha256(self.uri.encode()).hexdigest()[:20] / self.name

    def require_folder(self, advice: str) -> Path:
        raise UserError(f"{self.uri}: is a URI, but a path of this machine is needed; {advice}")

    def _below(self, folder: str) -> str:
        return remote.join(self.uri, folder) if folder else self.uri


def parse_location(text: str) -> Location:
    """Parse a path or, if the text has a scheme, a URI. A ~ at the beginning of a path is the home folder.

    Raises:
        UserError: the text cannot name a folder, or the URI contains credentials.
    """
    if not text or "\0" in text:
        raise UserError(f"expected a folder or a URI, got {text!r}; name one")
    _refuse_other_encodings(text)
    if "://" in text:
        return Remote(text)
    # A shell does not expand `--results=~/results`, and Python expands nothing.
    path = os.path.expanduser(text)  # noqa: PTH111  # unknown users stay
    with contextlib.suppress(OSError):  # the current folder is gone
        _refuse_other_encodings(os.path.realpath(path))  # libraries get this one
    return Folder(Path(path))


def _refuse_other_encodings(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{escape(text)}: the path is not UTF-8; rename it") from None


def parent_of(location: Location) -> Location:
    """Return the folder that contains a location."""
    if isinstance(location, Remote):
        return Remote(remote.parent_of(location.uri))
    assert isinstance(location, Folder)
    return Folder(location.path.absolute().parent)


def replace_files(location: Location, folder: Path, last: str) -> None:
    """Replace all files of a location by those of a folder, unless the folder is the location.

    The others are of no use without the file `last`. It is deleted before and pushed after them, so that no reader
    mixes new files with old ones.
    """
    if not location.is_here(folder):
        names = Folder(folder).find("*")
        location.delete([last])
        location.delete({file.name for file in location.list_files()} - {*names})
        location.push(folder, sorted(names, key=lambda name: name == last))


def location_of(place: Location | str | os.PathLike[str]) -> Location:
    """Return a location unchanged, or parse a path or a URI. Functions of the library's interface use it."""
    return place if isinstance(place, Location) else parse_location(os.fspath(place))


def check_disk_space(needed: Mapping[Location, int], advice: str) -> None:
    """Check that each location has room for these bytes. Files that it already holds count as part of them.

    Folders on the same disk share its room. URIs are not checked.

    Raises:
        Breakdown: a disk is too small; the sentence ends with the advice. Existing files are to be kept.
    """
    on_disk: dict[int, list[Folder]] = defaultdict(list)
    for location in needed:
        if isinstance(location, Folder):
            on_disk[location.path.stat().st_dev].append(location)
    for folders in on_disk.values():
        wanted = sum(needed[folder] for folder in folders)
        there = sum(file.stat().st_blocks * 512 for folder in folders for file in folder.path.iterdir())
        free = shutil.disk_usage(folders[0].path).free + there
        if wanted > free:
            place = folders[0].path.parent
            raise Breakdown(f"{place}: needs {byte_size(wanted)}, but only {byte_size(free)} are free; {advice}")


def _cache_of(key: str) -> Path:
    return cache_folder() / "stores" / key


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110  # avoids making a Path of each entry


def files_below(folder: Path) -> Iterator[Path]:
    """Iterate over the files in a folder and below it. Files and folders may appear and disappear meanwhile."""
    for parent, _, names in os.walk(folder):  # `Path.rglob` fails if a folder disappears
        yield from (file for name in names if (file := Path(parent, name)).is_file())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
