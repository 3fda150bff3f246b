"""Let several drivers, which are processes that run trials, work on one study.

Advisory locks of PostgreSQL sessions separate them. Each driver holds a lock of its own while its connection lasts, so
the others know that it is alive. A driver that changes shared data holds a lock of the study meanwhile.
"""

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raytune_emotion.errors import Breakdown
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.atomic import FolderLock
from raytune_emotion.tuning.study.database import connect, split_address
from raytune_emotion.tuning.study.remote_copy import TAKEN_OVER

if TYPE_CHECKING:
    import psycopg

#: Actions that only one driver does at a time: decide which trials run, write shared files, or make page and export.
What = Literal["trials", "files", "conclusion"]

#: Upper bound of the numbers of drivers' locks.
_DRIVERS = 2**48
#: Seconds between two checks whether this driver still counts as alive.
_CHECK_S = 3.0
#: Seconds for which trials of a dead driver are not touched. If only its connection has broken, it notices that after
#: `_CHECK_S`, and Ray Tune gives the processes of its trials ten seconds to end.
_GRACE_S = 20.0


class Drivers(Protocol):
    """The interface of one driver to the others."""

    @property
    def own(self) -> int | None:
        """Return the mark of this driver's trials; None if there are no other drivers."""

    def turn(self, what: What) -> contextlib.AbstractContextManager[None]:
        """Prevent other drivers of the study from doing this during the block."""

    def others(self) -> set[int | None]:
        """Return the live drivers without this one."""

    def abandoned(self, drivers: Collection[int | None]) -> set[int | None]:
        """Return the drivers that are dead, whose trials may be taken over."""

    def failure(self) -> str:
        """Say why this driver must stop; "" while it may continue. Call it continually, and before each write."""


class SingleDriver:
    """The only driver of a study, which holds the lock of its folder.

    It claims the lock at its first turn, because a driver writes nothing before that. Until then, the request may still
    be refused. A refused request must not end a driver that is at work where the file system has no locks.
    """

    own = None

    def __init__(self, lock: FolderLock | None = None, begin: Callable[[], None] = lambda: None) -> None:
        """Hold a lock, and begin once it is claimed. A reader of the study holds none."""
        self._lock, self._begin, self._has_begun = lock, begin, False

    @contextlib.contextmanager
    def turn(self, what: What) -> Iterator[None]:
        if self._lock is not None and not self._lock.claim():
            raise Breakdown(self.failure())
        if not self._has_begun:
            self._begin()
            self._has_begun = True
        yield

    def others(self) -> set[int | None]:
        return set()

    def abandoned(self, drivers: Collection[int | None]) -> set[int | None]:
        return {*drivers}

    def failure(self) -> str:
        return "" if self._lock is None or self._lock.is_held() else f"{self._lock.folder}: {TAKEN_OVER}"


class DatabaseDriver:
    """One of the drivers of a study in a database. It counts as alive as long as its connection lasts."""

    def __init__(
        self, connection: "psycopg.Connection", address: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connection, self._clock = connection, clock
        self._url, self._study = split_address(address)
        self.own: int | None = secrets.randbelow(_DRIVERS)
        self._gone: dict[int | None, float] = {}  # time at which each driver was first found dead
        self._due = clock()
        self._ask("SELECT pg_advisory_lock(%s)", self.own)

    @contextlib.contextmanager
    def turn(self, what: What) -> Iterator[None]:
        key = _lock_of(f"{self._study}/{what}")
        # All drivers reach the conclusion at once, and each takes minutes.
        with self._without_limit() if what == "conclusion" else contextlib.nullcontext():
            self._ask("SELECT pg_advisory_lock(%s)", key)
        try:
            yield
        finally:
            # If the connection is lost, the lock is released, too. The error of the block is more informative.
            with contextlib.suppress(Breakdown):
                self._ask("SELECT pg_advisory_unlock(%s)", key)

    @contextlib.contextmanager
    def _without_limit(self) -> Iterator[None]:
        """Wait for locks as long as necessary during the block."""
        ((before,),) = self._ask("SELECT current_setting('lock_timeout')")
        self._ask("SELECT set_config('lock_timeout', '0', false)")
        try:
            yield
        finally:
            with contextlib.suppress(Breakdown):
                self._ask("SELECT set_config('lock_timeout', %s, false)", before)

    def others(self) -> set[int | None]:
        return self._alive() - {self.own}

    def abandoned(self, drivers: Collection[int | None]) -> set[int | None]:
        if not drivers:
            return set()
        alive, now = self.others(), self._clock()
        # A driver that was taken for dead while the server was unreachable may be back.
        self._gone = {driver: self._gone.get(driver, now) for driver in drivers if driver not in alive}
        return {driver for driver, since in self._gone.items() if driver == self.own or now - since >= _GRACE_S}

    def failure(self) -> str:
        if self._clock() < self._due:
            return ""
        self._due = self._clock() + _CHECK_S
        try:
            alive = self.own in self._alive()
        except Breakdown as error:
            return str(error)
        # A pooler, for example, gives each query another session.
        return "" if alive else f"{self._url}: the lock of this driver is lost; connect to the server directly"

    def _alive(self) -> set[int | None]:
        found = self._ask(
            "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return {key for (key,) in found if key < _DRIVERS}

    def _ask(self, question: str, *values: int | str | None) -> list[tuple[Any, ...]]:
        import psycopg

        try:
            return self._connection.execute(question, values or None).fetchall()
        except psycopg.errors.LockNotAvailable as error:
            raise Breakdown(f"{self._url}: another driver has locked the study for ten minutes; end it") from error
        except psycopg.Error as error:
            raise Breakdown(
                f"{self._url}: the connection was lost ({first_line(error)}); other drivers may take over the trials "
                f"of this one"
            ) from error


@contextlib.contextmanager
def join_study(address: str) -> Iterator[DatabaseDriver]:
    """Become one of the drivers of a study in a database, until the block ends.

    Raises:
        UserError: the database cannot be opened.
    """
    connection = connect(split_address(address)[0])
    try:
        yield DatabaseDriver(connection, address)
    finally:
        connection.close()


@contextlib.contextmanager
def one_at_a_time(url: str, what: str) -> Iterator[None]:
    """Prevent other processes from doing this in a database during the block."""
    with contextlib.closing(connect(url)) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (_lock_of(what),))
        yield


def _lock_of(name: str) -> int:
    """Return the number of a lock by its name: above those of drivers, and below 2**63, so that it is positive."""
    return int.from_bytes(hashlib.sha256(f"raytune_emotion/{name}".encode()).digest()[:7], "big") + _DRIVERS
