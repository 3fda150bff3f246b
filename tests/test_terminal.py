"""Text on the console: nothing from outside is markup, and every output goes through one module."""

import ast
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

import raytune_emotion
from raytune_emotion import terminal
from raytune_emotion.cli import COMMANDS
from raytune_emotion.terminal import (
    byte_size,
    count,
    escape,
    plain_console,
    plain_table,
    shell_word,
    short_path,
    typed_command,
    typed_options,
    warn,
)
from tests.support.commands import started_as

ROOT = Path(raytune_emotion.__file__).parent

#: Texts that came from outside, or may: a closing tag, a source line, an emoji code, a link.
HOSTILE = (
    "RuntimeError: [/w/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234",
    "[enforce fail at alloc_cpu.cpp:118] err == 0",
    "results/[old]/a[/b]/:smiley:",
    "[link=file:///etc]click[/link]",
)


def printed(*things, monkeypatch) -> str:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    for thing in things:
        plain_console().print(thing)
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_no_markup(text, monkeypatch):
    assert printed(text, monkeypatch=monkeypatch) == f"{text}\n"
    table = plain_table("heading", title=text)
    table.add_row(text)
    told = "".join(printed(table, monkeypatch=monkeypatch).split())  # long lines are broken
    assert told.count("".join(text.split())) == 2
    console = plain_console()
    console.file = out = io.StringIO()
    with Progress("{task.description}", console=console) as bars:
        bars.add_task(text)
    assert text[:60] in out.getvalue()


def test_a_reader_that_has_had_enough_ends_nothing(tmp_path):
    read, write = os.pipe()
    os.close(read)
    console = plain_console()
    with os.fdopen(write, "w") as console.file:
        for _ in range(3):
            console.print("a line")


def test_a_reader_of_the_errors_that_has_ended_ends_nothing(monkeypatch):
    """Ctrl-C also ends the `tee` of a pipeline, and the command must still end with its own code."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        warn("interrupted")
        warn("and more")


def test_control_characters_and_broken_names_are_shown_and_not_obeyed(monkeypatch):
    assert (
        escape("\x1b[33m(raylet)\x1b[0m a\x07b\x1b]0;title\x07\r\n\tc")
        == "(raylet) a\\x07b\\x1b]0;title\\x07\\x0d\n\tc"
    )
    name = os.fsdecode(b"caf\xe9")
    assert escape(name) == "caf\\udce9"
    assert printed(name, monkeypatch=monkeypatch) == "caf\\udce9\n"


def test_a_number_has_its_noun():
    assert [count(n, "trial") for n in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]
    assert [count(n, "epoch") for n in (0.5, 1.0, 2.0)] == ["0.5 epochs", "1 epoch", "2 epochs"]


def test_sizes_are_written_as_people_read_them():
    assert [byte_size(n) for n in (0, 999, 1000, 24_300_000, 5.63e10, 2e12)] == [
        "0 B", "999 B", "1 kB", "24.3 MB", "56.3 GB", "2 TB"
    ]  # fmt: skip


def test_a_path_is_relative_below_the_working_folder_and_absolute_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    below = tmp_path / "ray results" / "mine"
    assert short_path(below) == short_path(Path("ray results/mine")) == "ray results/mine"
    assert short_path(tmp_path) == "."
    assert short_path(Path("/elsewhere/mine")) == "/elsewhere/mine"
    assert shlex.split(shell_word(below)) == ["ray results/mine"]
    assert shell_word("s3://bucket/a b") == "'s3://bucket/a b'"


def test_a_working_folder_that_is_gone_is_no_error(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
    code += "from pathlib import Path; from raytune_emotion.terminal import short_path\n"
    code += "print(short_path(Path('/a/b')), short_path(Path('a')))"
    env = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "/a/b a\n"


#: Modules that write what a program reads, or the log of their own process.
_FOR_PROGRAMS = {
    "terminal.py",
    "predict.py",  # CSV
    "storage/remote.py",  # to the process that asked
    "learn/throughput.py",  # likewise
    "tuning/execution/trial_actor.py",  # the log
    "tuning/space/json_schema.py",  # JSON
}


def calls_of(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_output_goes_through_the_terminal_module(module):
    """A console, a table or a column that reads markup is made nowhere else, so that no text can become markup."""
    if str(module.relative_to(ROOT)) in _FOR_PROGRAMS:
        return
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for name, call in calls_of(tree):
        where = f"{module.relative_to(ROOT)}:{call.lineno}"
        last = name.rpartition(".")[2]
        assert last not in ("Console", "Table", "TextColumn", "from_markup", "render_markup", "Panel"), where
        assert name != "print", f"{where}: terminal.say and terminal.warn print"
        assert not any(word.arg in ("markup", "emoji") for word in call.keywords), where


def test_the_console_is_the_only_one():
    assert not plain_console()._markup
    assert terminal.plain_console(stderr=True).stderr


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/venv/bin/raytune-emotion", "raytune-emotion predict"),
        ("/clone/raytune_emotion/search.py", "python -m raytune_emotion.predict"),
        ("/clone/raytune_emotion/__main__.py", "python -m raytune_emotion.predict"),
        ("ipykernel_launcher.py", "python -m raytune_emotion.predict"),
    ],
)
def test_a_command_is_typed_as_the_one_that_runs_was(program, command):
    with started_as(program):
        assert typed_command("predict") == command


def test_no_module_has_the_words_of_a_command_of_its_own():
    """So that what is printed is what can be typed here; the exports' texts name the script, which is everywhere."""
    found = [
        f"{module.relative_to(ROOT)}: {line.strip()}"
        for module in ROOT.rglob("*.py")
        for line in module.read_text(encoding="utf-8").splitlines()
        if re.search(rf"python -m raytune_emotion.({'|'.join(COMMANDS)})\b", line) and '"""' not in line
    ]
    assert found == []


def test_options_are_typed_as_a_shell_reads_them():
    text = typed_options(top=3, gpus_per_worker=0.5, address=None, results="my results")
    assert text == " --top 3 --gpus-per-worker 0.5 --results 'my results'"
    assert typed_options(address=None) == ""
    assert typed_options(finish=True, skip_bad=False, epochs=0) == " --finish --epochs 0"
