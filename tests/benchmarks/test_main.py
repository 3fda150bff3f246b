"""The list of benchmarks."""

import importlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from rich.table import Table as RichTable

import benchmarks.__main__
from benchmarks import Table, table_console
from benchmarks.__main__ import NAMES, WITH_DATA, measure_in_folder, run_timed


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_without_arguments(name):
    run = importlib.import_module(f"benchmarks.{name}").run
    signature = inspect.signature(run)
    assert signature.return_annotation in (Table, Iterator[Table])
    assert all(p.default is not p.empty for p in signature.parameters.values())


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_benchmark_that_needs_data_says_so(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(WITH_DATA[name]).main([])
    assert ended.value.code == 2
    assert f"python -m benchmarks {name}: error: the following arguments are required" in capsys.readouterr().err


def test_a_table_in_a_file_holds_every_number_whole(capsys):
    table = RichTable(*(f"share {i}" for i in range(12)))
    cells = [f"0.{i:04d} ±0.0123" for i in range(12)]
    table.add_row(*cells)
    table_console().print(table)
    out = capsys.readouterr().out
    assert all(cell in out for cell in cells)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where results are written."""
    monkeypatch.setattr(benchmarks.__main__, "HERE", tmp_path)
    monkeypatch.setattr(benchmarks.__main__, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(benchmarks.__main__, "_title", lambda name: name)
    monkeypatch.setattr(
        benchmarks.__main__, "_machine", lambda: {"cpu": "some", "cores": 1, "gpu": None, "python": "3"}
    )
    return tmp_path / "results"


def test_what_an_interrupted_benchmark_has_measured_is_kept(results, tmp_path):
    worked_in = []

    def run(work):
        worked_in.append(work)
        yield Table(("seed",), [(0,)])
        yield Table(("seed",), [(0,), (1,)])
        raise KeyboardInterrupt

    for work in (tmp_path / "work", None):
        with pytest.raises(KeyboardInterrupt):
            measure_in_folder("some", ["DATA"], run, work)
        record = json.loads((results / "some.json").read_text())
        assert record["rows"] == [[0], [1]]
        assert record["command"] == "python -m benchmarks some DATA"
    assert worked_in[0] == tmp_path / "work"
    assert [folder.exists() for folder in worked_in] == [True, False]


def test_a_command_whose_time_is_over_ends_in_order(tmp_path, monkeypatch):
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    pathlib.Path(sys.argv[1]).write_text('ended')\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    ended = tmp_path / "ended"
    assert run_timed([sys.executable, "-c", code, str(ended), "0"])[0] == 0
    assert ended.read_text() == ""
    ended.unlink()

    class Quick(subprocess.Popen):
        """A process whose time is over as soon as it handles signals."""

        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            assert timeout == 20
            while not ended.exists() and self.poll() is None:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Quick)
    assert run_timed([sys.executable, "-c", code, str(ended), "60"], seconds=20)[0] == 7
    assert ended.read_text() == "ended"
