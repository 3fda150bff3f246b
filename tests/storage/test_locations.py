"""A folder and a URI behave alike, to the byte and to the sentence."""

import ast
import errno
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest

import raytune_emotion
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import exclusive_lock, write_text
from raytune_emotion.storage.locations import File, Folder, Remote, location_of, parent_of, parse_location
from tests.support.s3 import SECRET


@pytest.fixture(params=["folder", "file", "s3", "gcs"])
def location(request, tmp_path):
    """An empty place of each kind."""
    if request.param in ("s3", "gcs"):
        bucket = request.getfixturevalue("bucket" if request.param == "s3" else "gcs")
        return Remote(remote.join(bucket, request.node.name))
    place = tmp_path / "at a place"
    return Folder(place) if request.param == "folder" else Remote(place.as_uri())


def put(location, name, text):
    with location.write(name) as path:
        path.write_text(text)


def test_what_is_written_is_read_and_found(location):
    assert (location.exists(), location.read("a.txt"), location.sizes(["a.txt"])) == (False, None, [None])
    assert (location.list_folders(), location.find("*")) == ([], [])
    put(location, "a.txt", "a")
    put(location, "trials/0000/history.jsonl", "{}")
    assert location.exists()
    assert location.read("a.txt") == b"a"
    assert location.sizes(["a.txt", "b.txt", "trials/0000/history.jsonl"]) == [1, None, 2]
    assert location.find("*") == ["a.txt", "trials/0000/history.jsonl"]
    assert location.find("trials/*.jsonl", "b*") == ["trials/0000/history.jsonl"]
    assert location.list_folders() == ["trials"]
    assert location.list_folders("trials") == ["0000"]
    assert [file.name for file in location.list_files()] == ["a.txt"]
    assert [file.name for file in location.list_files("trials/0000")] == ["trials/0000/history.jsonl"]
    assert (location / "trials/0000").read("history.jsonl") == b"{}"
    assert (location / "trials").name == "trials"
    contents = list(location.read_all(["a.txt", "none"]))
    assert contents[0] == b"a"
    assert isinstance(contents[1], OSError)
    assert contents[1].errno == errno.ENOENT


def test_parent_of_a_location_contains_it(location, tmp_path, monkeypatch):
    assert parent_of(location / "a b") == location
    monkeypatch.chdir(tmp_path)
    assert parent_of(Folder(Path())) == Folder(tmp_path.parent)


