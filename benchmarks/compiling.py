"""Measure the first training step of a compiled model in seconds, with an empty cache of compiled code.

Each model is compiled in its own process, all at the same time. Compilation is worthwhile for a trial if it saves more
time than this.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import Table
from benchmarks.training import COMPILED, SETUP, compiled_run, config, faces, open_repeated


def run() -> Table:
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = str(faces(Path(scratch)))
        empty = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "compiled")}
        processes = {
            (backbone, batch): subprocess.Popen(
                [sys.executable, "-m", "benchmarks.compiling", store, backbone, str(batch)],
                stdout=subprocess.PIPE,
                text=True,
                env=empty,
            )
            for backbone, batch in COMPILED
            if backbone in SETUP.backbones
        }
        rows = [(*key, process.communicate()[0].strip()) for key, process in processes.items()]
    return Table(("model", "batch", "seconds"), rows)


if __name__ == "__main__":
    _, place, name, size = sys.argv
    settings = config(name, SETUP.precisions[-1], int(size))
    print(f"{compiled_run(settings, open_repeated(Path(place)))[1]:.1f}")
