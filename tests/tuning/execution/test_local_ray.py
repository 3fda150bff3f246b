"""Ray on this machine, for one process: its folder, its token, its limits."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.execution import cluster, local_ray
from raytune_emotion.tuning.execution.local_ray import base_folder, low_limits, raise_limits


@pytest.fixture(autouse=True)
def environment(no_cluster, monkeypatch):
    """No temporary folder is named, and what a test changes in the environment is undone."""
    for name in ("RAY_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def short(monkeypatch):
    """A folder with a short path, for Ray's files."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert left == []


def test_a_temporary_folder_with_a_long_path_is_passed_over(monkeypatch, tmp_path, short):
    assert base_folder() == short
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 50)))
    assert base_folder() == Path("/tmp")
    monkeypatch.setenv("TMPDIR", str(short))
    assert base_folder() == short


def test_no_folder_that_can_be_used_is_one_sentence(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch/" + "job" * 20)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError) as caught:
        base_folder()
    (told,) = caught.value.faults
    assert told.startswith("no folder for Ray's sockets: TMPDIR=/scratch/jobjob")
    assert told.endswith("/dev/shm is not a writable folder; set RAY_TMPDIR to a writable, short path")


@pytest.mark.parametrize("writable", ["/var/tmp", "/run", "/dev/shm"])
def test_another_folder_is_used_if_the_usual_one_is_not_writable(monkeypatch, writable):
    monkeypatch.setenv("TMPDIR", "/scratch/" + "job" * 20)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) == writable)
    assert base_folder() == Path(writable)


def test_a_relative_path_becomes_absolute(monkeypatch, short):
    """Ray refuses a relative path."""
    monkeypatch.chdir(short.parent)
    monkeypatch.setenv("RAY_TMPDIR", short.name)
    assert base_folder() == short


def test_a_token_is_for_its_owner_alone_and_lives_with_the_session(short):
    os.environ["RAY_AUTH_TOKEN"] = "of another cluster"
    old = os.umask(0o000)
    try:
        with local_ray.local_ray() as arguments:
            folder = Path(arguments["_temp_dir"])
            token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert token.parent == folder
            assert (folder.stat().st_mode & 0o777, token.stat().st_mode & 0o777) == (0o700, 0o600)
            assert len(token.read_text()) == 64
            assert "RAY_AUTH_TOKEN" not in os.environ
            assert len(str(folder)) <= local_ray._LONGEST
    finally:
        os.umask(old)
    assert not folder.exists()


@pytest.mark.parametrize(("error", "kept"), [(RuntimeError, True), (KeyboardInterrupt, False), (UserError, False)])
def test_logs_of_a_session_that_broke_are_kept_without_its_token(short, capsys, error, kept):
    folders = []

    def break_off():
        with local_ray.local_ray() as arguments:
            folders.append(Path(arguments["_temp_dir"]))
            (folders[0] / "raylet.err").write_text("it died")
            raise error("so it is")

    with pytest.raises(error):
        break_off()
    (folder,) = folders
    assert (folder / "raylet.err").exists() == kept
    assert not (folder / "auth_token").exists()
    assert capsys.readouterr().err == (f"Ray's logs are kept in {folder}\n" if kept else "")
    if kept:
        (folder / "raylet.err").unlink()
        folder.rmdir()


