"""Commands in a child process, with a script in the place of Python."""

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.library.command import run_command


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs a script in the place of a command."""

    def begin(code, *argv):
        file = tmp_path / "script"
        file.write_text(f"#!{python}\nimport os, signal, sys\n{textwrap.dedent(code)}")
        file.chmod(0o700)
        run_command("search", argv)

    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(tmp_path / "script"))
    return begin


def test_the_output_of_a_command_is_printed_where_this_process_prints(script, capsys):
    script("print(*sys.argv[1:]); print('starting Ray', file=sys.stderr); print('no newline', end='')", "--seed=1")
    out, err = capsys.readouterr()
    assert out == "-u -m raytune_emotion.library.command search --seed=1\nno newline\n"
    assert err == "starting Ray\n"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("print('error: --a: bad\\nerror: b: ä', file=sys.stderr); sys.exit(2)", UserError, "--a: bad\nb: ä"),
        ("print('error: full', file=sys.stderr); sys.exit(1)", Breakdown, "full"),
        ("1 / 0", Breakdown, "search: ended with exit code 1; its output above says why"),
        ("os.kill(os.getpid(), 9)", Breakdown, "search: ended with exit code -9; its output above says why"),
        ("sys.exit(130)", KeyboardInterrupt, ""),
    ],
    ids=["2", "1", "traceback", "killed", "130"],
)
def test_an_exit_code_becomes_the_error_of_the_library(script, capsys, code, error, message):
    with pytest.raises(error) as caught:
        script(code)
    assert str(caught.value) == message
    assert ("ZeroDivisionError" in capsys.readouterr().err) == (code == "1 / 0")


def test_an_interrupt_is_handed_on_and_the_command_ends_in_order(script, capsys):
    code = """
        def end(*_):
            print("all is written")
            sys.exit()

        signal.signal(signal.SIGINT, end)
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
    """
    with pytest.raises(KeyboardInterrupt):
        script(code)
    assert capsys.readouterr().out == "all is written\n"


@pytest.mark.parametrize("code", [0, 130])
def test_errors_of_a_command_that_does_not_fail_are_printed(script, capsys, code):
    with contextlib.suppress(KeyboardInterrupt):
        script(f"print('error: the page cannot be written', file=sys.stderr); sys.exit({code})")
    assert capsys.readouterr().err == "error: the page cannot be written\n"


def test_a_command_whose_output_cannot_be_printed_ends_in_order(script, monkeypatch, tmp_path):
    code = f"""
        signal.alarm(20)
        print("begun")
        sys.stdin.read()
        for _ in range(2):
            print("writing")
            sys.stdout.flush()
        open({str(tmp_path / "written")!r}, "w").close()
    """
    nowhere, out = os.pipe()
    os.close(nowhere)
    stream = os.fdopen(out, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(BrokenPipeError):
        script(code)
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert (tmp_path / "written").exists()


def test_a_command_finds_the_modules_that_this_process_finds(script, capsys, monkeypatch, tmp_path):
    (tmp_path / "found_here.py").touch()
    monkeypatch.setattr(sys, "path", [tmp_path, *sys.path])  # a path that imports skip
    monkeypatch.syspath_prepend(tmp_path)
    script("import found_here; print(found_here.__file__)")
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "found_here.py"


def test_a_command_ends_when_its_parent_dies():
    """Then the pipe of its standard input closes."""
    code = """
        import runpy, time
        from raytune_emotion import cli

        def work(verb, argv):
            print(verb, *argv, flush=True)
            time.sleep(600)

        cli.command_main = work
        runpy.run_module("raytune_emotion.library.command", run_name="__main__")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "search", "--seed=1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"search --seed=1\n"
        process.stdin.close()
        assert process.wait(60) == 130
        assert process.stderr.read() == b"interrupted\n"
