"""Files at a URI: on a real S3 server on the loopback interface, and in a folder."""

import errno
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import moto.backends
import pytest

from raytune_emotion import interruption
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import remote


@pytest.fixture(params=["s3", "gcs", "file"])
def uri(request, tmp_path):
    if request.param == "file":
        return (tmp_path / "at a place").as_uri()
    bucket = request.getfixturevalue("bucket" if request.param == "s3" else "gcs")
    return remote.join(bucket, request.node.name)


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
    remote.push(folder, uri, everything)
    assert remote.names(uri, "*") == sorted(everything)
    assert remote.names(uri, "trials/*/last.*", "a.*") == ["a.txt", "trials/0000/last.safetensors"]
    remote.pull(uri, tmp_path / "there", everything)
    assert content(tmp_path / "there") == everything
    assert remote.read(uri, "a.txt") == b"a"


def test_a_file_is_replaced_and_deleted(uri, folder, tmp_path):
    remote.push(folder, uri, content(folder))
    (folder / "a.txt").write_text("new")
    remote.push(folder, uri, ["a.txt"])
    remote.delete(uri, ["trials/0000/h.jsonl", "trials/0000/never"])
    assert remote.names(uri, "*") == ["a.txt", "empty", "trials/0000/last.safetensors"]
    remote.pull(uri, tmp_path / "there", ["a.txt"])
    assert content(tmp_path / "there") == {"a.txt": b"new"}


def test_what_is_not_there_is_passed_over(uri, folder, tmp_path):
    assert not remote.exists(uri)
    assert remote.names(uri, "*") == []
    assert remote.newest(uri, "a.txt") is None
    assert remote.read(uri, "a.txt") is None
    remote.delete(uri, ["a.txt"])
    remote.push(folder, uri, ["a.txt"])
    remote.pull(uri, tmp_path / "there", ["a.txt", "b.txt"])
    assert list(content(tmp_path / "there")) == ["a.txt"]
    assert remote.exists(uri)
    assert remote.exists(remote.join(uri, "a.txt"))
    assert not remote.exists(remote.join(uri, "b.txt"))


def test_the_newest_folder_with_a_file_is_found(uri, folder):
    for name in ("one", "two words+ü", "three"):
        remote.push(folder, remote.join(uri, name), ["a.txt" if name != "three" else "trials/0000/h.jsonl"])
        time.sleep(1.1 if uri.startswith("s3") else 0.01)  # S3 tells whole seconds
    assert remote.newest(uri, "a.txt") == "two words+ü"


def test_uris_are_joined_and_named():
    uri = remote.join("s3://bucket/a/?region=b", "my study", "0000")
    assert uri == "s3://bucket/a/my%20study/0000?region=b"
    assert remote.name_of(remote.join(uri, "best one")) == "best one"
    assert remote.name_of("s3://bucket/?region=b") == remote.name_of("s3://bucket") == "bucket"


def test_a_place_that_can_be_used_is_left_as_it_was(uri):
    remote.check(uri, write=True)
    assert remote.names(uri, "*") == []
    remote.check(uri, write=False)


def test_two_checks_at_once_do_not_disturb_each_other(uri, monkeypatch, capsys):
    put = remote._put

    def check():
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([uri, True])))
        remote._check()

    def put_and_let_another_check(file, filesystem, target):
        put(file, filesystem, target)
        monkeypatch.setattr(remote, "_put", put)
        check()

    monkeypatch.setattr(remote, "_put", put_and_let_another_check)
    check()
    assert capsys.readouterr().out == ""
    assert remote._list_all(uri) == []