def test_folder_in_the_place_of_a_file_is_no_file(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    assert Folder(tmp_path).read("manifest.json") is None


def test_stamp_changes_with_the_file(location):
    put(location, "a.txt", "a")
    (before,) = location.list_files()
    stamp = location.stamp(before)
    put(location, "a.txt", "ab")
    (after,) = location.list_files()
    assert stamp
    assert location.stamp(after) != stamp


def test_write_that_fails_leaves_the_old_file(location):
    put(location, "a.txt", "old")

    def write_half():
        with location.write("a.txt") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert location.read("a.txt") == b"old"
    assert location.find("*") == ["a.txt"]


def test_files_are_pushed_pulled_and_deleted(location, tmp_path):
    here = tmp_path / "here"
    for name in ("a.txt", "deep/b.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(here / name, name)
    location.push(here, ["a.txt", "deep/b.txt"])
    location.pull(tmp_path / "there", ["a.txt", "deep/b.txt", "none"])
    assert [file.read_text() for file in sorted((tmp_path / "there").rglob("*.txt"))] == ["a.txt", "deep/b.txt"]
    location.delete(["a.txt", "none"])
    assert location.find("*") == ["deep/b.txt"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x"])
def test_name_that_leads_out_of_the_folder_is_not_pulled(location, tmp_path, name):
    with pytest.raises(UserError, match="which would be written outside"):
        location.pull(tmp_path / "here", [name])


def test_folder_that_is_the_location_needs_no_copies(tmp_path):
    location = Folder(tmp_path)
    write_text(tmp_path / "a.txt", "a")
    inode = (tmp_path / "a.txt").stat().st_ino
    location.push(tmp_path, ["a.txt", "none"])
    location.pull(tmp_path, ["a.txt", "none"])
    assert (tmp_path / "a.txt").stat().st_ino == inode
    with location.copy_here("*") as folder:
        assert folder == tmp_path
    assert location.working_folder() == tmp_path


def test_copy_here_holds_what_was_asked_for_and_errors_name_the_location(location):
    put(location, "study.yaml", "spec")
    put(location, "large", "weights")

    def refuse():
        with location.copy_here("study.*") as folder:
            assert (folder / "study.yaml").read_text() == "spec"
            assert folder.name == location.name
            raise UserError(f"{folder / 'study.yaml'}: damaged")

    with pytest.raises(UserError) as raised:
        refuse()
    assert str(raised.value) == f"{location}/study.yaml: damaged"


def test_files_in_the_root_of_a_bucket_have_a_folder_here():
    with Remote("s3://bucket?region=x").work_here() as folder:
        assert folder.name == "bucket"
        assert list(folder.iterdir()) == []


def test_folder_is_built_on_what_an_attempt_has_left_and_on_nothing_else(location):
    def break_off():
        with location.build() as place:
            put(place, "a.txt", "a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert location.can_be_built()
    with location.build() as place:
        assert place.read("a.txt") == b"a"
    assert not location.can_be_built()
    assert location.find("*") == ["a.txt"]
    with pytest.raises(UserError, match="exists already; name another destination, or remove it"), location.build():
        pass


def test_place_can_be_built_until_what_is_there_is_whole(location):
    assert location.can_be_built("first", "last")
    for name in ("first", "more"):
        put(location, name, "a")
    assert location.can_be_built("first", "last") == isinstance(location, Remote)
    assert not location.can_be_built("second", "last"), "it is somebody else's"
    assert not location.can_be_built("first", "more")
    put(location, "trials/0000/a.txt", "a")
    assert not location.can_be_built("first", "last"), "there was something whole, whose last file is gone"
    assert not (location / "more").can_be_built("first", "last")


def test_files_are_listed_while_a_folder_goes(tmp_path, monkeypatch):
    (tmp_path / "stays.txt").touch()
    (tmp_path / "goes" / "below").mkdir(parents=True)
    scandir = os.scandir

    def scan(path):
        if str(path).endswith("goes"):
            shutil.rmtree(path, ignore_errors=True)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert Folder(tmp_path).find("*") == ["stays.txt"]
    assert not (tmp_path / "goes").exists()


def test_newest_folder_with_a_file_is_found(location):
    assert location.newest("a.txt") is None
    put(location, "one/a.txt", "a")
    put(location, "two/b.txt", "b")
    assert location.newest("a.txt") == "one"


def test_folder_is_told_from_a_file(location):
    put(location, "deep/a.txt", "a")
    assert (location / "deep").is_folder()
    assert not (location / "deep/a.txt").is_folder()


def test_location_can_be_checked(location):
    location.check(write=True)
    assert location.find("*") == []


def test_place_below_a_file_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for location in (Folder(tmp_path / "file" / "a"), Remote((tmp_path / "file/a").as_uri())):
        with pytest.raises(UserError, match=r"file: is not a folder|Not a directory"):
            location.check(write=True)


def test_text_is_parsed_as_folder_or_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = parse_location("ray_results")
    assert folder == Folder(Path("ray_results")) == location_of(Path("ray_results")) == location_of(folder)
    assert (str(folder), folder.address, folder.name) == ("ray_results", str(tmp_path / "ray_results"), "ray_results")
    assert (folder.typed, (folder / "first").typed) == ("ray_results", "ray_results/first")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_location("~/results") == Folder(Path("/home/somebody/results"))
    assert parse_location("./~/a~") == Folder(Path("./~/a~"))
    uri = parse_location("s3://bucket/a?region=x") / "first one"
    assert uri.typed == str(uri)
    assert str(uri) == uri.address == "s3://bucket/a/first%20one?region=x"
    assert uri.name == "first one"
    assert uri.working_folder().is_relative_to(tmp_path / "cache")
    assert uri.working_folder() != (parse_location("s3://other") / "first").working_folder()
    assert folder.require_folder("copy it") == Path("ray_results")
    with pytest.raises(UserError, match=r"first%20one.*: is a URI, but a path of this machine is needed; copy it"):
        uri.require_folder("copy it")
    for location in (folder, uri):
        assert pickle.loads(pickle.dumps(location)) == location


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        (f"s3://key:{SECRET}@bucket/a", "AWS_ACCESS_KEY_ID"),
        (f"s3://key:{SECRET}/+@bucket/a?region=x", "AWS_ACCESS_KEY_ID"),
        (f"s3://bucket/a?secret_key={SECRET}", "AWS_ACCESS_KEY_ID"),
        (f"abfs://container@account.dfs.core.windows.net/a?sas_token={SECRET}", "AZURE_CLIENT_ID"),
        (f"gs://bucket/a?Access_Token={SECRET}&x=y", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_uri_with_credentials_is_refused_without_telling_them(uri, instead):
    with pytest.raises(UserError, match=f"contains credentials.*{instead}") as raised:
        parse_location(uri)
    assert SECRET not in str(raised.value)


def test_uri_that_names_a_kind_of_credentials_is_accepted():
    uri = "abfs://container@account.dfs.core.windows.net/a?credential_kind=anonymous"
    assert parse_location(uri) == Remote(uri)


@pytest.mark.parametrize("text", ["", "a\0b", "s3://bucket/a\0b"])
def test_text_that_can_be_no_path_is_refused(text):
    with pytest.raises(UserError, match="expected a folder or a URI, got"):
        parse_location(text)


@pytest.mark.parametrize("text", ["\ud800", "~\ud800", os.fsdecode(b"a/fb\xff"), "s3://bucket/\udcff"])
def test_a_path_that_is_not_utf_8_is_refused_in_words_that_can_be_printed(text):
    with pytest.raises(UserError, match="the path is not UTF-8; rename it") as raised:
        parse_location(text)
    assert str(raised.value).encode()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_path_below_a_folder_that_is_not_utf_8_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"fb\xff")
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for text in ("below", str(tmp_path / "link")):
        with pytest.raises(UserError, match=r"fb\\udcff.*: the path is not UTF-8; rename it"):
            parse_location(text)


@pytest.mark.parametrize("uri", ["s3://bucket/a/..", "s3://bucket/a/%2E%2E?region=x", "s3://bucket/..%2Fa", "s3://.."])
def test_uri_that_ends_in_no_name_is_refused(uri):
    with pytest.raises(UserError, match="is not the name of a folder"):
        parse_location(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/run#1?region=x", "s3://bucket/run?region=x#1", "file:///a#b"])
def test_uri_with_a_fragment_is_refused_as_it_would_name_another_folder(uri):
    with pytest.raises(UserError, match="contains a #; write %23 for a # in a name"):
        parse_location(uri)
    assert parse_location("s3://bucket/run%231").name == "run#1"


@pytest.mark.parametrize("uri", ["s3://bucket/a?region=x&scheme=http", "abfs://container@account/a", "file:///a@b:c@d"])
def test_uri_without_credentials_is_taken(uri):
    assert str(parse_location(uri)) == uri


def test_listing_of_a_uri_holds_stamps(bucket):
    location = Remote(remote.join(bucket, "stamps"))
    put(location, "a.txt", "abc")
    (file,) = location.list_files()
    assert isinstance(file, File)
    assert location.stamp(file).startswith("3 ")


def test_nobody_outside_storage_asks_whether_a_location_is_a_folder():
    root, asked = Path(raytune_emotion.__file__).parent, []
    for file in root.rglob("*.py"):
        if file.parent != root / "storage":
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            texts = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "isinstance"]
            asked += [f"{file.relative_to(root)}: {text}" for text in texts if "Folder" in text or "Remote" in text]
    assert asked == []


def test_a_copy_in_the_cache_is_found_and_nothing_is_fetched(location, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert location.find_here("copy") is None
    put(location, "a.txt", "a")
    here = location.is_here(tmp_path / "at a place")
    assert location.find_here("copy") == (tmp_path / "at a place" if here else None)
    path = location.cache_here("copy", check=lambda folder: None, fetch=lambda folder: location.pull(folder, ["a.txt"]))
    location.delete(["a.txt"])
    assert location.find_here("copy") == path


# The folder in which a machine works on what lies at a URI


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A study at a URI, and its working folder, in which an earlier search has left a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    study = Remote((tmp_path / "bucket").as_uri()) / "first"
    folder = study.working_folder()
    folder.mkdir(parents=True)
    write_text(folder / "trials.csv", "of days of work")
    return study, folder


def test_new_study_at_a_uri_deletes_no_local_copy(elsewhere, capsys):
    study, folder = elsewhere
    study.free_working_folder()
    assert not folder.exists()
    (aside,) = folder.parent.iterdir()
    assert (aside / "trials.csv").read_text() == "of days of work"
    said = f"{study}: files of an earlier study of this name on this machine are kept in {aside}\n"
    assert capsys.readouterr().err == said
    study.free_working_folder()
    assert list(folder.parent.iterdir()) == [aside]


def test_working_folder_in_use_is_not_freed(elsewhere):
    study, folder = elsewhere
    with exclusive_lock(folder), pytest.raises(UserError, match="another process is using it"):
        study.free_working_folder()
    assert (folder / "trials.csv").exists()


def test_working_folder_is_brought_up_to_date(elsewhere):
    study, folder = elsewhere
    put(study, "study.yaml", "spec")
    put(study, "trials/0000/history.jsonl", "{}")
    put(study, "trials/0000/last.safetensors", "weights")
    with exclusive_lock(folder):
        assert study.check_out("study.yaml", "trials/*/history.jsonl") == folder
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == [".lock", "study.yaml", "trials/0000/history.jsonl"]


def test_folder_of_this_machine_is_its_own_working_folder(tmp_path):
    study = Folder(tmp_path / "first")
    put(study, "study.yaml", "spec")
    study.free_working_folder()
    study.set_aside_copy()
    assert study.check_out("nothing") == tmp_path / "first"
    assert study.read("study.yaml") == b"spec"


def test_what_is_published_lies_at_the_location(location):
    with location.publish("a.txt") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "a.txt", "a")
    assert location.read("a.txt") == b"a"


def test_what_is_published_at_a_uri_replaces_all_that_was_there(bucket):
    location = Remote(remote.join(bucket, "published-twice"))
    for names in (("a.txt", "b.txt"), ("a.txt", "c.txt")):
        with location.publish("a.txt") as folder:
            folder.mkdir()
            for name in names:
                write_text(folder / name, name)
    assert location.find("*") == ["a.txt", "c.txt"]


def test_nothing_is_published_of_a_block_that_fails(bucket):
    location = Remote(remote.join(bucket, "published"))

    def fail():
        with location.publish("a.txt") as folder:
            folder.mkdir()
            write_text(folder / "a.txt", "a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert location.find("*") == []
