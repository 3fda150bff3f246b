"""Images a second, in sum, of 1, 2 and 4 trials that train at the same time on one device.

Each trial is a process of its own, as in a study: on a CPU with its share of the cores as threads, on a GPU with its
share of the memory as the most it may take. All numbers of trials take turns, some seconds each, validation included.
Ratios are to one trial, and the median over the turns of those within a turn.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from benchmarks import Table
from benchmarks.training import DEVICE, SETUP, STUDY, config, faces, open_repeated
from raytune_emotion.learn import memory
from raytune_emotion.learn.loop import fit

TRIALS = (1, 2, 4)
BACKBONES = {
    "cpu": {"test_resnet": "fp32", "resnet10t": "fp32"},
    "cuda": {"resnet18": "bf16", "efficientnet_b0": "bf16"},
}
SECONDS = {"cpu": 1.0, "cuda": 3.0}
TURNS = 5

Trial = subprocess.Popen[str]


def run() -> Table:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = faces(Path(scratch))
        for backbone, precision in BACKBONES[DEVICE.type].items():
            turns = _measure(backbone, precision, store)
            for count, rates in turns.items():
                ratios = [rate / one for rate, one in zip(rates, turns[1], strict=True)]
                rows.append((backbone, precision, count, statistics.median(rates), statistics.median(ratios)))
    columns = ("model", "precision", "trials", "images/s in sum", "times one trial")
    notes = [f"{SETUP.size} px, batches of {SETUP.batch}, {TURNS} turns of {SECONDS[DEVICE.type]:g} s."]
    return Table(columns, rows, notes)


def _measure(backbone: str, precision: str, store: Path) -> dict[int, list[float]]:
    """Images a second in every turn, by the number of trials."""
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(_trial(backbone, precision, store)) for _ in range(max(TRIALS))]
        for trial in trials:
            _pipe(trial.stdout).readline()  # it is warm
        turns = [{count: _together(trials[:count]) for count in TRIALS} for _ in range(1 + TURNS)][1:]
    return {count: [turn[count] for turn in turns] for count in TRIALS}


@contextlib.contextmanager
def _trial(backbone: str, precision: str, store: Path) -> Iterator[Trial]:
    command = [sys.executable, "-m", "benchmarks.sharing", backbone, precision, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        _pipe(process.stdin).close()


def _together(trials: list[Trial]) -> float:
    for trial in trials:
        print(max(1, (os.cpu_count() or 1) // len(trials)), file=_pipe(trial.stdin), flush=True)
    return sum(float(_pipe(trial.stdout).readline()) for trial in trials)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _train(backbone: str, precision: str, store: str) -> None:
    """Trains for some seconds whenever a number of threads comes, and answers with the images a second."""
    memory.keep_freed()
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1 / max(TRIALS))
    settings = config(backbone, precision, **STUDY)
    reports = fit(settings, open_repeated(Path(store)), device=DEVICE)
    images = SETUP.rows * SETUP.repeats // settings.train.evals_per_epoch
    next(reports)
    print("warm", flush=True)
    for threads in sys.stdin:
        torch.set_num_threads(int(threads))
        began, trained = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS[DEVICE.type]:
            next(reports)
            trained += images
        print(trained / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    _train(*sys.argv[1:])
