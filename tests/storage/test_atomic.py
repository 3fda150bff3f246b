import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import atomic
from raytune_emotion.storage.atomic import atomic_folder, atomic_write, exclusive_lock, resumable_folder, write_text


def failing(number):
    """A function that fails with an error number of the system."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
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


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """Else a power failure could leave an empty file in place of the old one."""
    path, synced, fsync = tmp_path / "table.csv", [], os.fsync

    def note(fd):
        assert path.read_text() == "old"
        synced.append((os.fstat(fd).st_ino, os.pread(fd, 100, 0)))
        fsync(fd)

    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", note)
    write_text(path, "new")
    assert synced == [(path.stat().st_ino, b"new")]
    assert path.read_text() == "new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_mode_follows_the_umask_whoever_wrote_it(tmp_path, umask, mode):
    tmp_path.chmod(0o1777)
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "weights") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
        write_text(tmp_path / "table.csv", "new")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "weights": mode,
        "table.csv": mode,
    }


def test_file_is_written_where_modes_cannot_change(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_text(tmp_path / "table.csv", "new")
    assert (tmp_path / "table.csv").read_text() == "new"


# Locks


def test_only_one_process_holds_the_lock_of_a_folder(tmp_path):
    with (
        exclusive_lock(tmp_path) as lock,
        pytest.raises(UserError, match="another process is using it"),
        exclusive_lock(tmp_path),
    ):
        pass
    assert lock.is_held()
    assert (tmp_path / ".lock").read_bytes() == b"", "the file system holds it"


def failing_read(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_system_without_locks_is_used_without(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with exclusive_lock(tmp_path) as first, resumable_folder(tmp_path / "dest"):
        assert first.claim()
        with exclusive_lock(tmp_path) as second, exclusive_lock(tmp_path) as third:
            assert first.is_held(), "a process that only looks takes nothing over"
            assert second.claim()
            assert not first.is_held(), "it does not write what the other process writes"
            assert not first.claim()
            assert not third.claim(), "it has read what the second one may have changed"
            assert second.is_held()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "read_bytes", failing_read)
                assert second.is_held(), "a server that fails for a moment gives the lock to nobody"
            (tmp_path / ".lock").unlink()
            assert not second.is_held()
    atomic.sweep(tmp_path, -1, "dest")
    assert (tmp_path / "dest").exists(), "what may be in use is not removed"


REPAIR = "the system or its storage has failed: repair it, and try again"


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.EACCES, UserError, "name a folder that you may write to"),
        (errno.EROFS, UserError, "name a folder that you may write to"),
        (errno.EIO, Breakdown, REPAIR),
        (errno.ESTALE, Breakdown, REPAIR),
        (errno.EMFILE, Breakdown, REPAIR),
    ],
)
def test_lock_that_fails_is_an_error_and_not_a_file_system_without_locks(tmp_path, monkeypatch, number, kind, advice):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    told = rf"^{tmp_path}/\.lock: cannot be locked \({os.strerror(number)}\); {advice}$"
    with pytest.raises(kind, match=told), exclusive_lock(tmp_path):
        pass
    with pytest.raises(OSError, match=os.strerror(number)), resumable_folder(tmp_path / "dest"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_lock_that_has_no_space_is_no_fault_of_the_user(tmp_path, monkeypatch, number):
    monkeypatch.setattr(Path, "open", failing(number))
    told = rf"^{tmp_path}/\.lock: no space left on the disk; free some space, and try again$"
    with pytest.raises(Breakdown, match=told), exclusive_lock(tmp_path):
        pass


def test_lock_of_a_folder_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file"), exclusive_lock(tmp_path / "gone"):
        pass


def test_lock_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: cannot be locked \(Is a directory\)"), exclusive_lock(tmp_path):
        pass


# Folders that are whole or not there


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_leaves_nothing(tmp_path, error):
    def break_off():
        with atomic_folder(tmp_path / "a" / "dest") as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        break_off()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    def lose_the_race():
        with atomic_folder(tmp_path / "dest"):
            (tmp_path / "dest").mkdir()
            (tmp_path / "dest" / "theirs").touch()

    with pytest.raises(UserError, match="exists already"):
        lose_the_race()
    assert [path.name for path in tmp_path.rglob("*")] == ["dest", "theirs"]


def kill_within(block, folder):
    """Kill a process within a block that makes a folder, here or among temporary files, after it has begun a file."""
    script = (
        "import os, pathlib\n"
        "from raytune_emotion.storage.atomic import atomic_folder, scratch_folder\n"
        f"with {block} as made:\n"
        "    (made / 'half').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=False)


def test_a_scratch_folder_is_of_its_user_alone_and_outlives_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_STALE_SECONDS", -1)
    kill_within("scratch_folder()", tmp_path)
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with atomic.scratch_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [*tmp_path.iterdir()] == [folder] != [left]
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_STALE_SECONDS", -1)
    kill_within("atomic_folder(pathlib.Path('dest'))", tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    with atomic_folder(tmp_path / "dest") as first:
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
    thread.join(60)
    assert len(got) == 1
    assert "exists already" in got[0] if first_is_right else got == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]
