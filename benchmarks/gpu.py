"""Run all checks of a GPU in order of importance, each in its own process with a time limit.

`python -m benchmarks.gpu --seconds N` measures the layers below Ray: `correctness` and `consistency`, beside which
`compiling` runs, then `training` and `sharing`.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time

from benchmarks import Table
from benchmarks.__main__ import measure

#: Share of the seconds of each benchmark.
PARTS = {"correctness": 0.2, "consistency": 0.2, "training": 0.42, "sharing": 0.18}
#: Benchmark that runs beside the previous ones, which measure no time.
BESIDE, BEFORE = "compiling", "training"
_SECONDS = 420.0


def run(seconds: float = _SECONDS, *, coverage: bool = False) -> Table:
    """Run the benchmarks of the layers below Ray; each writes its results.

    With coverage, those that measure no time note which lines of the package ran, in files `.coverage.*`.
    """
    rows: list[tuple[object, ...]] = []
    until = time.monotonic() + seconds
    left = 1.0
    beside = _start([sys.executable, "-m", "benchmarks", BESIDE])
    for name, share in PARTS.items():
        # Unused time is left to the others.
        limit = (until - time.monotonic()) * share / left
        left -= share
        noting = ["coverage", "run", "--parallel-mode", "--source=raytune_emotion", "-m"]
        timed = list(PARTS).index(name) >= list(PARTS).index(BEFORE)
        command = [sys.executable, "-m", *(noting if coverage and not timed else []), "benchmarks", name]
        if name == BEFORE:
            rows.append((BESIDE, *_wait(beside, limit / 4)))
            limit = (until - time.monotonic()) * share / (left + share)
            # This benchmark ends by itself between two models, so that its rows are kept.
            command = [sys.executable, "-m", "benchmarks.training", "--seconds", f"{max(limit - 45, 1):.0f}"]
        rows.append((name, *_wait(_start(command), limit)))
    return Table(("benchmark", "seconds", "ending"), rows)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], limit: float) -> tuple[float, str]:
    """Wait for a process, and kill it with all its children when its time is over."""
    began = time.monotonic()
    try:
        ending = f"ended with code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ending = "out of time"
    return time.monotonic() - began, ending


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for all of them (default: %(default)s)")
    parser.add_argument("--coverage", action="store_true", help="note which lines of the package ran")
    args = parser.parse_args()
    seconds = args.seconds
    measure(
        "gpu",
        lambda: run(seconds, coverage=args.coverage),
        shlex.join(["python", "-m", "benchmarks.gpu", "--seconds", f"{seconds:g}"]),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
