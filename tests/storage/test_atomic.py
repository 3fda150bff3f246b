import contextlib
import subprocess
import sys
import threading

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.storage import atomic
from raytune_emotion.storage.atomic import resumable_folder, whole, whole_folder, write_text


def test_a_file_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")

    def write_half() -> None:
        with whole(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_file_is_as_open_as_its_folder_whoever_wrote_it(tmp_path):
    tmp_path.chmod(0o750)
    with whole(tmp_path / "weights") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


# Folders that are whole or not there


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_leaves_nothing(tmp_path, error):
    def break_off():
        with whole_folder(tmp_path / "a" / "dest") as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        break_off()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    def lose_the_race():
        with whole_folder(tmp_path / "dest"):
            (tmp_path / "dest").mkdir()
            (tmp_path / "dest" / "theirs").touch()

    with pytest.raises(UserError, match="exists already"):
        lose_the_race()
    assert [path.name for path in tmp_path.rglob("*")] == ["dest", "theirs"]


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_STALE_SECONDS", -1)
    script = (
        "import os, pathlib, sys\n"
        "from raytune_emotion.storage.atomic import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "dest")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    with whole_folder(tmp_path / "dest") as first:
        assert not left.exists()
        atomic.sweep(tmp_path, -1)
        assert first.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_breaks_off_is_gone_on_with(tmp_path, error):
    def attempt(fails):
        with resumable_folder(tmp_path / "a" / "dest") as folder:
            (folder / f"{len(list(folder.iterdir()))}").touch()
            if fails:
                raise error

    for _ in range(2):
        with pytest.raises(error):
            attempt(fails=True)
    attempt(fails=False)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a", "a/dest", "a/dest/0", "a/dest/1", "a/dest/2"
    ]  # fmt: skip
    with pytest.raises(UserError, match="exists already"):
        attempt(fails=False)


def test_wrong_input_leaves_nothing_to_go_on_with(tmp_path):
    def attempt():
        with resumable_folder(tmp_path / "dest") as folder:
            (folder / "half").touch()
            raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first_is_right", [True, False])
def test_whoever_comes_second_waits(tmp_path, first_is_right):
    got = []

    def second():
        try:
            with resumable_folder(tmp_path / "dest") as folder:
                got.append(list(folder.iterdir()))
        except UserError as error:
            got.append(str(error))

    thread = threading.Thread(target=second)
    with contextlib.suppress(UserError), resumable_folder(tmp_path / "dest") as folder:
        (folder / "file").touch()
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        if not first_is_right:
            raise UserError("wrong")
    thread.join(10)
    assert len(got) == 1
    assert "exists already" in got[0] if first_is_right else got == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]
