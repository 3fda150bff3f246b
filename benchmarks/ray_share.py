"""Measure Ray's share of a report: real actors on one machine with pretended GPUs, which wait in place of training.

The record and the policy are those of `scale`; what the driver's process spends beyond them is Ray Core and Ray Tune.
The processes of Ray beside the driver are measured, too.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from benchmarks import Table
from benchmarks.scale import EPOCHS, RECORD, Clock, make_report, spec_of
from raytune_emotion.learn.run_folder import HISTORY
from raytune_emotion.tuning.execution import runner
from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.placement import Demand
from raytune_emotion.tuning.execution.recorder import Event, Recorder
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.study.open_study import load, make_study

#: Numbers of trials at once, and reports per second of all of them together.
CASES = ((8, 8.0), (8, 32.0), (64, 8.0))
#: Number of reports that are measured.
REPORTS = 1000
#: JS of a trial's reports, bits.
JS_R = np.linspace(0.4, 0.2, EPOCHS)
#: Processes of Ray whose processor time is counted, and parts of their command lines.
_RAY = {"raylet": "raylet/raylet", "gcs": "gcs_server"}


def actor(seconds: float) -> type:
    """Make the class of an actor that waits before each report; it has the methods of `TrialActor`.

    The class is local, so Ray sends it by value: its process imports nothing of the benchmarks, nor PyTorch.
    """
    reports, history = [make_report(number, JS_R, 0.0) for number in range(1, EPOCHS + 1)], HISTORY

    class Waiting:
        def __init__(self, config: dict[str, Any]) -> None:
            self.reset(config)

        def reset(self, config: dict[str, Any]) -> bool:
            self._folder, self._left = Path(config["folder"]), iter(reports)
            self._folder.mkdir(parents=True, exist_ok=True)
            return True

        def train(self) -> dict[str, Any]:
            time.sleep(seconds)
            report = next(self._left)
            with (self._folder / history).open("a") as file:
                file.write(json.dumps(report) + "\n")
            return {"pid": os.getpid(), "host": platform.node(), **report}

        def stop(self) -> None:
            pass

        def get_auto_filled_metrics(self, debug_metrics_only: bool) -> dict[str, Any]:
            return {"pid": os.getpid()}

    return Waiting


class Meter:
    """Note what was spent once all trials have reported, and some reports later."""

    def __init__(self, at_once: int, recorder: Clock) -> None:
        self._at_once, self._recorder = at_once, recorder
        self._reporting, self._reports = set[str](), 0
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.report is None:
            return
        self._reporting.add(event.proposal.trial_id)
        self._reports += bool(self.before)
        if not self.before and len(self._reporting) >= self._at_once:
            self.before = self._read()
        if not self.after and self._reports == REPORTS:
            self.after = self._read()

    def _read(self) -> dict[str, float]:
        driver = psutil.Process()
        spent = {"driver": time.process_time(), "recorder": self._recorder.seconds, "elapsed": time.monotonic()}
        for process in driver.children(recursive=True):
            command = " ".join(process.cmdline())
            for name, part in _RAY.items():
                if part in command:
                    times = process.cpu_times()
                    spent[name] = spent.get(name, 0.0) + times.user + times.system
        return spent | {"memory": driver.memory_info().rss / 2**20}


def measure(at_once: int, rate: float) -> tuple[Any, ...]:
    """Run a study with a number of trials at once, and of reports per second, until enough has been reported."""
    recorder = Clock(time.thread_time)

    class Timed(Recorder):
        next, report = recorder(Recorder.next), recorder(Recorder.report)
        write_in_time = recorder(Recorder.write_in_time)

    meter = Meter(at_once, recorder)
    with (
        tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch,
        patch.object(runner, "Recorder", Timed),
        patch.object(runner, "TrialActor", actor(at_once / rate)),
    ):
        folder = Path(scratch) / "study"
        # The trials at once begin together, and end together unless there are more.
        make_study(folder, spec_of(*RECORD, 2 * at_once + REPORTS // EPOCHS, EPOCHS))
        with ray_session(None, num_cpus=at_once, num_gpus=at_once):
            place = fit_to_cluster(Demand(gpus_per_worker=1.0, concurrency=at_once))
            run_study(StudyRun(load(folder), place, watch=meter))
    spent = {name: 1000 * (after - meter.before[name]) / REPORTS for name, after in meter.after.items()}
    return (
        at_once, 1000 / spent["elapsed"], spent["driver"], spent["recorder"], spent["driver"] - spent["recorder"],
        spent["raylet"], spent["gcs"], meter.after["memory"],
    )  # fmt: skip


def run() -> Table:
    return Table(
        (
            "at once", "reports a second", "ms a report", "of it recorder", "of it Ray", "beside it raylet",
            "beside it gcs", "driver MiB",
        ),
        [measure(*case) for case in CASES],
        [f"Milliseconds of processor time, over {REPORTS} reports after all trials at once have reported."],
    )  # fmt: skip


if __name__ == "__main__":
    print(measure(int(sys.argv[1]), float(sys.argv[2])))