def test_a_place_that_cannot_be_used_is_one_clear_sentence(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        slow = f"s3://bucket/a?endpoint_override=127.0.0.1:{mute.getsockname()[1]}&scheme=http&region=x"
        for place, why in [
            ("ftp://host/a", "Unrecognized filesystem type"),
            ("s3://", "names no bucket"),
            ("s3://bucket/a?regio=x", "Unexpected query parameter"),
            (remote.join((tmp_path / "file").as_uri(), "a"), "Not a directory"),
            (bucket.replace("//bucket", "//nosuchbucket"), "NO_SUCH_BUCKET"),
            (slow, "no answer in 2 s"),
        ]:
            if place == slow:
                monkeypatch.setattr(remote, "_CHECK_S", 2.0)
            with pytest.raises(UserError, match=why) as raised:
                remote.check(place, write=True)
            (fault,) = raised.value.faults
            assert fault.startswith(f"{place}: cannot be written to (")
            assert "\n" not in fault


def test_a_bucket_that_is_gone_while_files_are_written_is_a_breakdown(uri, folder, tmp_path, monkeypatch):
    """Callers would take a FileNotFoundError for a missing file."""
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    gone = uri.replace("bucket", "nosuchbucket", 1)
    if uri.startswith("file"):
        monkeypatch.setattr(remote.shutil, "copyfileobj", lambda *_: shutil.rmtree(tmp_path / "at a place"))
    with pytest.raises(Breakdown, match="failed"):
        remote.push(folder, gone, ["a.txt"])


def test_a_check_that_is_killed_is_a_fault_and_gets_no_signal_of_the_terminal(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -INT 0\n")  # to its whole group, as by Ctrl-C
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(UserError, match="its check ended with code -2"):
        remote.check(tmp_path.as_uri(), write=False)


@pytest.mark.parametrize(("options", "seconds"), [("", 10), ("?retry_limit_seconds=60", 60)])
def test_pyarrow_tries_for_seconds_at_gcs_unless_the_uri_says_otherwise(options, seconds):
    """Its default is a quarter of an hour, in which it hears no signal."""
    filesystem, path = remote._open(f"gs://anonymous@bucket/a{options}")
    assert path == "bucket/a"
    assert filesystem.__reduce__()[1][0]["retry_time_limit"].total_seconds() == seconds


@pytest.mark.parametrize(
    ("place", "why"),
    [("ftp://host/a.csv", "Unrecognized filesystem type"), ("s3://bucket/a?regio=x", "Unexpected query parameter")],
)
def test_mistyped_uri_that_nobody_has_checked_is_one_clear_sentence(place, why):
    with pytest.raises(UserError, match=why) as raised:
        remote.is_file(place)
    (fault,) = raised.value.faults
    assert fault.startswith(f"{place}: cannot be used (")
    assert "); name a folder, or a URI such as s3://bucket/prefix?region=eu-west-1 of" in fault
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
            remote.check(bucket, write=False)
    finally:
        ask_for_credentials(1e9)


def test_a_server_that_comes_back_is_waited_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.2,) * 20)
    (tmp_path / "disk").touch()  # of which no folder can be made
    threading.Timer(0.5, (tmp_path / "disk").unlink).start()
    remote.push(folder, (tmp_path / "disk").as_uri(), ["a.txt"])
    assert content(tmp_path / "disk") == {"a.txt": b"a"}


def test_an_outage_is_waited_out_where_work_would_be_lost(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    monkeypatch.setattr(remote, "_OUTAGE_WAITS", (0.1,) * 100)
    (tmp_path / "disk").touch()  # of which no folder can be made
    uri = (tmp_path / "disk").as_uri()
    with pytest.raises(Breakdown, match="failed 2 times"):
        remote.push(folder, uri, ["a.txt"])
    with remote.outlast_outages():
        monkeypatch.setattr(interruption._state, "interrupted", True)
        with pytest.raises(Breakdown, match="failed 2 times"):
            remote.push(folder, uri, ["a.txt"])
        monkeypatch.setattr(interruption._state, "interrupted", False)
        threading.Timer(0.3, (tmp_path / "disk").unlink).start()
        remote.push(folder, uri, ["a.txt"])
    assert content(tmp_path / "disk") == {"a.txt": b"a"}
    assert capsys.readouterr().err.count("; it is tried again for a quarter of an hour\n") == 2


def test_an_outage_is_reported_once_and_no_further_file_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "_WAITS", ())
    monkeypatch.setattr(remote, "_OUTAGE_WAITS", (0.0, 0.0))
    together, begun = threading.Barrier(remote._AT_ONCE), set()

    def fail(name, filesystem, path):
        begun.add(name)
        if len(begun) <= remote._AT_ONCE:
            together.wait(60)
        raise OSError(errno.ESTALE, "Stale file handle")

    names = [str(i) for i in range(3 * remote._AT_ONCE)]
    with remote.outlast_outages():
        for _ in range(2):
            begun.clear()
            with pytest.raises(Breakdown, match="failed 3 times"):
                remote._for_each(tmp_path.as_uri(), names, fail)
            assert begun == {*names[: remote._AT_ONCE]}
    assert capsys.readouterr().err.count("; it is tried again for a quarter of an hour\n") == 2


# An upload that breaks off


GOOD = b"good" * 10
#: More than what one request of an upload in parts takes.
HALF = bytes(range(256)) * 44_000


class Broken(Exception):
    pass


@pytest.mark.parametrize("written", [0, len(HALF)])
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, MemoryError])
def test_interrupted_upload_keeps_the_old_object(uri, tmp_path, monkeypatch, written, error):
    (tmp_path / "journal").write_bytes(GOOD)
    remote.push(tmp_path, uri, ["journal"])

    def break_off(source, target, length):
        if written:
            target.write(HALF)
        raise error

    monkeypatch.setattr(shutil, "copyfileobj", break_off)
    with pytest.raises(error):
        remote.push(tmp_path, uri, ["journal"])
    assert remote.read(uri, "journal") == GOOD
    assert remote.names(uri, "*") == ["journal"]


def test_file_that_vanished_keeps_the_old_object(uri, tmp_path):
    (tmp_path / "journal").write_bytes(GOOD)
    remote.push(tmp_path, uri, ["journal"])
    (tmp_path / "journal").unlink()
    with pytest.raises(FileNotFoundError):
        remote.push(tmp_path, uri, ["journal"])
    assert remote.read(uri, "journal") == GOOD
    assert remote.names(uri, "*") == ["journal"]


