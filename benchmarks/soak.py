"""Measure the growth in a study of many short trials: memory, open files, threads, processes, and time per trial."""

import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks import Table
from benchmarks.engine import make_study, tiny_store
from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.recorder import Event
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import ENDED

TRIALS, EPOCHS = 300, 3
EVERY = 10
#: Number of first trials, in which caches fill and processes start.
WARM = 30
SHOWN = (30, 100, 200, 300)

_COLUMNS = (
    "driver MiB", "trials' MiB", "open files", "threads", "processes", "shared memory files", "shared memory MiB",
    "driver core-s a trial", "seconds a trial",
)  # fmt: skip


def run() -> Table:
    samples: dict[int, tuple[float, ...]] = {}
    before = time.process_time(), time.monotonic()
    ended = 0

    def watch(event: Event) -> None:
        nonlocal ended, before
        if event.status not in ENDED:
            return
        ended += 1
        if ended % EVERY == 0:
            now = time.process_time(), time.monotonic()
            samples[ended] = (*_held(), *((new - old) / EVERY for new, old in zip(now, before, strict=True)))
            before = now

    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        folder = Path(scratch) / "soak"
        make_study(folder, tiny_store(Path(scratch)), trials=TRIALS, epochs=EPOCHS, start=[])
        with ray_session(None, num_cpus=2):
            run_study(StudyRun(load(folder), Placement(Resources(1, 1.0, 0.0), 2, limit=2), watch=watch))

    warm = {ended: sample for ended, sample in samples.items() if ended >= WARM}
    slopes = np.polyfit(np.array([*warm]) / 100, np.array([*warm.values()]), 1)[0]
    rows = [(str(ended), *samples[ended]) for ended in SHOWN]
    return Table(("trials ended", *_COLUMNS), [*rows, ("more with every 100", *map(float, slopes))])


def _held() -> tuple[float, ...]:
    driver = psutil.Process()
    processes = driver.children(recursive=True)
    # The name of such a process says what it does: nothing, or a method of Tune.
    names = ("ray::TrialActor", "ray::ResourceTrainable")
    trials = sum(process.memory_info().rss for process in processes if "".join(process.cmdline()).startswith(names))
    shared = [file.stat().st_size for file in Path("/dev/shm").iterdir()]
    return (
        driver.memory_info().rss / 2**20,
        trials / 2**20,
        driver.num_fds(),
        driver.num_threads(),
        len(processes),
        len(shared),
        sum(shared) / 2**20,
    )
