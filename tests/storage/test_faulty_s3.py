"""Files on an S3 server that fails, is slow, or dies: a reader finds the old object or the new one."""

import itertools
import re
from urllib.parse import urlsplit

import moto.backends
import pytest
from pyarrow.fs import FileSelector

from raytune_emotion.errors import Breakdown
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Remote
from tests.support.folders import files_of

pytestmark = pytest.mark.long

OLD, NEW = b"old" * 100, b"new line" * 200
#: More than what one request of an upload takes.
LARGE = bytes(range(256)) * 44_000


@pytest.fixture
def uri(bucket, faults, request):
    return remote.join(bucket, re.sub(r"\W", "-", request.node.name))


def backend():
    return moto.backends.get_backend("s3")["123456789012"]["aws"]


def name_at(uri):
    return f"{urlsplit(uri).path.removeprefix('/')}/file"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "here").mkdir()
    for number in range(20):
        (tmp_path / "here" / f"{number}.txt").write_bytes(NEW * number)
    return tmp_path / "here"


@pytest.mark.parametrize("fault", ["error", "drop", "deaf", "half", "slow"])
def test_every_twentieth_request_may_fail_three_times(uri, faults, folder, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(remote, "_WAITS", (0.001,) * 10)
    names = [path.name for path in folder.iterdir()]
    # A trick of the server: without a body there is no half of it.
    faults.plan = lambda number, method, path: (
        fault if number % 20 < 3 and (fault != "half" or method == "GET") else None
    )
    remote.push(folder, uri, names)
    assert remote.names(uri, "*") == sorted(names)
    remote.pull(uri, tmp_path / "there", names)
    assert files_of(tmp_path / "there") == files_of(folder)
    assert [*remote.read_all(uri, ["3.txt", "none", "4.txt"])] == [NEW * 3, None, NEW * 4]
    remote.delete(uri, names[:5])
    faults.reset()
    assert remote.names(uri, "*") == sorted(names[5:])


@pytest.mark.parametrize(
    ("fault", "new"),
    [("error", NEW), ("drop", NEW), ("deaf", NEW), ("late error", NEW), ("drop", LARGE)],
    ids=["error", "drop", "deaf", "late error", "large"],
)
def test_a_server_that_dies_in_an_upload_leaves_the_old_object_or_the_new_one(uri, faults, tmp_path, fault, new):
    def die(number, method, path):
        copies = (method, path[-4:]) == ("PUT", "file")
        return fault if number >= dies_at and (copies or fault != "late error") else None

    def push(content):
        (tmp_path / "file").write_bytes(content)
        remote.push(tmp_path, uri, ["file"])

    dies_at = 1
    while True:
        faults.reset()
        push(OLD)
        faults.reset()
        faults.plan = die
        try:
            push(new)
        except Breakdown:
            faults.reset()
            assert remote.read(uri, "file") in (OLD, new)
            assert remote.names(uri, "*") == ["file"]
            assert [file.name for file in Remote(uri).list_files()] == ["file"]
        else:
            faults.reset()
            break
        dies_at += 1
    assert remote.read(uri, "file") == new
    assert dies_at > 2
    Remote(uri).delete_parts()
    filesystem, path = remote._open(uri)
    assert [info.base_name for info in filesystem.get_file_info(FileSelector(path))] == ["file"]


def test_a_folder_whose_replacement_breaks_off_is_never_a_mixture(uri, faults, monkeypatch):
    monkeypatch.setattr(Remote, "check", lambda self, *, write: None)
    location = Remote(uri)

    def publish(content):
        with location.publish("config.json") as folder:
            folder.mkdir()
            for name in ("a.bin", "config.json", "model.bin"):
                (folder / name).write_text(content)

    def contents():
        return [location.read(name) for name in ("a.bin", "config.json", "model.bin")]

    found = []
    for dies_at in range(1, 16, 2):
        faults.reset()
        publish("old")
        faults.reset()
        faults.plan = lambda number, method, path: "drop" if number >= dies_at else None  # noqa: B023
        with pytest.raises(Breakdown):
            publish("new")
        faults.reset()
        found.append(contents())
    assert [b"old"] * 3 in found
    assert all(content in ([b"old"] * 3, [b"new"] * 3) or content[1] is None for content in found)


@pytest.mark.parametrize(
    ("old", "new"), [(OLD, NEW), (NEW, OLD), (LARGE[::-1], LARGE)], ids=["longer", "shorter", "large"]
)
@pytest.mark.parametrize("how", ["read", "pull"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_a_whole(uri, faults, tmp_path, monkeypatch, old, new, how):
    monkeypatch.setattr(remote, "_CHUNK", 2**22)

    def replace_before(nth):
        gets = itertools.count(1)

        def plan(number, method, path):
            if method == "GET" and next(gets) == nth:
                backend().put_object("bucket", name_at(uri), new)

        return plan

    for nth in (1, 2):
        faults.reset()
        backend().put_object("bucket", name_at(uri), old)
        faults.plan = replace_before(nth)
        if how == "read":
            found = remote.read(uri, "file")
        else:
            remote.pull(uri, tmp_path / "there", ["file"])
            found = (tmp_path / "there/file").read_bytes()
        assert found in (old, new)


def test_a_file_that_is_replaced_all_the_time_is_a_breakdown(uri, faults):
    def replace(number, method, path):
        if method == "GET":
            backend().put_object("bucket", name_at(uri), b"%d" % number)

    backend().put_object("bucket", name_at(uri), OLD)
    faults.plan = replace
    with pytest.raises(Breakdown, match=r"failed 2 times in a row, the last time with: .*file: replaced while"):
        remote.read(uri, "file")
