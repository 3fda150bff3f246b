"""Connect to the PostgreSQL database that several drivers of a study share."""

import contextlib
import importlib.util
import os
import re
from typing import TYPE_CHECKING

from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line

if TYPE_CHECKING:
    import psycopg

#: Address of a study, without a query: options of libpq, such as a password file, belong to the user, not to a study.
_ADDRESS = re.compile(
    r"(?P<url>postgresql://(?:[\w.~%-]+@)?(?:[\w.-]+|\[[0-9a-fA-F:.]+\])?(?::[0-9]{1,5})?/[\w.~%-]+)"
    r"(?:#(?P<study>[\w.=,+-]{1,200}))?"
)
#: Options of the client. It gives up a silent server after about 15 s, which is before the server gives up the client.
_CLIENT: dict[str, str | int] = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "application_name": "raytune_emotion",
}
#: Options of the server. It gives up a silent client after about 40 s. A wait of ten minutes for a lock is an error.
_SERVER = {
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "4",
    "lock_timeout": "600s",
}


def check_url(text: str) -> str:
    """Check the URL of a database.

    Raises:
        UserError: it is not such a URL, or contains a password, which the message leaves out.
    """
    found = _ADDRESS.fullmatch(text)
    if found is not None and found["study"] is None:
        return text
    hidden = re.sub("://.*@", "://***@", text.partition("?")[0])
    if re.search("://[^/]*:.*@", text) or "password" in text:
        raise UserError(
            f"{hidden}: contains a password, which would be written into studies; put it into ~/.pgpass or PGPASSWORD"
        )
    raise UserError(f"expected postgresql://[USER@]HOST[:PORT]/DATABASE, without options, got {hidden!r}")


def join_address(url: str, study: str) -> str:
    """Return the address of a study in a database."""
    return f"{url}#{study}"


def split_address(address: str) -> tuple[str, str]:
    """Return the URL of the database and the name of the study there.

    Raises:
        ValueError: it is not such an address.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or found["study"] is None:
        raise ValueError("expected postgresql://[USER@]HOST[:PORT]/DATABASE#STUDY")
    return found["url"], found["study"]


def check_database(url: str) -> None:
    """Check that a study can be made in a database.

    Raises:
        UserError: it cannot.
    """
    question = "SELECT to_regclass('trials') IS NOT NULL OR has_schema_privilege(current_schema(), 'CREATE')"
    with contextlib.closing(connect(url)) as connection:
        if connection.execute(question).fetchone() != (True,):
            raise UserError(
                f"{url}: this user may not create tables; allow it (GRANT CREATE ON SCHEMA public), or name another "
                f"database"
            )


def connection_options() -> dict[str, str | int]:
    """Return the options of each connection."""
    server = " ".join(f"-c {name}={value}" for name, value in _SERVER.items())
    # The URL may come from a stranger: a server that asks for the password in plain text does not get it.
    return {**_CLIENT, "options": server, "require_auth": os.environ.get("PGREQUIREAUTH", "!password")}


def connect(url: str) -> "psycopg.Connection":
    """Connect to a database.

    Raises:
        UserError: there is no such database, it refuses this user, or psycopg is missing.
    """
    if importlib.util.find_spec("psycopg") is None:
        raise UserError(
            f"{url}: the package psycopg is missing; install it with pip install 'raytune_emotion[postgres]'"
        )
    import psycopg

    try:
        return psycopg.connect(url, autocommit=True, **connection_options())  # type: ignore[arg-type]
    except psycopg.Error as error:
        raise UserError(
            f"{url}: cannot be opened ({first_line(error)}); start the server, create the database (createdb), or give "
            f"this user access (~/.pgpass, PGPASSWORD)"
        ) from error
