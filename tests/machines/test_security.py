"""What a local search shows to others while it runs: no port beyond loopback, and no secret.

Not part of `make test`; run it by `.venv/bin/python -m pytest tests/machines/test_security.py`.
"""

import contextlib
import signal
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.support.s3 import SECRET

pytestmark = pytest.mark.timeout(300)


def content_of(path):
    """Return the content of a file; nothing if it has gone meanwhile, like the temporary files of a trial."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_local_search_listens_on_loopback_alone_and_tells_no_secret(folder, search, monkeypatch, workers):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    # Those of a session that this process has.
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    running = search("--workers-per-trial", workers)
    driver = psutil.Process(running.process.pid)
    processes = [driver, *driver.children(recursive=True)]
    assert len(processes) > 5

    listening, lines, token_file = set(), [], None
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            listening |= {
                c.laddr.ip.removeprefix("::ffff:")
                for c in connections
                if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
            }
            lines += process.cmdline()
            token_file = token_file or process.environ().get("RAY_AUTH_TOKEN_PATH")
    assert listening
    assert [address for address in listening if not ip_address(address).is_loopback] == []

    token = Path(token_file)
    assert token.stat().st_mode & 0o777 == 0o600
    secrets = (SECRET, token.read_text())
    assert not any(secret in line for secret in secrets for line in lines)
    files = [path for place in (folder / "r", token.parent) for path in place.rglob("*") if path.is_file()]
    tells = [path for path in files if path != token and any(s.encode() in content_of(path) for s in secrets)]
    assert tells == []

    running.process.send_signal(signal.SIGINT)
    code, out = running.ended()
    assert code == 130, out
    assert not any(secret in out for secret in secrets)
    assert not token.exists()
