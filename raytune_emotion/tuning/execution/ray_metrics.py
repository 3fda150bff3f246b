"""Tell Ray's metrics how a study stands, for Prometheus and the charts of its dashboard."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from ray.util.metrics import Gauge

from raytune_emotion.interruption import run_in_thread
from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.tuning.execution.recorder import Event, Watch
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import Status

#: Ray forgets a gauge that was not set for a minute: so do the charts, once a trial has ended.
_EVERY_S = 5.0

#: Name: what it says, and its tags. Ray writes `ray_` before each name.
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raytune_emotion_best_js": ("Lowest validation JS of the study, bits", ("study",)),
    "raytune_emotion_trials": ("Trials of the study by status", ("study", "status")),
    "raytune_emotion_trial_js": ("Lowest validation JS of a running trial, bits", ("study", "trial")),
    "raytune_emotion_trial_epoch": ("Epochs that a running trial has trained", ("study", "trial")),
    "raytune_emotion_trial_images_per_second": ("Training speed of a running trial", ("study", "trial")),
}


class StudyMetrics:
    """Set the gauges of a study by its events."""

    def __init__(self, study: OpenStudy) -> None:
        """Make the gauges, and begin with what earlier sessions have reached."""
        self._study = study.folder.name
        self._gauges = {name: Gauge(name, about, tags) for name, (about, tags) in METRICS.items()}
        records = study.records()
        # What is called running at the start runs only once this session takes it up.
        self._states: dict[str, Status] = {r.trial_id: r.status for r in records if r.status != "running"}
        self._reached = {r.trial_id: r.best["val_js"] for r in records if r.best and r.status != "failed"}
        self._running: dict[str, Event] = {}
        self._lock = threading.Lock()

    def watch(self, event: Event) -> None:
        """Take in what happened to a trial."""
        trial_id = event.proposal.trial_id
        with self._lock:
            self._states[trial_id] = event.status
            if event.report is not None:
                self._reached[trial_id] = event.report[OBJECTIVE]
            if event.status == "failed":  # it is never the best
                self._reached.pop(trial_id, None)
            self._running.pop(trial_id, None)
            if event.status == "running":
                self._running[trial_id] = event

    def values(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield the name, the tags and the value of each gauge."""
        with self._lock:
            states, reached = Counter(self._states.values()), [*self._reached.values()]
            running = [(trial_id, event.report) for trial_id, event in self._running.items()]
        if reached:
            yield "raytune_emotion_best_js", {}, min(reached)
        for status in get_args(Status):
            yield "raytune_emotion_trials", {"status": status}, float(states[status])
        for trial_id, report in running:
            if report is not None:
                trial = {"trial": trial_id}
                yield "raytune_emotion_trial_js", trial, report[OBJECTIVE]
                yield "raytune_emotion_trial_epoch", trial, report["epoch"]
                yield "raytune_emotion_trial_images_per_second", trial, report["images_per_second"]

    def set_gauges(self) -> None:
        """Set every gauge anew."""
        for name, tags, value in self.values():
            self._gauges[name].set(value, {"study": self._study, **tags})


@contextlib.contextmanager
def study_metrics(study: OpenStudy) -> Iterator[Watch]:
    """Set the gauges of a study every few seconds until the block ends. A cluster that has died changes nothing."""
    metrics, stop = StudyMetrics(study), threading.Event()

    def keep_set() -> None:
        while True:
            with contextlib.suppress(Exception):  # metrics are nothing that a study depends on
                metrics.set_gauges()
            if stop.wait(_EVERY_S):
                return

    ended = run_in_thread("metrics", keep_set)
    try:
        yield metrics.watch
    finally:
        stop.set()
        ended.wait(_EVERY_S)
