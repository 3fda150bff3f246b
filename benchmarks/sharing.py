"""Images a second, in sum, of 1, 2 and 4 trials that train at the same time on one device.

Each trial is a process of its own, as in a study: on a CPU with its share of the cores as threads. All numbers of
trials take turns, some seconds each. Ratios are to one trial, and the median over the turns of those within a turn.
This is what `search --gpus-per-worker auto` goes by.
"""

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks import Table
from benchmarks.training import DEVICE, SETUP, STUDY, config, faces
from raytune_emotion.learn.throughput import Process, processes, together

TRIALS = (1, 2, 4)
BACKBONES = {
    "cpu": {"test_resnet": "fp32", "resnet10t": "fp32"},
    "cuda": {"resnet18": "bf16", "efficientnet_b0": "bf16"},
}
SECONDS = {"cpu": 1.0, "cuda": 3.0}
TURNS = 5


def run() -> Table:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch, processes(max(TRIALS), DEVICE) as trials:
        store = faces(Path(scratch))
        for backbone, precision in BACKBONES[DEVICE.type].items():
            settings = config(backbone, precision, **STUDY).flat()
            for trial in trials:
                trial.begin(settings, str(store))
            for trial in trials:
                trial.answer()
            turns = [{count: _rate(trials[:count]) for count in TRIALS} for _ in range(1 + TURNS)][1:]
            for count in TRIALS:
                ratios = [turn[count] / turn[1] for turn in turns]
                rate = statistics.median(turn[count] for turn in turns)
                rows.append((backbone, precision, count, rate, statistics.median(ratios)))
    columns = ("model", "precision", "trials", "images/s in sum", "times one trial")
    notes = [f"{SETUP.size} px, batches of {SETUP.batch}, {TURNS} turns of {SECONDS[DEVICE.type]:g} s."]
    return Table(columns, rows, notes)


def _rate(trials: list[Process]) -> float:
    return together(trials, seconds=SECONDS[DEVICE.type], cores=os.cpu_count() or 1)
