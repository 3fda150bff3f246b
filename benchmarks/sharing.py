"""Measure the total images per second of 1, 2, 4 and, on a GPU, 8 trials that train at the same time on one device.

Each trial is a separate process, as in a study; on a CPU it has its share of the cores as threads. All numbers of
trials take turns, some seconds each. Ratios are relative to one trial, and are the median over the turns of the ratios
within a turn. `search --gpus-per-worker auto` uses this measurement; the note says what it chooses.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import Table
from benchmarks.training import DEVICE, STUDY, config, faces
from raytune_emotion.learn.throughput import Process, best_count, timing_processes, train_side_by_side

TRIALS = {"cpu": (1, 2, 4), "cuda": (1, 2, 4, 8)}[DEVICE.type]
BACKBONES = {
    "cpu": {"test_resnet": "fp32", "resnet10t": "fp32"},
    "cuda": {"resnet18": "bf16", "efficientnet_b0": "bf16"},
}
BATCHES = {"cpu": (32,), "cuda": (32, 128)}[DEVICE.type]
SECONDS = {"cpu": 1.0, "cuda": 1.0}
TURNS = {"cpu": 5, "cuda": 2}[DEVICE.type]


def run() -> Iterator[Table]:
    columns = ("model", "precision", "batch", "trials", "images/s in sum", "times one trial")
    rows: list[tuple[object, ...]] = []
    notes = [f"{TURNS} turns of {SECONDS[DEVICE.type]:g} s."]
    with (
        tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch,
        timing_processes(max(TRIALS), DEVICE) as trials,
    ):
        store = faces(Path(scratch))
        for batch in BATCHES:
            found = {}
            for backbone, precision in BACKBONES[DEVICE.type].items():
                settings = config(backbone, precision, batch, **STUDY).to_flat()
                for trial in trials:
                    trial.begin(settings, str(store))
                for trial in trials:
                    trial.answer()
                _rate(trials)  # the first time is slower
                turns = [{count: _rate(trials[:count]) for count in TRIALS} for _ in range(TURNS)]
                found[backbone] = {count: statistics.median(turn[count] for turn in turns) for count in TRIALS}
                for count in TRIALS:
                    ratio = statistics.median(turn[count] / turn[1] for turn in turns)
                    rows.append((backbone, precision, batch, count, found[backbone][count], ratio))
                yield Table(columns, [*rows], [*notes])
            notes.append(f"At batch {batch} `auto` chooses {best_count([*found.values()])} trials per device.")
            yield Table(columns, [*rows], [*notes])


def _rate(trials: list[Process]) -> float:
    rate = train_side_by_side(trials, seconds=SECONDS[DEVICE.type], cores=os.cpu_count() or 1)
    return rate if rate is not None else float("nan")
