"""Run all checks of a GPU in order of importance, each in its own process with a time limit.

`python -m benchmarks.gpu --seconds N` measures the layers below Ray: `correctness`, `consistency`, beside which
`compiling` runs, then `training` and `sharing`. With `--data FOLDER`, a folder of FER+, half of the time is for a study
at the end (`ferplus`). A benchmark whose time is over keeps the results that it has.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from benchmarks import Table
from benchmarks.__main__ import measure
from raytune_emotion.storage.atomic import write_text

#: Shares of the time.
PARTS = {"correctness": 0.2, "consistency": 0.2, "training": 0.42, "sharing": 0.18}
STUDY, _STUDY_SHARE = "ferplus", 1.0
#: The benchmark that runs beside another one, which measures no time; and the first one that measures it.
BESIDE, WITH, TIMED = "compiling", "consistency", "training"
_SECONDS = 420.0
#: Of its time, what `training` leaves unused, so that what it has begun ends; and `ferplus`, to pack and to start Ray.
_REST = 0.15
#: From SIGTERM until a process is killed, seconds.
_GRACE_S = 5.0
_GOOD, _OUT_OF_TIME = "ended with code 0", "out of time"
#: Settings of coverage. A benchmark whose time is over is ended by SIGTERM.
_COVERAGE = "[run]\nparallel = true\nsigterm = true\nsource = raytune_emotion\ndata_file = {scratch}/lines\n"
#: What is listed: the code with branches for a GPU.
_LISTED = "*/learn/*,*/data/loader.py,*/data/augment.py"


def run(
    seconds: float = _SECONDS, *, coverage: bool = False, data: Path | None = None, weights: Path | None = None
) -> Iterator[Table]:
    """Run the benchmarks; each writes its results.

    Args:
        seconds: for all of them.
        coverage: whether to list the lines of `learn`, the loader and the augmentation that the benchmarks without
            timing have not run. It needs the package coverage.
        data: folder of FER+, for a study; None: no study.
        weights: folder of its pretrained weights; None: the hub.

    Yields:
        A table of how each benchmark has ended, after each.
    """
    shares = PARTS if data is None else {**PARTS, STUDY: _STUDY_SHARE}
    rows: list[tuple[object, ...]] = []
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        noted, compiled = Path(scratch) / "coverage.ini", Path(scratch) / "compiled"
        write_text(noted, _COVERAGE.format(scratch=scratch))
        for number, (name, share) in enumerate(shares.items()):
            # Unused time is left to the others.
            limit = max((until - time.monotonic()) * share / sum([*shares.values()][number:]), 1.0)
            timed = number >= [*shares].index(TIMED)
            beside = _start(BESIDE, "--cache", str(compiled)) if name == WITH else None
            try:
                process = _start(
                    name,
                    *_arguments(name, limit, data, weights),
                    noted=noted if coverage and not timed else None,
                    compiled=compiled if timed else None,
                )
                rows.append((name, *_wait(process, limit)))
                if beside is not None:
                    rows.append((BESIDE, *_wait(beside, limit / 4)))
            finally:
                if beside is not None:
                    _end(beside)
            yield Table(("benchmark", "seconds", "ending"), [*rows])
        if coverage:
            _list_lines(noted)


def _arguments(name: str, limit: float, data: Path | None, weights: Path | None) -> list[str]:
    """Return the arguments with which a benchmark ends within its limit, seconds."""
    seconds = ["--seconds", f"{limit * (1 - _REST):.0f}"]
    if name == STUDY:
        return [str(data), *seconds, *(["--weights-dir", str(weights)] if weights is not None else [])]
    return seconds if name == TIMED else []


def _start(
    name: str, *arguments: str, noted: Path | None = None, compiled: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a benchmark in a session of its own, which can be ended with all its children.

    Args:
        name: name of the benchmark.
        arguments: its arguments.
        noted: settings of coverage, to note the lines that run; None: they are not noted.
        compiled: folder of compiled code; None: torch's own.
    """
    # `python -m benchmarks NAME` passes arguments only to the benchmarks with data.
    module = ["benchmarks", name] if name == STUDY or not arguments else [f"benchmarks.{name}"]
    noting = ["coverage", "run", f"--rcfile={noted}", "-m"] if noted is not None else []
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)} if compiled is not None else {}
    command = [sys.executable, "-m", *noting, *module, *arguments]
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, **cache})


def _wait(process: subprocess.Popen[bytes], limit: float) -> tuple[float, str]:
    """Wait for a process, and end it with all its children when its time is over."""
    began = time.monotonic()
    try:
        ending = f"ended with code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        ending = _OUT_OF_TIME
    finally:
        _end(process)
    return time.monotonic() - began, ending


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its children."""
    for number, grace in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(grace)
        except ProcessLookupError:  # nothing of it runs
            return
        except subprocess.TimeoutExpired:
            continue


def _list_lines(noted: Path) -> None:
    """Print which lines did not run."""
    for step in (["combine"], ["report", "--show-missing", f"--include={_LISTED}"]):
        subprocess.run([sys.executable, "-m", "coverage", *step, f"--rcfile={noted}"], check=False)


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=_SECONDS, help="for all of them (default: %(default)s)")
    add("--coverage", action="store_true", help="list the lines of the package that did not run")
    add("--data", type=Path, metavar="FOLDER", help="FER+ in AffectNetFused's layout: run a study on it, too")
    add("--weights-dir", type=Path, metavar="FOLDER", help="tf_efficientnet_lite0.safetensors of the study")
    args = parser.parse_args()
    # An exception ends what runs.
    signal.signal(signal.SIGTERM, _stop)
    endings: list[object] = []

    def tables() -> Iterator[Table]:
        for table in run(args.seconds, coverage=args.coverage, data=args.data, weights=args.weights_dir):
            endings[:] = [ending for *_, ending in table.rows]
            yield table

    measure("gpu", tables, shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    return 0 if {*endings} <= {_GOOD, _OUT_OF_TIME} else 1


if __name__ == "__main__":
    sys.exit(main())
