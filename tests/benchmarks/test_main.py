"""The list of benchmarks."""

import importlib
import inspect

import pytest
from rich.table import Table as RichTable

from benchmarks import Table, table_console
from benchmarks.__main__ import NAMES, WITH_DATA


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_without_arguments(name):
    run = importlib.import_module(f"benchmarks.{name}").run
    signature = inspect.signature(run)
    assert signature.return_annotation is Table
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
