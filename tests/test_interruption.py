"""How signals end a command: each case in a process of its own."""

import importlib
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from raytune_emotion import interruption
from raytune_emotion.errors import Breakdown
from raytune_emotion.interruption import (
    check_interrupted,
    handle_signals,
    import_meanwhile,
    is_command,
    keep_error,
    run_in_thread,
)

#: Says when it is ready, has heard a signal, and ends. What it writes at its end waits for a line, or for no more.
COMMAND = """
import os, sys, time
from raytune_emotion import interruption
from raytune_emotion.cli import run_guarded
from raytune_emotion.interruption import finish_block, handle_signals

def hear(number, frame, hear=interruption._hear):
    try:
        hear(number, frame)
    finally:
        os.write(1, b"heard\\n")

def action():
    try:
        print("ready", flush=True)
        {work}
    finally:
        print("ends", flush=True)
        sys.stdin.readline()
        print("written", flush=True)

interruption._hear = hear
with handle_signals():
    sys.exit(run_guarded(action))
"""
SLEEP = "time.sleep(600)"


def hear_hangups():
    """Let a child hear SIGHUP, also where the tests themselves run under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(work=SLEEP, prefix=()):
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", COMMAND.format(work=work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_hangups,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def interrupt(process, name, *, ends=False):
    """Send a signal, and wait until the process has heard it, and ends by it."""
    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == "heard\n"
    if ends:
        assert process.stdout.readline() == "ends\n"


def outcome(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_in_order(name):
    process = started()
    interrupt(process, name, ends=True)
    assert outcome(process) == (130, "written\n", "interrupted\n")


def test_an_interrupted_exec_of_text_does_not_change_how_a_command_ended(tmp_path):
    """Python would end by SIGINT, after `-m` alone, though the command has handled the interruption."""
    code = """
        import os, signal, sys
        from raytune_emotion.cli import run_guarded
        from raytune_emotion.interruption import handle_signals

        with handle_signals():
            code = run_guarded(lambda: exec("os.kill(os.getpid(), signal.SIGINT)"))
        sys.exit(code)
    """
    (tmp_path / "interrupted.py").write_text(textwrap.dedent(code))
    path = os.pathsep.join(map(str, [tmp_path, *sys.path]))
    command = [sys.executable, "-m", "interrupted"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_further_signals_do_not_break_off_what_is_written():
    process = started()
    interrupt(process, "SIGINT", ends=True)
    for name in ("SIGTERM", "SIGTERM", "SIGINT"):
        interrupt(process, name)
    assert outcome(process) == (130, "written\n", "interrupted\n")


def test_a_third_ctrl_c_insists():
    process = started()
    interrupt(process, "SIGINT", ends=True)
    for _ in range(2):
        interrupt(process, "SIGINT")
    code, out, _ = outcome(process)
    assert (code, out) == (130, "")


def test_an_interruption_that_a_destructor_has_lost_is_raised_where_it_is_asked_for(monkeypatch):
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with handle_signals():
        check_interrupted()
        Interrupted()
        assert [one.exc_type for one in lost] == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            check_interrupted()


def test_an_interruption_stays_one_though_a_breakdown_follows(capsys):
    with pytest.raises(KeyboardInterrupt), keep_error(KeyboardInterrupt()):
        raise Breakdown("the URI is away")
    assert capsys.readouterr().err == "error: the URI is away\n"
    with pytest.raises(Breakdown, match="alone"), keep_error(None):
        raise Breakdown("alone")


def test_what_must_be_finished_is_before_the_command_ends():
    lines = ["print('within', flush=True)", "sys.stdin.readline()", "print('finished', flush=True)"]
    process = started("\n            ".join(["with finish_block():", *lines]))
    assert process.stdout.readline() == "within\n"
    interrupt(process, "SIGTERM")
    assert outcome(process) == (130, "finished\nends\nwritten\n", "interrupted\n")


def test_sigterm_works_where_ctrl_c_is_ignored_as_in_the_background_of_a_script():
    """A shell without job control has what runs behind `&` ignore Ctrl-C (C7)."""
    script = f"{sys.executable} -c '{COMMAND.format(work=SLEEP)}' & wait $!; echo code $?"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as shell:
        assert shell.stdout.readline() == "ready\n"
        (child,) = map(int, subprocess.run(
            ["pgrep", "-P", str(shell.pid)], capture_output=True, text=True, check=True
        ).stdout.split())  # fmt: skip
        for number in (signal.SIGINT, signal.SIGTERM):
            subprocess.run(["kill", f"-{number.value}", str(child)], check=True)
        assert shell.communicate(timeout=120)[0] == "heard\nends\nwritten\ncode 130\n"


def test_nohup_keeps_a_command_from_ending_with_its_terminal():
    process = started("sys.stdin.readline(); print('done', flush=True)", prefix=["nohup"])
    process.send_signal(signal.SIGHUP)
    code, out, _ = outcome(process)
    assert (code, out) == (0, "done\nends\nwritten\n")


def test_handlers_are_as_before_and_other_threads_change_none():
    code = """
