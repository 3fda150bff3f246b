"""A real PostgreSQL server in a temporary folder."""

import contextlib
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
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
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
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": self.port}
        settings = [f"--{name}={value}" for name, value in options.items()]
        command = [find_program("postgres"), "-D", str(self._data), *settings]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._user)
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                return psycopg.connect(self.url("postgres")).close()
            assert self._process.poll() is None, "the server has ended"
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server, and every connection to it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database, and return its URL."""
        self._databases += 1
        name = f"studies{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def _run(self, name: str, *arguments: object) -> None:
        command = [find_program(name), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._user)


@contextlib.contextmanager
def postgres_server():
    """Start a server; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="rte-pg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
