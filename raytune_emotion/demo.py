"""Try an export on one's own pictures, on a page in the browser: the command.

The page is served only on this machine's loopback address. Pictures are sent only to this process, and are not kept.
"""

import argparse
import importlib.resources
import json
import secrets
import sys
import threading
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from raytune_emotion.cli import command_main, location, port_number
from raytune_emotion.errors import UserError
from raytune_emotion.learn.export_files import LOADED, check_export
from raytune_emotion.terminal import say

if TYPE_CHECKING:
    from raytune_emotion.learn.export_folder import Package

_LOOPBACK = "127.0.0.1"
#: Largest size of a picture, MiB.
_LARGEST = 50
#: Placeholders in the page.
_NONCE, _LIMIT = "{{nonce}}", "{{largest}}"
#: Longest time that a browser may take to send a picture, seconds.
_SECONDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "export",
        type=location,
        metavar="EXPORT",
        help="an export: best/ of a study or of a run of train, or the output of export; a folder or a URI",
    )
    add("--port", type=port_number, default=0, metavar="N", help="port of the page (default: a free one)")


def run(args: argparse.Namespace) -> None:
    with args.export.copy_here(*LOADED) as folder:
        check_export(folder)
        # Imported only now: it takes seconds.
        from raytune_emotion.learn.export_folder import load_package

        package = load_package(folder)
    with make_server(package, args.port) as server:
        say(f"open {server.address} in a browser on this machine; Ctrl-C ends it")
        sys.stdout.flush()  # it may be a file or a pipe, and the server runs for long
        server.serve_forever()


class DemoServer(ThreadingHTTPServer):
    """Serve the page, and predict the pictures that the page sends."""

    daemon_threads = True

    def __init__(self, package: "Package", port: int) -> None:
        self.package, self.turn = package, threading.Lock()
        super().__init__((_LOOPBACK, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error of a request, unless the browser has gone away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """Return the addresses by which a browser on this machine may reach the server."""
        return tuple(f"{name}:{self.server_port}" for name in (_LOOPBACK, "localhost"))

    @property
    def address(self) -> str:
        return f"http://{self.hosts[0]}/"


def make_server(package: "Package", port: int) -> DemoServer:
    """Open the port of the page.

    Raises:
        UserError: the port is taken.
    """
    try:
        return DemoServer(package, port)
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot open the port ({error.strerror}); choose another, or leave it out"
        ) from None


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = _SECONDS

    def do_GET(self) -> None:
        if not self._is_from_here():
            self._answer(403, "text/plain", b"this page is for a browser on this machine")
        elif self.path != "/":
            self._answer(404, "text/plain", b"there is only one page: /")
        else:
            nonce = secrets.token_urlsafe(16)
            page = importlib.resources.files("raytune_emotion").joinpath("demo.html").read_text(encoding="utf-8")
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
                f"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            page = page.replace(_NONCE, nonce).replace(_LIMIT, str(_LARGEST))
            self._answer(200, "text/html; charset=utf-8", page.encode(), policy)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_from_here() or self.path != "/predict":
            self._answer(403, "text/plain", b"only the page may send pictures")
        elif not length.isdecimal() or int(length) > _LARGEST * 2**20:
            self._answer_json(413, {"error": f"the picture is larger than {_LARGEST} MiB"})
        else:
            self._answer_json(*self._predict(self.rfile.read(int(length))))

    def _predict(self, content: bytes) -> tuple[int, dict[str, Any]]:
        import numpy as np

        from raytune_emotion.data.decode import UndecodableImage, decode_at_sizes, ignore_decoder_warnings

        package = self.server.package
        with self.server.turn:
            try:
                with ignore_decoder_warnings():
                    (pixels,) = decode_at_sizes(content, (package.image_size,))
            except UndecodableImage as error:
                return 400, {"error": str(error)}
            prob_K = package.predict(np.stack([pixels]))[0].tolist()
        rows = [{"name": name, "probability": p} for name, p in zip(package.classes, prob_K, strict=True)]
        return 200, {"classes": rows}

    def _is_from_here(self) -> bool:
        """Tell whether the page itself sent a request. A request of another site names another host or origin."""
        origin = self.headers.get("Origin")
        own = [f"http://{host}" for host in self.server.hosts]
        return self.headers.get("Host") in self.server.hosts and (origin is None or origin in own)

    def _answer_json(self, status: int, content: dict[str, Any]) -> None:
        self._answer(status, "application/json", json.dumps(content).encode())

    def _answer(self, status: int, kind: str, content: bytes, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Do nothing: print no line for each request."""


if __name__ == "__main__":
    sys.exit(command_main("demo"))
