"""Keep the location of a study or a run up to date with the folder in which this process works.

The journal of a study only grows. So it is pushed whole once, when a driver begins, and from then on in pieces:

    optuna.journal                              as it was when the newest driver began or ended
    journal/000002-3f0c9a51b7de/000000041230    what follows its byte 41,230
    journal/000002-3f0c9a51b7de/000000107044    what follows its byte 107,044

Only the last piece is replaced, so that the pushed bytes are proportional to the length of the journal. Each driver has
a folder for its pieces, so a driver that was taken for dead changes nothing that its successor has read.
"""

import re
import uuid
from collections.abc import Iterable
from pathlib import Path

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage.atomic import atomic_write, write_text
from raytune_emotion.storage.locations import Location

#: Name of the file with the driver of a study or a run at a URI, where locks do not work: the driver that began last.
DRIVER = "driver"
#: Reason why a driver must stop, with what to do.
TAKEN_OVER = "another process has taken over; leave it to that one"
#: Reason why a driver cannot begin; typing the command again reads what the other one has recorded.
CONTINUED = "another process has made or continued this study meanwhile"
#: Folder of the journal's pieces at a URI.
_PIECES = "journal"
#: Patterns of the files that a reader at a URI needs beside the journal, for `join_pieces`.
PIECES = (DRIVER, f"{_PIECES}/*")
#: Size from which a piece is not replaced any more, bytes.
_PIECE = 64 * 2**10
#: Name of a driver: drivers are counted.
_NAME = re.compile(r"[0-9]{6}-[0-9a-f]{12}")
#: Name of a piece: the byte of the journal at which it begins.
_START = re.compile(r"[0-9]{12}")


def why_lost(location: Location, driver: str) -> str:
    """Say why a driver of this name no longer has its location at a URI; "" while it has."""
    found = location.read(DRIVER)
    if found is None:
        return "its files no longer exist"
    return "" if found == driver.encode() else TAKEN_OVER


