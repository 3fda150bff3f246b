"""The checks of a GPU: their time, their endings, and what is kept of those that fail."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import Table, __main__, consistency, gpu
from benchmarks.training import Measured, _rows

#: A process with a child, both of which ignore SIGTERM. It prints the number of the child.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def start(code):
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)


def test_a_process_out_of_time_ends_with_its_children(monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE_S", 0.2)
    process = start(STUBBORN)
    child = int(process.stdout.readline())
    seconds, ending = gpu._wait(process, 0.1)
    assert ending == "out of time"
    assert seconds >= 0.1
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def started(monkeypatch):
    """Processes that end at once: `sharing` with an error."""
    calls = {}

    def begin(name, *arguments, **options):
        calls[name] = (arguments, options)
        return start(f"raise SystemExit({int(name == 'sharing')})")

    monkeypatch.setattr(gpu, "_start", begin)
    return calls


def test_each_benchmark_runs_once_and_its_ending_is_told(started, tmp_path):
    *_, table = gpu.run(60.0, data=tmp_path / "faces", weights=tmp_path / "weights")
    assert [(name, ending) for name, _, ending in table.rows] == [
        ("correctness", "ended with code 0"),
        ("consistency", "ended with code 0"),
        ("compiling", "ended with code 0"),
        ("training", "ended with code 0"),
        ("sharing", "ended with code 1"),
        ("ferplus", "ended with code 0"),
    ]
    data, _, seconds, *weights = started["ferplus"][0]
    assert (data, weights) == (str(tmp_path / "faces"), ["--weights-dir", str(tmp_path / "weights")])
    assert 30 < float(seconds) < 60
    # Code that one benchmark has compiled serves the next.
    assert started["compiling"][0] == ("--cache", str(started["training"][1]["compiled"]))


def test_a_benchmark_that_failed_sets_the_exit_code(started, monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda name, tables, command: list(tables()))
    monkeypatch.setattr(sys, "argv", ["gpu", "--seconds", "30"])
    assert gpu.main() == 1


def test_results_before_a_failure_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    monkeypatch.setattr(__main__, "HERE", tmp_path)
    (tmp_path / "some.py").write_text('"""Measure something."""\n')

    def run():
        yield Table(("a",), [(1,)])
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        __main__.measure("some", run, "python -m benchmarks some")
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["rows"] == [[1]]


def test_a_check_that_fails_is_a_row_and_the_next_one_runs(monkeypatch):
    def fail():
        raise RuntimeError("no room")

    row = ("second", "", "", 0.0, "pixels")
    monkeypatch.setattr(consistency, "faces", lambda scratch: scratch)
    monkeypatch.setattr(consistency, "open_store", lambda path: None)
    monkeypatch.setattr(consistency, "_checks", lambda store, scratch: {"first": fail, "second": lambda: [row]})
    first, second = consistency.run()
    assert first.rows == [("first", "", "", "RuntimeError: no room", "failed")]
    assert second.rows == [*first.rows, row]


def test_ways_are_compared_with_the_bases_that_were_measured():
    turns = {"bare": [100.0, 200.0], "plain": [50.0, 50.0], "fit": [200.0, 400.0]}
    *_, fit, single = _rows(Measured("resnet18", "bf16", 32, turns, {"compiling": 3.0}))
    assert fit == ("resnet18", "bf16", 32, "fit", 300.0, 2.0, 2.0, 2.0, 6.0)
    assert single == ("resnet18", "bf16", 32, "compiling", 3.0, "", "", "", "")
