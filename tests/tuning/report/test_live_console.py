"""What a running study shows: in a terminal, in a file and in a notebook."""

import dataclasses
import fcntl
import io
import os
import re
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from rich.console import Console

from raytune_emotion.terminal import announce, is_screen
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.report import live_console as console_module
from raytune_emotion.tuning.report.live_console import line_of, show_events, sum_up
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.events import Clock, event
from tests.support.studies import spec_of


@pytest.fixture
def progress(tmp_path, store):
    make_study(tmp_path / "study", spec_of(store, trials=8, epochs=4))
    return StudyProgress(load(tmp_path / "study"), clock=Clock())


def test_a_trial_that_continues_another_says_so():
    ended = event("0032", "complete", 0.07, 8.0)
    assert " continues " not in line_of(ended)
    longer = dataclasses.replace(ended, proposal=dataclasses.replace(ended.proposal, continues="0031"))
    assert line_of(longer).startswith("0032  complete  JS 0.0700 bits after 8 epochs, continues 0031  ")


def test_a_trial_that_failed_after_a_report_says_why():
    # As it comes from another driver: with the newest report.
    assert line_of(event("0003", "failed", 0.4, reason="diverged")).startswith("0003  failed    diverged  ")


#: Two studies on one terminal: one is shown and ends, and the terminal closes below the other.
_ON_TERMINAL = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from raytune_emotion.interruption import finish_block, handle_signals
from raytune_emotion.terminal import plain_console
from raytune_emotion.tuning.report.live_console import show_events
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.events import event
from tests.support.studies import spec_of

folder, console = Path(sys.argv[1]), plain_console()
store = SimpleNamespace(image_size=32, path="s", fingerprint="f")
for name in ("shown", "closed"):
    make_study(folder / name, spec_of(store, trials=8, epochs=4))
with show_events(console, StudyProgress(load(folder / "shown"))) as hear:
    hear(event("0000", "running", 0.3))
    time.sleep(0.6)  # it is drawn four times a second
    hear(event("0000", "failed", reason="[/b] diverged"))
    hear(event("0001", "running", 0.25))
print("the end of the first", flush=True)
with handle_signals():
    try:
        with show_events(console, StudyProgress(load(folder / "closed"))) as hear:
            while True:
                hear(event("0000", "complete", 0.3))
                time.sleep(0.01)
    except KeyboardInterrupt:
        with finish_block():
            console.print("concluded")
            (folder / "concluded").touch()
"""


@pytest.fixture
def terminal(tmp_path):
    """A process with two studies on a terminal of its own, with 80 columns; and our end of the terminal."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)

    def lead_session() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", _ON_TERMINAL, tmp_path], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        preexec_fn=lead_session,
    )  # fmt: skip
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as end:
        yield process, end
    process.kill()  # else it goes on for ever where it does not end by itself
    process.wait()


def read_until(end, word: str) -> str:
    """What a terminal is told until a word."""
    told = b""
    while word.encode() not in told:
        told += end.read(65536)
    return told.decode(errors="replace")


def test_a_terminal_shows_the_view_below_the_lines_of_ended_trials_and_when_it_closes_a_study_ends_in_order(
    terminal, tmp_path
):
    """All that a study still writes and says then is written and said, though nobody hears it."""
    process, end = terminal
    written = read_until(end, "the end of the first").partition("the end of the first")[0]
    assert "\x1b[1A" in written, "nothing was drawn again"
    # Every drawing begins at the label of its first line.
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.rpartition("trials   ")[2])
    assert "● 1 failed" in last
    assert "● 1 running" in last
    assert "0.2500 bits" in last
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written))
    assert any(line.startswith("0000  failed    [/b] diverged") for line in lines)
    assert max(map(len, lines)) <= 80
    assert "\x1b[?25h" in written, "the cursor is shown again"

    read_until(end, "complete")
    end.close()
    assert process.wait(60) == 0
    assert (tmp_path / "concluded").exists()


def test_a_file_and_a_notebook_get_lines(progress):
    file = io.StringIO()
    for forced in (
        Console(file=file, force_terminal=True),  # as by FORCE_COLOR in a job's log
        SimpleNamespace(is_terminal=True, is_jupyter=True, is_dumb_terminal=False, file=SimpleNamespace(isatty=int)),
    ):
        assert not is_screen(forced)
    with show_events(Console(file=file, width=200), progress) as hear:
        hear(event("0000", "running", 0.3))
        hear(event("0000", "complete", 0.3, 4.0))
        hear(event("0001", "running", 0.3, reason="starts anew, as its checkpoint is gone"))
    told, anew = file.getvalue().splitlines(keepends=True)
    assert anew.startswith("0001  running   starts anew, as its checkpoint is gone  ")
    assert told == f"{line_of(event('0000', 'complete', 0.3, 4.0))}\n"


def test_a_file_gets_a_line_on_the_study_now_and_then(progress, monkeypatch):
    file, times = io.StringIO(), iter([0.0, 59.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with show_events(Console(file=file, width=200), progress) as hear:
        hear(event("0000", "running", 0.3))
        assert file.getvalue() == ""
        hear(event("0001", "running"))
        assert file.getvalue() == "after 0 s: 0 of 8 trials ended, 2 at work; best JS 0.3000 bits, trial 0000\n"
        hear(event("0001", "running", 0.4))
    assert file.getvalue().count("after") == 1


def test_a_line_on_the_study_says_rate_and_time_left(progress):
    clock = progress._clock
    progress.watch(event("0000", "running"))
    progress.watch(event("0001", "paused", 0.5))
    clock.now += 60
    progress.watch(event("0000", "complete", 0.3, gain=Gain(0.002, 360.0)))
    assert sum_up(progress.snapshot()) == (
        "after 1 min 00 s: 1 of 8 trials ended, 0 at work, 1 paused; best JS 0.3000 bits, trial 0000; "
        "60 trials an hour; 0.002 bits expected of 6 min 00 s more training (0.02 an hour); about 5 min 24 s left"
    )


def test_a_line_leaves_out_losses_without_weight():
    line = line_of(event("0000", "complete", 0.3))
    assert "kl 1.00" in line
    assert "ce" not in line.replace("complete", "")


def test_work_is_said_as_a_line_where_nothing_can_be_drawn_again(capsys):
    with announce("starting [b]Ray"):
        assert capsys.readouterr() == ("", "starting [b]Ray\n")
    assert capsys.readouterr() == ("", "")


def test_the_line_of_a_paused_trial_that_is_ended_says_so():
    assert "0000  pruned    was paused, and was not resumed" in line_of(event("0000", "pruned"))
