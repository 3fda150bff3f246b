"""Run benchmarks by name, or all except those for a GPU: `python -m benchmarks [NAME …]`.

Some need the user's own data, and are run separately: `python -m benchmarks taskset FOLDER` and
`python -m benchmarks curves FILE… --space SPACE` compare search policies on recorded curves;
`ablation`, `ferplus` and `finishing DATA` train on faces; `continuing STUDY…` reads studies that have ended.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import benchmarks
from benchmarks import Table, table_console
from raytune_emotion.storage.atomic import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: Variable of the environment: a folder in which results are kept, too.
OUT = "BENCHMARKS_OUT"
#: Modules that are only parts of benchmarks.
_PARTS = {"alternatives", "former", "judge", "simulation"}
#: Benchmarks that need the user's own data, with the module whose `main` takes their arguments.
WITH_DATA = {
    "taskset": "benchmarks.taskset",
    "curves": "benchmarks.curves.recorded",
    "ablation": "benchmarks.ablation",
    "ferplus": "benchmarks.ferplus",
    "finishing": "benchmarks.finishing",
    "continuing": "benchmarks.continuing",
}
_MODULES = {module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")}
NAMES = sorted(_MODULES - _PARTS - WITH_DATA.keys())
#: Benchmarks that run only by name: `compiling` and `memory` need a GPU, and `gpu` runs others on one.
_WITH_GPU = {"compiling", "gpu", "memory"}
#: The first benchmark if all are run: `policies` needs its results.
_FIRST = "rivals"


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in WITH_DATA:
        run: Callable[[list[str]], int] = importlib.import_module(WITH_DATA[sys.argv[1]]).main
        return run(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(NAMES)} (default: all but {', '.join(sorted(_WITH_GPU))})",
    )
    names = parser.parse_args().names or sorted({*NAMES} - _WITH_GPU, key=lambda name: (name != _FIRST, name))
    if unknown := sorted({*names} - {*NAMES}):
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    failed = []
    for name in names:
        command = shlex.join(["python", "-m", "benchmarks", name])
        try:
            measure(name, importlib.import_module(f"benchmarks.{name}").run, command)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def measure(name: str, run: Callable[[], Table | Iterator[Table]], command: str) -> None:
    """Run a benchmark, print its table or its growing tables, and save them with its command."""
    found = run()
    _keep(name, [found] if isinstance(found, Table) else found, command)


def _keep(name: str, tables: Iterable[Table], command: str) -> None:
    """Print and save each table of a benchmark. Each replaces the one before, which has fewer results.

    If they are kept elsewhere, too, only the last one is printed, so that little output holds the results of all. It is
    also printed after SIGTERM, as a benchmark gets it whose time is over.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    began, title, brief = datetime.now(timezone.utc), f"{name}: {_title(name)}", OUT in os.environ
    newest: Table | None = None
    try:
        for newest in tables:
            took = (datetime.now(timezone.utc) - began).total_seconds()
            write_result(name, newest, began, took, command)
            if not brief:
                _show(table_console(), title, newest)
    finally:
        signal.signal(signal.SIGTERM, before)
        if brief and newest is not None:
            _show(table_console(), title, newest)


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that needs the user's own data."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def measure_in_folder(
    name: str, arguments: Sequence[str], run: Callable[[Path], Iterator[Table]], work: Path | None = None
) -> None:
    """Run a benchmark in a folder, and save each of its tables, so that an interruption keeps the last one.

    Args:
        name: name of the benchmark.
        arguments: arguments of its command.
        run: yields tables, each with more results than the one before.
        work: the folder; None: a temporary folder, which is deleted at the end.
    """
    command = shlex.join(["python", "-m", "benchmarks", name, *arguments])
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        _keep(name, run(work), command)
        return
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as temporary:
        _keep(name, run(Path(temporary)), command)


def run_timed(command: Sequence[str], seconds: float | None = None) -> tuple[int, float]:
    """Show and run a command; return its exit code and its duration in seconds.

    After `seconds`, SIGTERM asks the command to end in order. A job in the background often ignores SIGINT.
    """
    print(shlex.join(command), flush=True)
    began = time.monotonic()
    with subprocess.Popen(command) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode, time.monotonic() - began


def _title(name: str) -> str:
    """Return the first line of a benchmark's docstring, without importing it."""
    return str(ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()))).splitlines()[0]


def _show(console: Console, title: str, table: Table) -> None:
    shown = RichTable(*table.columns, title=title, title_justify="left", box=box.SIMPLE)
    for row in table.rows:
        shown.add_row(*map(_text, row))
    console.print(shown)
    for note in table.notes:
        console.print(note)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_result(name: str, table: Table, began: datetime, took: float, command: str) -> None:
    """Save a table with a description of the machine, and write the page of all results."""
    machine = _machine()
    record = {
        "benchmark": name,
        "command": command,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(took, 1),
        "machine": machine,
        "versions": _versions(),
        **dataclasses.asdict(table),
    }
    # Results of a machine with a GPU do not replace those of one without.
    file = "-".join([Path(name).name, *str(machine["gpu"] or "").lower().split()])
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    for folder in (RESULTS, *map(Path, filter(None, [os.environ.get(OUT)]))):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{file}.json", text)
    write_text(HERE / "RESULTS.md", _report())


def _report() -> str:
    """Return all results as one page."""
    parts = ["# Results of the benchmarks\n\nWritten by `python -m benchmarks` out of `results/`.\n"]
    for file in sorted(RESULTS.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        machine, columns, rows = record["machine"], record["columns"], record["rows"]
        device = machine["gpu"] or "no GPU"
        parts.append(
            f"## {file.stem}\n\n{_title(record['benchmark'])}\n\n"
            f"`{record['command']}`, {record['began'][:10]}, {record['seconds']:.0f} s: {device}, {machine['cores']} "
            f"cores of {machine['cpu']}, Python {machine['python']}, torch {record['versions']['torch']}.\n"
        )
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append("".join(f"| {' | '.join(_text(value).strip() for value in line)} |\n" for line in lines))
        if record["notes"]:
            parts.append(" ".join(record["notes"]) + "\n")
    return "\n".join(parts)


def _versions() -> dict[str, str]:
    """Return the versions of installed packages. Benchmarks of the lower layers need neither Ray nor Optuna."""
    versions = {}
    for package in ("raytune_emotion", "ray", "optuna", "torch", "timm", "numpy", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