import signal, threading
from raytune_emotion.interruption import handle_signals, keep_handlers
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = [signal.getsignal(number) for number in numbers]
def enter():
    with handle_signals():
        return [signal.getsignal(number) for number in numbers]
assert enter() != before
assert [signal.getsignal(number) for number in numbers] == before
found = []
thread = threading.Thread(target=lambda: found.append(enter()))
thread.start()
thread.join()
assert found == [before]
with keep_handlers():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
assert [signal.getsignal(number) for number in numbers] == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_a_command_is_imported_is_no_traceback(name, tmp_path):
    """The first import after the package itself waits (N6)."""
    (tmp_path / "argparse.py").write_text("import time; print('imports', flush=True); time.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "raytune_emotion.search", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_hangups,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert process.stdout.readline() == "imports\n"
    process.send_signal(getattr(signal, name))
    assert outcome(process) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("python -m raytune_emotion.search --help", True),
        ("python -X utf8 -m raytune_emotion predict", True),
        ("/venv/bin/python /venv/bin/raytune-emotion search", True),
        ("python -m raytune_emotion.learn.throughput", False),
        ("python -m pytest -m raytune_emotion", False),
        ("python script.py raytune-emotion", False),
        ("python", False),
        ("python -m", False),
    ],
)
def test_a_program_that_imports_the_package_is_no_command(words, found):
    assert is_command(words.split()) is found


def test_a_signal_while_python_ends_does_not_change_how_a_command_ended():
    code = """
        import os, signal
        from raytune_emotion.interruption import end_quietly

        class Last:
            def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
                kill(pid, number)

        end_quietly()
        last = Last()  # until Python clears its modules, after it has given up its handlers
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 0


def test_a_thread_can_be_waited_for_after_a_signal():
    """Python 3.11 takes a thread for ended when a signal interrupts its `join`."""
    end = threading.Event()
    ended = run_in_thread("work", lambda: end.wait(600))
    later = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM])
    with handle_signals():
        with pytest.raises(KeyboardInterrupt):
            (later.start(), ended.wait(60))
        assert not ended.wait(0.1)
        end.set()
        assert ended.wait(60)


def test_modules_are_imported_while_a_block_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_at_once.py").write_text("raise OSError")
    go = tmp_path / "go"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists():\n    time.sleep(0.01)\n"
    (tmp_path / "takes_time.py").write_text(f"{wait}loaded = True\n")
    with import_meanwhile("takes_time", "fails_at_once"):
        assert "loaded" not in vars(sys.modules.get("takes_time", object))
        threading.Timer(0.1, go.touch).start()
    assert sys.modules["takes_time"].loaded
    with pytest.raises(OSError):  # noqa: PT011  # it has no text
        importlib.import_module("fails_at_once")


def test_what_an_import_failed_by_at_first_is_told(tmp_path, monkeypatch):
    """PyTorch says of a second attempt that a function has a docstring already."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_by_memory.py").write_text("raise OSError(12, 'Cannot allocate memory')")

    def fail(error):
        with import_meanwhile("fails_by_memory", "not_reached"):
            while any(thread.name == "imports" for thread in threading.enumerate()):
                time.sleep(0.01)
            raise error

    with pytest.raises(OSError, match="Cannot allocate memory") as caught:
        fail(RuntimeError("function already has a docstring"))
    assert "docstring" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="of its own"):
        fail(ValueError("of its own"))


def test_a_signal_that_meets_the_locks_of_imports_comes_again(monkeypatch):
    """Raised there, it would leave the lock of all imports taken."""
    importer = SimpleNamespace(
        f_code=SimpleNamespace(co_filename=importlib._bootstrap._get_module_lock.__code__.co_filename)
    )
    sent = queue.Queue()
    monkeypatch.setattr(interruption.os, "kill", lambda *signal: sent.put(signal))
    with handle_signals():
        interruption._hear(signal.SIGTERM, importer)
    assert sent.get(timeout=60) == (os.getpid(), signal.SIGTERM)


def test_a_process_whose_exit_handlers_would_block_ends_with_its_code_and_its_output():
    script = """
import atexit, time
from raytune_emotion.interruption import end_without_handlers, skip_exit_handlers
atexit.register(time.sleep, 600)
end_without_handlers(1)  # does nothing yet
print("all is said")
skip_exit_handlers()
end_without_handlers(130)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "all is said\n")
