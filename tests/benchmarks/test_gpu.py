"""The checks of a GPU: their time, their endings, and what is kept of those that fail."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import Table, __main__, consistency, ferplus, gpu, training
from benchmarks.training import Measured, _rows, best_batch

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
    monkeypatch.setattr(gpu, "faces", lambda scratch: scratch / "store")
    return calls


def test_each_benchmark_runs_once_and_its_ending_is_told(started, tmp_path):
    *_, table = gpu.run(60.0, data=tmp_path / "faces", weights=tmp_path / "weights")
    assert [(name, ending) for name, _, ending in table.rows] == [
        ("correctness", "ended with code 0"),
        ("consistency", "ended with code 0"),
        ("compiling", "ended with code 0"),
        ("memory", "ended with code 0"),
        ("training", "ended with code 0"),
        ("sharing", "ended with code 1"),
        ("ferplus", "ended with code 0"),
    ]
    data, _, seconds, *_, option, weights = started["ferplus"][0]
    assert (data, option, weights) == (str(tmp_path / "faces"), "--weights-dir", str(tmp_path / "weights"))
    assert 30 < float(seconds) < 60
    variables = {name: options["variables"] for name, (_, options) in started.items()}
    # Code that one benchmark has compiled serves the next, and all have the same faces.
    assert started["compiling"][0] == ("--cache", variables["training"]["TORCHINDUCTOR_CACHE_DIR"])
    assert len({own["BENCHMARKS_STORE"] for own in variables.values()}) == 1


def test_a_study_has_the_arguments_that_it_knows(started, tmp_path, monkeypatch):
    list(gpu.run(60.0, data=tmp_path))
    plans = []
    monkeypatch.setattr(ferplus, "measure_in_folder", lambda name, arguments, run: run(tmp_path))
    monkeypatch.setattr(ferplus, "faces_folder", Path)
    monkeypatch.setattr(ferplus, "study", lambda plan, work: plans.append(plan))
    ferplus.main(started["ferplus"][0])
    (plan,) = plans
    assert (plan.trials, plan.epochs, plan.seeds, plan.search, plan.gpus) == (32, 2, 1, 0.55, "0.125")


def test_lines_are_noted_in_children_before_what_is_timed(started, monkeypatch):
    listed = []
    monkeypatch.setattr(gpu, "_lines", lambda noted: listed.append([*started]) or ["loop.py 7"])
    *_, table = gpu.run(60.0, coverage=True)
    assert table.notes == ["loop.py 7"]
    assert listed == [["correctness", "compiling", "consistency", "memory"]]
    noted = {name for name, (_, options) in started.items() if "COVERAGE_PROCESS_START" in options["variables"]}
    assert noted == {"correctness", "consistency", "memory"}


def test_python_runs_what_notes_the_lines(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "coverage.py").write_text("def process_startup(): print('noting', flush=True)\n")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "other")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", variables["PYTHONPATH"])
        noted = gpu._noting(tmp_path)
    run = subprocess.run([sys.executable, "-c", "pass"], env=variables | noted, capture_output=True, text=True)
    assert run.stdout == "noting\n"


def test_faces_that_are_packed_are_not_packed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARKS_STORE", str(tmp_path / "store"))
    assert training.faces(tmp_path / "scratch") == tmp_path / "store"
    assert [*tmp_path.iterdir()] == []


def test_a_benchmark_that_failed_sets_the_exit_code(started, monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda name, tables, command: list(tables()))
    monkeypatch.setattr(sys, "argv", ["gpu", "--seconds", "30"])
    assert gpu.main() == 1


def test_results_before_a_failure_are_kept_and_the_last_one_is_printed(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "of it"
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    monkeypatch.setattr(__main__, "HERE", tmp_path)
    monkeypatch.setenv("BENCHMARKS_OUT", str(out))
    (tmp_path / "some.py").write_text('"""Measure something."""\n')

    def run():
        yield Table(("a",), [])
        yield Table(("a",), [(1,)])
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        __main__.measure("some", run, "python -m benchmarks some")
    for folder in (tmp_path, out):
        (file,) = folder.glob("*.json")
        assert json.loads(file.read_text())["rows"] == [[1]]
    assert capsys.readouterr().out.count("some: Measure something.") == 1


def test_a_check_that_fails_is_a_row_and_the_next_one_runs(monkeypatch):
    def fail():
        raise RuntimeError("no room")

    row = ("second", "", "", 0.0, "pixels")
    monkeypatch.setattr(consistency, "faces", lambda scratch: scratch)
    monkeypatch.setattr(consistency, "open_store", lambda path: None)
    monkeypatch.setattr(consistency, "_checks", lambda store, scratch: {"first": fail, "second": lambda: [row]})
    found = []
    with pytest.raises(RuntimeError, match="failed: first"):
        found.extend(consistency.run())  # the tables before the error are there
    first, second = found
    assert first.rows == [("first", "", "", "RuntimeError: no room", "failed")]
    assert second.rows == [*first.rows, row]


def test_ways_are_compared_with_the_bases_that_were_measured():
    turns = {"bare": [100.0, 200.0], "plain": [50.0, 50.0], "fit": [200.0, 400.0]}
    *_, fit, single = _rows(Measured("resnet18", "bf16", 32, turns, {"compiling": 3.0}))
    assert fit == ("resnet18", "bf16", 32, "fit", 300.0, 2.0, 2.0, 2.0, 6.0)
    assert single == ("resnet18", "bf16", 32, "compiling", 3.0, "", "", "", "")


@pytest.mark.parametrize(("captured", "times"), [([200.0, 400.0], 1.0), ([math.nan] * 2, 2.0), ([50.0] * 2, 2.0)])
def test_the_faster_bare_loop_is_the_one_to_compare_with(captured, times):
    turns = {"bare": [100.0, 200.0], "bare, captured": captured, "plain": [50.0, 50.0], "fit": [200.0, 400.0]}
    *_, fit = _rows(Measured("resnet18", "bf16", 32, turns, {}))
    assert fit[5] == times


def test_the_best_batch_is_the_smallest_that_is_almost_fastest():
    assert best_batch({128: 900.0, 256: 1000.0, 512: 1010.0}) == 256
    assert best_batch({128: 900.0, 256: 1000.0, 512: 0.0}) == 256  # too little memory
    assert best_batch({128: 900.0, 256: 1000.0, 512: 1100.0}) == 512


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU on which each way has its rate, and the largest batch has no room."""
    begun = []

    def rates(settings, *rest, **options):
        begun.append((settings.model.backbone, settings.train.batch_size))
        if settings.train.batch_size == 512:
            raise RuntimeError("CUDA error: out of memory")
        while True:
            yield float(settings.train.batch_size)

    monkeypatch.setattr(training, "DEVICE", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(training, "SETUP", training.SETUPS["cuda"])
    for name in ("_rates_of_loop", "_rates_of_fit", "_rates_of_compiled"):
        monkeypatch.setattr(training, name, rates)
    for name in ("_bare", "_plain"):
        monkeypatch.setattr(training, name, lambda settings, **options: None)

    def fail(settings):
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(training, "_timm", fail)
    return begun


def test_the_best_batches_are_measured_first_and_a_way_that_fails_is_not_a_number(on_gpu):
    measured = {(m.backbone, m.batch): m for m in training._measure_all(None, math.inf)}
    backbones = training.SETUPS["cuda"].backbones
    assert [*measured] == [(name, 256) for name in backbones] + [(name, 32) for name in backbones]
    best = measured["vit_base_patch16_224", 256]
    assert best.once == {"fit at batch 128": 128.0, "fit at batch 256": 256.0, "fit at batch 512": 0.0}
    assert [*best.turns] == ["bare", "bare, captured", "plain", "fit", "fit of a study", "timm", "fit, compiled"]
    assert [len(rates) for rates in best.turns.values()] == [3] * 7
    assert all(map(math.isnan, best.turns["timm"]))
    assert "fit, compiled" not in measured["resnet18", 256].turns


def test_nothing_is_begun_when_the_time_is_over(on_gpu):
    assert list(training._measure_all(None, 0.0)) == []
    assert on_gpu == []
