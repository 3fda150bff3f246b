"""Files at a URI: on a real S3 server on the loopback interface, and in a folder."""

import contextlib
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSystem

from raytune_emotion import mirror
from raytune_emotion.errors import Breakdown, UserError

SECRET = "wJalrXUtnFEMI"


@contextlib.contextmanager
def s3_server():
    """A server, and the URI of a bucket on it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1&scheme=http"
    try:
        bucket = f"s3://key:{SECRET}@bucket?{options}"
        filesystem, path = FileSystem.from_uri(f"{bucket}&allow_bucket_creation=true")
        filesystem.create_dir(path)
        yield bucket
    finally:
        server.stop()


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as uri:
        yield uri


@pytest.fixture(params=["s3", "file"])
def uri(request, tmp_path):
    if request.param == "file":
        return (tmp_path / "at a place").as_uri()
    return mirror.join(request.getfixturevalue("bucket"), request.node.name)


@pytest.fixture
def folder(tmp_path):
    """Of a few files, one of them larger than what is sent at once."""
    files = {
        "a.txt": b"a",
        "empty": b"",
        "trials/0000/last.safetensors": bytes(range(256)) * 50_000,
        "trials/0000/h.jsonl": b"{}",
    }
    for name, content in files.items():
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "here"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_can_be_pulled_elsewhere(uri, folder, tmp_path):
    everything = content(folder)
    mirror.push(folder, uri, everything)
    assert mirror.names(uri, "*") == sorted(everything)
    assert mirror.names(uri, "trials/*/last.*", "a.*") == ["a.txt", "trials/0000/last.safetensors"]
    mirror.pull(uri, tmp_path / "there", everything)
    assert content(tmp_path / "there") == everything
    assert mirror.read(uri, "a.txt") == b"a"


def test_a_file_is_replaced_and_deleted(uri, folder, tmp_path):
    mirror.push(folder, uri, content(folder))
    (folder / "a.txt").write_text("new")
    mirror.push(folder, uri, ["a.txt"])
    mirror.delete(uri, ["trials/0000/h.jsonl", "trials/0000/never"])
    assert mirror.names(uri, "*") == ["a.txt", "empty", "trials/0000/last.safetensors"]
    mirror.pull(uri, tmp_path / "there", ["a.txt"])
    assert content(tmp_path / "there") == {"a.txt": b"new"}


def test_what_is_not_there_is_passed_over(uri, folder, tmp_path):
    assert not mirror.exists(uri)
    assert mirror.names(uri, "*") == []
    assert mirror.newest(uri, "a.txt") is None
    assert mirror.read(uri, "a.txt") is None
    mirror.delete(uri, ["a.txt"])
    mirror.push(folder, uri, ["a.txt"])
    mirror.pull(uri, tmp_path / "there", ["a.txt", "b.txt"])
    assert list(content(tmp_path / "there")) == ["a.txt"]
    assert mirror.exists(uri)
    assert mirror.exists(mirror.join(uri, "a.txt"))
    assert not mirror.exists(mirror.join(uri, "b.txt"))


def test_the_newest_folder_with_a_file_is_found(uri, folder):
    for name in ("one", "two words+ü", "three"):
        mirror.push(folder, mirror.join(uri, name), ["a.txt" if name != "three" else "trials/0000/h.jsonl"])
        time.sleep(1.1 if uri.startswith("s3") else 0.01)  # S3 tells whole seconds
    assert mirror.newest(uri, "a.txt") == "two words+ü"


def test_places_are_folders_or_uris():
    assert mirror.place("ray_results") == Path("ray_results")
    assert mirror.place("s3://bucket/a//b") == "s3://bucket/a//b"
    uri = mirror.join("s3://key:secret@bucket/a/?region=b", "my study", "0000")
    assert uri == "s3://key:secret@bucket/a/my%20study/0000?region=b"
    assert mirror.name_of(mirror.join(uri, "best one")) == "best one"
    assert mirror.shown(uri) == "s3://***@bucket/a/my%20study/0000?***"
    for open_one in ("gs://bucket/a", "abfs://container@account/a", "file:///a@b:c@d"):
        assert mirror.shown(open_one) == open_one
    assert mirror.shown("s3://key:sec/ret@bucket/a") == "s3://***@bucket/a"


def test_a_place_that_can_be_used_is_left_as_it_was(uri):
    mirror.check(uri, write=True)
    assert mirror.names(uri, "*") == []
    mirror.check(uri, write=False)


def test_a_place_that_cannot_be_used_is_one_clear_sentence(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        slow = f"s3://key:{SECRET}@bucket/a?endpoint_override=127.0.0.1:{mute.getsockname()[1]}&scheme=http&region=x"
        for place, why in [
            ("ftp://host/a", "Unrecognized filesystem type"),
            ("s3://", "names no bucket"),
            (f"s3://key:{SECRET}@bucket/a?regio=x", "Unexpected query parameter"),
            (mirror.join((tmp_path / "file").as_uri(), "a"), "Not a directory"),
            (bucket.replace("@bucket", "@nosuchbucket"), "NO_SUCH_BUCKET"),
            (f"s3://key:{SECRET}/+@bucket/a?region=x", "Cannot parse URI"),
            (slow, "no answer in 2 s"),
        ]:
            if place == slow:
                monkeypatch.setattr(mirror, "_CHECK_S", 2.0)
            with pytest.raises(UserError, match=why) as raised:
                mirror.check(place, write=True)
            (fault,) = raised.value.faults
            assert fault.startswith(f"{mirror.shown(place)}: cannot be written to (")
            assert SECRET not in fault
            assert "\n" not in fault


def test_wrong_credentials_are_one_clear_sentence(bucket):
    host = bucket.partition("%3A%2F%2F")[2].partition("&")[0].replace("%3A", ":")

    def ask_for_credentials(after: float) -> None:
        connection = http.client.HTTPConnection(host)
        connection.request("POST", "/moto-api/reset-auth", body=json.dumps(after).encode())
        assert connection.getresponse().status == 200

    ask_for_credentials(0)
    try:
        with pytest.raises(UserError, match=r"cannot be read \(.*(INVALID|ACCESS|Forbidden)"):
            mirror.check(bucket, write=False)
    finally:
        ask_for_credentials(1e9)


def test_a_server_that_comes_back_is_waited_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_WAITS", (0.2,) * 20)
    (tmp_path / "disk").touch()  # of which no folder can be made
    threading.Timer(0.5, (tmp_path / "disk").unlink).start()
    mirror.push(folder, (tmp_path / "disk").as_uri(), ["a.txt"])
    assert content(tmp_path / "disk") == {"a.txt": b"a"}


def test_an_upload_that_fails_is_never_silent(bucket, folder, monkeypatch):
    monkeypatch.setattr(mirror, "_WAITS", ())
    for name in ("a.txt", "trials/0000/last.safetensors"):
        with pytest.raises(Breakdown, match="NO_SUCH_BUCKET"):
            mirror.push(folder, bucket.replace("@bucket", "@nosuchbucket"), [name])


def test_a_server_that_stays_away_is_a_breakdown(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_WAITS", (0.01, 0.01))
    (tmp_path / "disk").touch()
    with pytest.raises(Breakdown, match=r"disk: failed 3 times in a row, the last time by: .*exists"):
        mirror.push(folder, (tmp_path / "disk").as_uri(), ["a.txt"])