class RemoteCopy:
    """The location of a study or a run. If it is the folder itself, nothing is copied."""

    def __init__(self, folder: Path, location: Location) -> None:
        self.folder, self.location = folder, location
        self.is_whole = self.is_here  # whether this process has made the study whole at its location
        self._driver = ""  # name of this driver, once it has claimed the location
        self._journal, self._start = folder, 0  # the journal, and the byte at which its last piece begins

    def __str__(self) -> str:
        return str(self.location)

    @property
    def is_here(self) -> bool:
        """Tell whether the location is the folder itself."""
        return self.location.is_here(self.folder)

    def claim(self, names: Iterable[str] = (), *, journal: str = "", continues: bool = False) -> None:
        """Become the driver, and push a study's journal and then its other files.

        Those of these files that the folder lacks are deleted at the location: they are of a study that was never
        whole. The folder must exist.

        Args:
            names: names of the other files, in the order in which they are pushed.
            journal: name of the journal; empty if there is none.
            continues: whether the journal continues one at the location; otherwise, what is there was never whole.

        Raises:
            Breakdown: another driver has claimed the location, or has recorded more since the folder was brought up
                to date; or all requests failed.
        """
        if self.is_here:
            return
        drivers = sorted(filter(_NAME.fullmatch, self.location.list_folders(_PIECES)))
        number = 1 + max((int(name[:6]) for name in drivers), default=0)
        self._driver = f"{number:06d}-{uuid.uuid4().hex[:12]}"
        write_text(self.folder / DRIVER, self._driver)
        here = {name: (self.folder / name).exists() for name in names}
        self.location.push(self.folder, [DRIVER])
        self.location.delete([name for name in here if not here[name]])
        if journal:
            if continues:
                self._check_continues(journal)
            self.check_driver()  # each push may wait long for the location
            self._push_whole(self.folder / journal, has_pieces=bool(drivers))
        self.push(*(name for name in here if here[name]))
        self.is_whole = True
        for name in drivers[:-1]:  # a reader may be reading the newest ones
            folder = f"{_PIECES}/{name}"
            self.location.delete([file.name for file in self.location.list_files(folder)])

    def _check_continues(self, journal: str) -> None:
        """Check that the journal continues the one at the location, whose driver has stopped by now.

        Raises:
            Breakdown: that driver has written more since the folder was brought up to date.
        """
        with self.location.copy_here(journal, *PIECES) as folder:
            join_pieces(folder, journal)
            there = (folder / journal).read_bytes() if (folder / journal).exists() else b""
        if not (self.folder / journal).read_bytes().startswith(there):
            raise Breakdown(f"{self}: {CONTINUED}")

    def _push_whole(self, journal: Path, *, has_pieces: bool) -> None:
        self._journal = journal
        self.location.push(self.folder, [journal.name])
        self._start = journal.stat().st_size
        if has_pieces:
            self._put_piece(b"")  # else readers would still end the journal with the pieces of the driver before

    @property
    def claimed(self) -> tuple[str, str] | None:
        """Return the address of the claimed location and the name of this driver there; None if none is claimed."""
        return (self.location.address, self._driver) if self._driver else None

    def failure(self) -> str:
        """Say why this process is no longer the driver; "" while it is."""
        return "" if self.is_here else why_lost(self.location, self._driver)

    def is_behind(self) -> bool:
        """Tell whether another driver has claimed the location since the folder was brought up to date."""
        known = self.folder / DRIVER
        return not self.is_here and self.location.read(DRIVER) != (known.read_bytes() if known.is_file() else None)

    def push(self, *names: str) -> None:
        """Push files.

        Raises:
            Breakdown: another driver has claimed the location; or all requests to it failed.
        """
        if not self.is_here:
            self.check_driver()
            self.location.push(self.folder, names)

    def push_journal(self) -> None:
        """Push what the journal has more than its copy. No other thread may write to the journal meanwhile.

        Raises:
            Breakdown: as for `push`.
        """
        if self.is_here:
            return
        self.check_driver()
        with self._journal.open("rb") as file:
            file.seek(self._start)
            piece = file.read()
        self._put_piece(piece)
        if len(piece) >= _PIECE:
            self._start += len(piece)

    def check_driver(self) -> None:
        """Check that this process is still the driver: one that was taken for dead must not overwrite its successor.

        Raises:
            Breakdown: another driver has claimed the location; or all requests to it failed.
        """
        if why := self.failure():
            raise Breakdown(f"{self}: {why}")

    def _put_piece(self, content: bytes) -> None:
        with self.location.write(f"{_PIECES}/{self._driver}/{self._start:012d}") as path:
            path.write_bytes(content)

    def pull(self, names: Iterable[str]) -> None:
        self.location.pull(self.folder, list(names))

    def delete(self, names: Iterable[str]) -> None:
        if names := list(names):
            self.location.delete(names)

    def mark(self, name: str) -> str | None:
        """Return a file of the folder, which every machine sees that can see the folder; None for a URI."""
        return str(self.folder.absolute() / name) if self.is_here else None

    def has(self, name: str) -> bool:
        return self.location.sizes([name]) != [None]

    def of_trial(self, trial_id: str) -> str:
        """Return the address of a trial's folder."""
        return (self.location / "trials" / trial_id).address


def _end_of(driver: Path) -> int:
    """Return the size of a journal that ends with the pieces of a driver, bytes."""
    pieces = (path for path in driver.iterdir() if _START.fullmatch(path.name))
    return max((int(path.name) + path.stat().st_size for path in pieces), default=0)


def join_pieces(folder: Path, journal: str) -> None:
    """Complete a journal with the pieces of the newest driver that has any, unless it is longer without them.

    It is longer if the study was continued in its folder afterwards, where the journal is whole.

    Args:
        folder: folder with the journal, and with the files that match `PIECES`.
        journal: name of the journal, below the folder.

    Raises:
        UserError: a piece is missing.
    """
    study, whole = (folder / journal).parent, folder / journal
    drivers = [path for path in (study / _PIECES).glob("*") if _NAME.fullmatch(path.name)]
    if not drivers or not whole.is_file():
        return
    # Two drivers that began at once have the same number. Then the one that has claimed the study counts or, if a later
    # one has claimed it since, the one that has recorded more.
    claimed = (study / DRIVER).read_text("utf-8", "replace") if (study / DRIVER).is_file() else ""
    newest = max(drivers, key=lambda path: (path.name[:6], path.name == claimed, _end_of(path)))
    before = content = whole.read_bytes()
    for piece in sorted(path for path in newest.iterdir() if _START.fullmatch(path.name)):
        if int(piece.name) > len(content):
            raise UserError(f"{whole}: a piece before {piece.name} is missing, or it was being written; try again")
        content = content[: int(piece.name)] + piece.read_bytes()
    if len(content) > len(before):
        with atomic_write(whole) as temporary:
            temporary.write_bytes(content)
