"""A GCS server of the tests' own."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer


@contextlib.contextmanager
def gcs_server() -> Iterator[str]:
    """Start a server, and yield the URI of a bucket on it."""
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    create_bucket("bucket", storage)
    # Its own server answers one request after the other, but pyarrow asks for more while it reads an answer.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"gs://anonymous@bucket?scheme=http&endpoint_override=127.0.0.1%3A{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
