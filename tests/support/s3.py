"""An S3 server of the tests' own, whose requests fail as a test says."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

SECRET = "wJalrXUtnFEMI"

_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We had an internal error.</Message></Error>"


class Faults:
    """What becomes of requests. `plan` returns the fault of a request, by its number, method and path.

    * "error": the server answers with an error, and does nothing.
    * "late error": as well, but it has begun to answer with success, as S3 does where a copy takes long.
    * "drop": it closes the connection in the midst of the request, and does nothing.
    * "deaf": it does what is asked for, and closes the connection without an answer.
    * "half": it closes the connection in the midst of its answer.
    * "slow": it answers after 50 ms.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Let no request fail, and count from 1 again."""
        self.plan: Callable[[int, str, str], str | None] = lambda number, method, path: None
        self.requests.clear()

    def next(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            return self.plan(len(self.requests), method, path)


def _with_faults(app: Callable, faults: Faults) -> Callable:
    def answer(environ, start_response):
        fault = faults.next(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        connection, size = environ["werkzeug.socket"], int(environ.get("CONTENT_LENGTH") or 0)
        if fault == "slow":
            time.sleep(0.05)
        if fault in ("error", "late error"):
            environ["wsgi.input"].read(size)
            status = "500 Internal Server Error" if fault == "error" else "200 OK"
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(_ERROR)))])
            return [_ERROR]
        if fault == "drop":
            environ["wsgi.input"].read(size // 2)
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        parts = app(environ, start_response)
        if fault == "deaf":
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return _half(b"".join(parts), connection) if fault == "half" else parts

    return answer


def _half(content: bytes, connection: socket.socket) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, Faults]]:
    """Start a server, and yield the URI of a bucket on it, and what will become of its requests."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from pyarrow.fs import FileSystem
    from werkzeug.serving import make_server

    class Silent(MotoRequestHandler):
        def log_request(self, *_: object) -> None:
            pass

    faults = Faults()
    app = _with_faults(DomainDispatcherApplication(create_backend_app), faults)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    bucket = f"s3://bucket?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1&scheme=http"
    try:
        filesystem, path = FileSystem.from_uri(f"{bucket}&allow_bucket_creation=true")
        filesystem.create_dir(path)
        yield bucket, faults
    finally:
        server.shutdown()
        thread.join()


@functools.cache
def open_with_one_attempt(uri: str):
    """Open a URI of such a server as `remote` does, but with a client that does not itself try again for seconds."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    parts = urlsplit(uri)
    filesystem = S3FileSystem(
        endpoint_override=parse_qs(parts.query)["endpoint_override"][0],
        region="us-east-1",
        allow_delayed_open=True,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
    )
    return filesystem, f"{parts.netloc}{parts.path}".rstrip("/")
