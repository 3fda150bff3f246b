"""Let several drivers work on one study: each process that runs trials is one.

PostgreSQL itself keeps them apart, by advisory locks of a session. Each driver holds a lock of its own while its
connection lasts: so the others know that it lives. Whoever changes what others read takes turns by a lock of the study.
"""

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raytune_emotion.errors import Breakdown
from raytune_emotion.known_errors import first_line
from raytune_emotion.tuning.study.database import connect, split_address

if TYPE_CHECKING:
    import psycopg

#: What drivers do one after the other: decide which trials run, or write the files that they share.
What = Literal["trials", "files"]

#: Locks below this number are those of drivers.
_DRIVERS = 2**48
#: Between two questions whether this driver still counts as alive.
_CHECK_S = 3.0
#: Trials of a driver that is gone are left alone for so long: its processes may take some seconds to end.
_GRACE_S = 10.0


class Drivers(Protocol):
    """What one driver has to know of the others."""

    @property
    def own(self) -> int | None:
        """Return what this driver's trials are marked with; None where there is no other driver."""

    def turn(self, what: What) -> contextlib.AbstractContextManager[None]:
        """Let no other driver of the study do this during the block."""

    def others(self) -> set[int | None]:
        """Return the drivers that live, without this one."""

    def abandoned(self, drivers: Collection[int | None]) -> set[int | None]:
        """Return which of these drivers of trials, that do not run here, run them no more."""

    def failure(self) -> str:
        """Say why this driver may not go on; empty while it may. It is to be asked all the time."""


class SingleDriver:
    """The only driver of a study: it has the lock of its folder."""

    own = None

    def turn(self, what: What) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def others(self) -> set[int | None]:
        return set()

    def abandoned(self, drivers: Collection[int | None]) -> set[int | None]:
        return {*drivers}

    def failure(self) -> str:
        return ""


class SharedStudy:
    """One of the drivers of a study in a database, which counts as alive as long as its connection lasts."""

    def __init__(
        self, connection: "psycopg.Connection", address: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connection, self._clock = connection, clock
        self._url, self._study = split_address(address)
        self.own: int | None = secrets.randbelow(_DRIVERS)
        self._gone: dict[int | None, float] = {}  # since when drivers were seen to be gone
        self._due = clock()
        self._ask("SELECT pg_advisory_lock(%s)", self.own)

    @contextlib.contextmanager
    def turn(self, what: What) -> Iterator[None]:
        key = _lock_of(f"{self._study}/{what}")
        self._ask("SELECT pg_advisory_lock(%s)", key)
        try:
            yield
        finally:
            # With the connection the lock is gone too. What the block raises says more.
            with contextlib.suppress(Breakdown):
                self._ask("SELECT pg_advisory_unlock(%s)", key)

    def others(self) -> set[int | None]:
        return self._alive() - {self.own}

    def abandoned(self, drivers: Collection[int | None]) -> set[int | None]:
        if not drivers:
            return set()
        alive, now = self.others(), self._clock()
        # One that was taken for dead while the server was out of reach may be back.
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
        # As behind a pooler, which gives each question another session.
        return "" if alive else f"{self._url}: the lock of this driver is gone; connect to the server itself"

    def _alive(self) -> set[int | None]:
        found = self._ask(
            "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return {key for (key,) in found if key < _DRIVERS}

    def _ask(self, question: str, *values: int | None) -> list[tuple[Any, ...]]:
        import psycopg

        try:
            return self._connection.execute(question, values or None).fetchall()
        except psycopg.errors.LockNotAvailable as error:
            raise Breakdown(f"{self._url}: another driver holds the study for ten minutes; end that one") from error
        except psycopg.Error as error:
            raise Breakdown(
                f"{self._url}: the connection was lost ({first_line(error)}), and other drivers may take up the trials "
                f"of this one"
            ) from error


@contextlib.contextmanager
def join_study(address: str) -> Iterator[SharedStudy]:
    """Become one of the drivers of a study in a database, until the block ends.

    Raises:
        UserError: the database cannot be opened.
    """
    connection = connect(split_address(address)[0])
    try:
        yield SharedStudy(connection, address)
    finally:
        connection.close()


@contextlib.contextmanager
def one_at_a_time(url: str, what: str) -> Iterator[None]:
    """Let no other process do this to a database during the block."""
    with contextlib.closing(connect(url)) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (_lock_of(what),))
        yield


def _lock_of(name: str) -> int:
    """Return the number of a lock by its name, above those of drivers; one of 63 bits has no sign."""
    return int.from_bytes(hashlib.sha256(f"raytune_emotion/{name}".encode()).digest()[:7], "big") + _DRIVERS
