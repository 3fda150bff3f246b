"""A real PostgreSQL server in a temporary folder."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from optuna.storages import RDBStorage
from sqlalchemy.pool import NullPool

from tests.support.folders import SCRATCH

USER = "emotion"
#: This database asks for the password in plain text.
PLAIN = "plain"


def find_program(name: str) -> str:
    """Find a program of PostgreSQL; Debian keeps those of a server out of the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    found = str(debian[0]) if debian else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} of PostgreSQL is not installed")
    return found


class Server:
    """A server that listens on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self.port = 0
        # It refuses to run as root.
        self._user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "nobody", "nogroup")
        self._data = folder / "data"
        self._run("initdb", "--pgdata", self._data, "--username", USER, "--auth", "trust", "--no-sync")
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"host {PLAIN} all 127.0.0.1/32 password\n" + rules.read_text())
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def start(self) -> None:
        """Start at a free port; another program may take it first, so that another one is tried."""
        for _ in range(5):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self.port = listener.getsockname()[1]
            options = {
                "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": self.port,
            }  # fmt: skip
            settings = [f"--{name}={value}" for name, value in options.items()]
            command = [find_program("postgres"), "-D", str(self._data), *settings]
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._user
            )
            while self._process.poll() is None:
                with contextlib.suppress(psycopg.OperationalError), self._connect() as connection:
                    # Else another server has the port.
                    if connection.execute("SHOW data_directory").fetchone() == (str(self._data),):
                        return
                time.sleep(0.05)
        raise AssertionError("the server has ended")

    def stop(self) -> None:
        """End the server, and every connection to it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self, *, tables: bool = False) -> str:
        """Make a database, empty or with the tables of Optuna, and return its URL."""
        self._databases += 1
        name = f"studies{self._databases}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {self._tables}" if tables else ""))
        return self.url(name)

    @functools.cached_property
    def _tables(self) -> str:
        """The name of a database that is copied: to make the tables takes far longer."""
        self.execute("CREATE DATABASE tables")
        url = self.url("tables").replace("postgresql:", "postgresql+psycopg:", 1)
        RDBStorage(url, engine_kwargs={"poolclass": NullPool})  # a database in use cannot be copied
        return "tables"

    def execute(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute(statement)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self.url("postgres"), autocommit=True)

    def _run(self, name: str, *arguments: object) -> None:
        command = [find_program(name), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._user)


@contextlib.contextmanager
def postgres_server():
    """Start a server; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="rte-pg-", dir=SCRATCH, ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()
