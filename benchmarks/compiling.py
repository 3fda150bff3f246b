"""Measure the first training step of a compiled model in seconds, with an empty cache of compiled code.

Each model is compiled in its own process, all at the same time. Compilation is worthwhile for a trial if it saves more
time than this. With --cache FOLDER the compiled code is kept there, for a benchmark that follows.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Table
from benchmarks.__main__ import measure
from benchmarks.training import COMPILED, SETUP, compiled_run, config, faces, open_repeated


def run(cache: Path | None = None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = str(faces(Path(scratch)))
        empty = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or Path(scratch) / "compiled")}
        processes = {
            (backbone, batch): subprocess.Popen(
                [sys.executable, "-m", "benchmarks.compiling", "--one", store, backbone, str(batch)],
                stdout=subprocess.PIPE,
                text=True,
                env=empty,
            )
            for backbone, batch in COMPILED
            if backbone in SETUP.backbones
        }
        rows: list[tuple[object, ...]] = []
        failed = 0
        for key, process in processes.items():
            told = process.communicate()[0].strip()
            rows.append((*key, f"ended with code {process.returncode}" if process.returncode else told))
            failed += process.returncode != 0
            yield Table(("model", "batch", "seconds"), [*rows])
        if failed:
            raise RuntimeError(f"{failed} of {len(rows)} models were not compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="empty folder that keeps the compiled code")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # in a process that compiles
    args = parser.parse_args()
    if args.one is None:
        command = shlex.join(["python", "-m", "benchmarks", "compiling"])
        measure("compiling", lambda: run(args.cache), command)
        return 0
    place, name, size = args.one
    settings = config(name, SETUP.precisions[-1], int(size))
    print(f"{compiled_run(settings, open_repeated(Path(place)))[1]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