def test_soft_limits_are_raised_as_far_as_ray_needs_and_low_ones_are_named():
    code = """
        import resource
        from raytune_emotion.tuning.execution.local_ray import low_limits, raise_limits
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000))
        raise_limits()
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
        print(low_limits())
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
        raise_limits()
        print(low_limits())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "(2000, 2000)"
    assert lines[1] == "this process may have 2000 open files (`ulimit -n`)"
    assert lines[2] == "this process may have 300 open files (`ulimit -n`)"


def test_a_system_without_these_limits_has_no_low_ones(monkeypatch):
    monkeypatch.setattr(local_ray, "_LIMITS", [("RLIMIT_OF_ANOTHER_SYSTEM", "ulimit", "things", 2**62)])
    raise_limits()
    assert low_limits() == ""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            Exception("The current node timed out during startup. This could happen"),
            "The current node timed out during",
        ),
        (RuntimeError("can't start new thread"), "the system starts no more processes or threads"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable; the system"),
        (OSError("validate_socket_filename failed: AF_UNIX path"), "validate_socket_filename failed: AF_UNIX path"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_start_that_fails_is_a_sentence_that_names_low_limits(monkeypatch, short, raised, said):
    def fail(**arguments):
        raise raised

    monkeypatch.setattr(cluster.ray, "init", fail)
    monkeypatch.setattr(cluster, "_shut_down", lambda: None)
    monkeypatch.setattr(cluster, "low_limits", lambda: "this process may have 300 processes and threads (`ulimit -u`)")
    before = dict(os.environ)
    with pytest.raises(UserError) as caught, cluster.ray_session(None):
        pass
    (told,) = caught.value.faults
    assert told.startswith(f"Ray cannot be started on this machine: {said}")
    assert told.endswith(
        "; this process may have 300 processes and threads (`ulimit -u`), which may be too few; raise the limit"
    )
    assert dict(os.environ) == before
    assert list(short.iterdir()) == []


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError("No running Ray.\nmore"), "the Ray cluster there cannot be joined (No running Ray.)"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12.1\nThis"),
            "Version mismatch: The cluster was started with: Ray: 2.59.0 Python: 3.12.1 This Use the",
        ),
        (
            because(ConnectionError("Failed to connect"), RuntimeError("No node info found matching attributes: ''")),
            "this machine is no node of that cluster; run the command on one of its nodes, or submit a search with ",
        ),
        (cluster.AuthenticationError("no token"), "the cluster asks for a token; export RAY_AUTH_MODE=token"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_cluster_that_cannot_be_joined_is_a_sentence(monkeypatch, raised, said):
    def fail(**arguments):
        raise raised

    monkeypatch.setattr(cluster.ray, "init", fail)
    monkeypatch.setattr(cluster, "_shut_down", lambda: None)
    with pytest.raises(UserError) as caught, cluster.ray_session("10.0.0.1:6379"):
        pass
    (told,) = caught.value.faults
    assert told.startswith(f"--address 10.0.0.1:6379: {said}")
    assert "\n" not in told


def test_ray_that_runs_in_this_process_already_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="Ray already runs in this process"), cluster.ray_session(None):
        pass


def test_a_user_without_a_home_can_import_ray_tune_and_shares_no_cache_with_others(tmp_path):
    code = """
        import pwd

        def unknown(uid):
            raise KeyError(uid)

        pwd.getpwuid = unknown
        from raytune_emotion.storage.cache import cache_folder
        before = cache_folder()
        import raytune_emotion.tuning
        import ray.tune
        assert cache_folder() == before
        print(before)
    """
    surroundings = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
        env=surroundings | {"TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == ("", 0)
    private = tmp_path / f"raytune_emotion-{os.getuid()}"
    assert Path(done.stdout.strip()) == private / ".cache" / "raytune_emotion"
    assert private.stat().st_mode & 0o777 == 0o700


def test_the_next_session_deletes_the_folder_of_one_that_was_killed(short, request):
    """Not that of one that runs, nor logs that are kept."""
    session = (
        "import os, sys, time\n"
        "from raytune_emotion.tuning.execution.local_ray import local_ray\n"
        "with local_ray() as arguments:\n"
        "    print(arguments['_temp_dir'], flush=True)\n"
        "    time.sleep(600)\n"
    )
    sessions = [subprocess.Popen([sys.executable, "-c", session], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in sessions:
        request.addfinalizer(process.kill)
    killed, runs = (Path(process.stdout.readline().strip()) for process in sessions)
    sessions[0].kill()
    sessions[0].wait()
    (short / "rte-logs").mkdir()
    assert {killed, runs} <= {*short.iterdir()}
    with local_ray.local_ray() as arguments:
        assert {*short.iterdir()} == {runs, short / "rte-logs", Path(arguments["_temp_dir"])}
    sessions[1].terminate()
    sessions[1].wait()
    with contextlib.suppress(ZeroDivisionError), local_ray.local_ray() as arguments:
        (Path(arguments["_temp_dir"]) / "log").touch()
        raise ZeroDivisionError
    kept = Path(arguments["_temp_dir"])
    assert [file.name for file in kept.iterdir()] == ["log"]
    with local_ray.local_ray() as arguments:
        assert kept.exists()
    for folder in short.iterdir():
        shutil.rmtree(folder)
