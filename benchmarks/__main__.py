"""Runs benchmarks by name, or all of them: `python -m benchmarks [NAME …]`."""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import benchmarks
from benchmarks import Table
from raytune_emotion.files import write_text

RESULTS = Path(__file__).parent / "results"
NAMES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    names = parser.parse_args().names or NAMES
    if unknown := sorted({*names} - {*NAMES}):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    console = Console(soft_wrap=True, highlight=False)
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        began = datetime.now(timezone.utc)
        table: Table = module.run()
        took = (datetime.now(timezone.utc) - began).total_seconds()
        _show(console, f"{name}: {str(module.__doc__).splitlines()[0]}", table)
        _write(name, table, began, took)
    return 0


def _show(console: Console, title: str, table: Table) -> None:
    shown = RichTable(*table.columns, title=title, title_justify="left", box=box.SIMPLE)
    for row in table.rows:
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    console.print(shown)
    for note in table.notes:
        console.print(note)


def _write(name: str, table: Table, began: datetime, took: float) -> None:
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", "benchmarks", name]),
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(took, 1),
        "machine": _machine(),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("raytune_emotion", "ray", "optuna", "torch", "timm", "numpy", "pyarrow")
        },
        **dataclasses.asdict(table),
    }
    write_text(RESULTS / f"{name}.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


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