def test_two_ctrl_c_in_an_upload_keep_the_old_object(uri, tmp_path):
    (tmp_path / "journal").write_bytes(GOOD)
    remote.push(tmp_path, uri, ["journal"])
    (tmp_path / "journal").unlink()
    os.mkfifo(tmp_path / "journal")
    script = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from raytune_emotion.storage import remote\n"
        "remote.push(pathlib.Path(sys.argv[1]), sys.argv[2], ['journal'])\n"
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), uri], stderr=subprocess.PIPE, text=True
        ) as process,
        (tmp_path / "journal").open("wb") as pipe,
    ):
        pipe.write(HALF)
        pipe.flush()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert remote.read(uri, "journal") == GOOD


def test_file_that_s3_cannot_replace_in_one_step_is_refused_before_it_is_sent(bucket, folder, monkeypatch):
    monkeypatch.setattr(remote, "_LARGEST_COPY", 1000)
    uri = remote.join(bucket, "large")
    with pytest.raises(Breakdown, match=r"last\.safetensors: S3 cannot replace a file larger than 5 GiB in one step"):
        remote.push(folder, uri, ["a.txt", "trials/0000/last.safetensors"])
    assert remote.names(uri, "*") == ["a.txt"]


# Names that somebody else has chosen


def test_name_that_leads_out_of_the_folder_is_refused(bucket, tmp_path):
    # Clients mend such a name; who means harm has another one.
    backend = moto.backends.get_backend("s3")["123456789012"]["aws"]
    for name in ("names/study.yaml", "names/trials/../../other/history.jsonl", "names/../study.yaml"):
        backend.put_object("bucket", name, b"theirs")
    uri = remote.join(bucket, "names")
    found = remote.names(uri, "*study.yaml", "trials/*/history.jsonl")
    assert "trials/../../other/history.jsonl" in found
    with pytest.raises(
        UserError, match=r"names.*: contains 'trials/\.\./\.\./other/history\.jsonl', which would be written"
    ):
        remote.pull(uri, tmp_path / "deep" / "folder", found)
    assert content(tmp_path) == {}
    assert remote.newest(uri, "study.yaml") is None


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a//x", "", ".", "a/./x", "a\0b"])
def test_only_names_below_the_folder_are_fetched(tmp_path, name):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="which would be written outside"):
        remote.pull((tmp_path / "there").as_uri(), tmp_path / "here", [name])


# What is tried again


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError("When reading: AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist"),
    ],
)
def test_error_that_stays_is_not_tried_again(tmp_path, monkeypatch, error):
    tries = []

    def fail(uri):
        tries.append(uri)
        raise error

    monkeypatch.setattr(remote, "_open", fail)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    with pytest.raises(Breakdown, match=r"^s3://bucket/a: failed: "):
        remote.exists("s3://bucket/a")
    assert len(tries) == 1


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), OSError("AWS Error SLOW_DOWN during")])
def test_error_that_passes_is_tried_again(monkeypatch, error):
    tries = []

    def fail(uri):
        tries.append(uri)
        raise error

    monkeypatch.setattr(remote, "_open", fail)
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    with pytest.raises(Breakdown, match="failed 3 times in a row, the last time with: "):
        remote.exists("s3://bucket/a")
    assert len(tries) == 3


def test_full_disk_is_told_as_such(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a").write_bytes(b"a")

    def fill_up(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fill_up)
    with pytest.raises(OSError, match="No space left on device"):
        remote.pull((tmp_path / "there").as_uri(), tmp_path / "here", ["a"])


def test_file_system_that_cannot_replace_a_file_is_refused():
    with pytest.raises(UserError, match="a file system of type mock cannot replace a file in one step"):
        remote.check("mock:///a/b", write=True)


def test_an_upload_that_fails_is_never_silent(bucket, folder, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", ())
    for name in ("a.txt", "trials/0000/last.safetensors"):
        with pytest.raises(Breakdown, match="NO_SUCH_BUCKET"):
            remote.push(folder, bucket.replace("//bucket", "//nosuchbucket"), [name])


def test_a_server_that_stays_away_is_a_breakdown(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    (tmp_path / "disk").touch()
    with pytest.raises(Breakdown, match=r"disk: failed 3 times in a row, the last time with: .*exists"):
        remote.push(folder, (tmp_path / "disk").as_uri(), ["a.txt"])


def test_names_are_asked_for_again_after_a_failure(uri, folder, monkeypatch):
    remote.push(folder, uri, ["a.txt"])
    attempt = remote._with_retries

    def twice(uri, action):
        attempt(uri, action)
        return attempt(uri, action)

    monkeypatch.setattr(remote, "_with_retries", twice)
    assert remote.sizes(uri, (name for name in ("a.txt", "missing"))) == [1, None]
