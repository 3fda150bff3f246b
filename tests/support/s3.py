"""An S3 server of the tests' own."""

import contextlib

SECRET = "wJalrXUtnFEMI"


@contextlib.contextmanager
def s3_server():
    """Start a server, and yield the URI of a bucket on it."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1&scheme=http"
    try:
        bucket = f"s3://bucket?{options}"
        filesystem, path = FileSystem.from_uri(f"{bucket}&allow_bucket_creation=true")
        filesystem.create_dir(path)
        yield bucket
    finally:
        server.stop()
