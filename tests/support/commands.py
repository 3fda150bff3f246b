"""Run a command, in this process or in one of its own."""

import contextlib
import signal
import sys

from raytune_emotion.__main__ import main
from tests.support.folders import tree


@contextlib.contextmanager
def started_as(program: str):
    """Have the block run as if this program had been started."""
    before, sys.argv = sys.argv, [program]
    try:
        yield
    finally:
        sys.argv = before


def exit_code(argv) -> int:
    """Run a command in this process, as the console script does."""
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as ended:  # argparse's
        return ended.code


def refusal(capsys, folders, *argv) -> list[str]:
    """Run a command that must refuse and leave the folders as they are, and return its errors."""
    before = [tree(folder) for folder in folders]
    capsys.readouterr()
    assert exit_code(argv) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert out == "" or out.startswith("run ")
    assert [tree(folder) for folder in folders] == before
    return [line.partition("error: ")[2] for line in err.splitlines() if "error: " in line]


def heed_ctrl_c():
    """Listen to Ctrl-C again: a shell makes what it starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
