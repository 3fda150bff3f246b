"""Run all checks of a GPU in order of importance, each in its own process with a time limit.

`python -m benchmarks.gpu --seconds N` measures the layers below Ray: `correctness`, `consistency`, beside which
`compiling` runs, `memory`, which needs the whole GPU, then `training` and `sharing`. All train on the same drawn faces.
With `--data FOLDER`, a folder of FER+, a study follows (`ferplus`). A benchmark whose time is over keeps the results
that it has; with `--out FOLDER` they are there, too, as soon as they are written.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import Table
from benchmarks.__main__ import OUT, measure
from benchmarks.training import STORE, faces
from raytune_emotion.storage.atomic import write_text

#: Shares of the time: estimated seconds on an H200.
PARTS = {"correctness": 45, "consistency": 75, "memory": 35, "training": 125, "sharing": 55}
STUDY, _STUDY_SHARE = "ferplus", 185
#: What a study has time for: on an H200 it took 35 s beside its search, and `auto` would measure for as long again.
_OF_STUDY = (
    "--epochs", "2", "--trials", "32", "--seeds", "1", "--search-share", "0.55", "--gpus-per-worker", "0.125",
)  # fmt: skip
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
#: Python runs this module in each process that it starts, also in the children of a benchmark.
_SITE, _NOTE = "sitecustomize.py", "import coverage\ncoverage.process_startup()\n"
#: What is listed: the code with branches for a GPU.
_LISTED = "*/learn/*,*/data/loader.py,*/data/augment.py,*/execution/job.py,*/execution/gpu_sharing.py"


def run(
    seconds: float = _SECONDS, *, coverage: bool = False, data: Path | None = None, weights: Path | None = None
) -> Iterator[Table]:
    """Run the benchmarks; each writes its results.

    Args:
        seconds: for all of them.
        coverage: whether to list the lines with branches for a GPU that the benchmarks without timing have not run.
            It needs the package coverage.
        data: folder of FER+, for a study; None: no study.
        weights: folder of its pretrained weights; None: the hub.

    Yields:
        A table of how each benchmark has ended, after each.
    """
    shares = PARTS if data is None else {**PARTS, STUDY: _STUDY_SHARE}
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        shared = {STORE: str(faces(Path(scratch)))}
        noted = _noting(Path(scratch)) if coverage else {}
        compiled = Path(scratch) / "compiled"
        for number, (name, share) in enumerate(shares.items()):
            # Unused time is left to the others.
            limit = max((until - time.monotonic()) * share / sum([*shares.values()][number:]), 1.0)
            timed = number >= [*shares].index(TIMED)
            if coverage and name == TIMED:
                notes += _lines(noted)
            beside = _start(BESIDE, "--cache", str(compiled), variables=shared) if name == WITH else None
            try:
                own = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)} if timed else noted
                process = _start(name, *_arguments(name, limit, data, weights), variables=shared | own)
                rows.append((name, *_wait(process, limit)))
                if beside is not None:
                    rows.append((BESIDE, *_wait(beside, limit / 2)))
            finally:
                if beside is not None:
                    _end(beside)
            yield Table(("benchmark", "seconds", "ending"), [*rows], [*notes])


def _arguments(name: str, limit: float, data: Path | None, weights: Path | None) -> list[str]:
    """Return the arguments with which a benchmark ends within its limit, seconds."""
    seconds = ["--seconds", f"{limit * (1 - _REST):.0f}"]
    if name == STUDY:
        return [str(data), *seconds, *_OF_STUDY, *(["--weights-dir", str(weights)] if weights is not None else [])]
    return seconds if name == TIMED else []


def _start(name: str, *arguments: str, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a benchmark in a session of its own, which can be ended with all its children.

    Args:
        name: name of the benchmark.
        arguments: its arguments.
        variables: variables of its environment, in addition to those of this process.
    """
    # `python -m benchmarks NAME` passes arguments only to the benchmarks with data.
    module = ["benchmarks", name] if name == STUDY or not arguments else [f"benchmarks.{name}"]
    return subprocess.Popen(
        [sys.executable, "-m", *module, *arguments], start_new_session=True, env={**os.environ, **variables}
    )


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


def _noting(scratch: Path) -> dict[str, str]:
    """Return the variables with which coverage notes the lines that run, in processes and their children."""
    write_text(scratch / "coverage.ini", _COVERAGE.format(scratch=scratch))
    (scratch / "site").mkdir()
    write_text(scratch / "site" / _SITE, _NOTE)
    path = os.pathsep.join([str(scratch / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"COVERAGE_PROCESS_START": str(scratch / "coverage.ini"), "PYTHONPATH": path}


def _lines(noted: Mapping[str, str]) -> list[str]:
    """Return a report of the lines that did not run."""
    settings = f"--rcfile={noted['COVERAGE_PROCESS_START']}"
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", "--quiet", settings], check=False)
    report = [*coverage, "report", "--show-missing", "--skip-covered", f"--include={_LISTED}", settings]
    return subprocess.run(report, check=False, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=_SECONDS, help="for all of them (default: %(default)s)")
    add("--coverage", action="store_true", help="list the lines of the package that did not run")
    add("--data", type=Path, metavar="FOLDER", help="FER+ in AffectNetFused's layout: run a study on it, too")
    add("--weights-dir", type=Path, metavar="FOLDER", help="tf_efficientnet_lite0.safetensors of the study")
    add("--out", type=Path, metavar="FOLDER", help="folder for the results, in addition to benchmarks/results")
    args = parser.parse_args()
    coverage = args.coverage and importlib.util.find_spec("coverage") is not None
    if coverage != args.coverage:
        print("no lines are listed: the package coverage is not installed", file=sys.stderr)
    if args.out is not None:
        os.environ[OUT] = str(args.out.absolute())
    endings: list[object] = []

    def tables() -> Iterator[Table]:
        for table in run(args.seconds, coverage=coverage, data=args.data, weights=args.weights_dir):
            endings[:] = [ending for *_, ending in table.rows]
            yield table

    measure("gpu", tables, shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    return 0 if {*endings} <= {_GOOD, _OUT_OF_TIME} else 1


if __name__ == "__main__":
    sys.exit(main())
