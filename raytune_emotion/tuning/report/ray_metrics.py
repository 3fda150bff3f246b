"""Tell Ray's metrics how a study stands, for Prometheus and the charts of its dashboard."""

import contextlib
import threading
from collections.abc import Iterator

from ray.util.metrics import Gauge

from raytune_emotion.interruption import run_in_thread
from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.tuning.report.live_state import Snapshot, StudyProgress

#: Ray drops a gauge after a minute without an update. So the values of an ended trial leave the charts.
_EVERY_S = 5.0

#: Name: what it says, and its tags. Ray writes `ray_` before each name.
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "raytune_emotion_best_js": ("Lowest validation JS of the study, bits", ("study",)),
    "raytune_emotion_trials": ("Trials of the study by status", ("study", "status")),
    "raytune_emotion_trial_js": ("Lowest validation JS of a running trial, bits", ("study", "trial")),
    "raytune_emotion_trial_epoch": ("Epochs that a running trial has trained", ("study", "trial")),
    "raytune_emotion_trial_images_per_second": ("Training speed of a running trial", ("study", "trial")),
}


def values_of(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield the name, the tags and the value of each gauge."""
    if snapshot.summary.best is not None:
        yield "raytune_emotion_best_js", {}, snapshot.summary.best.val_js
    for status, trials in snapshot.summary.trials.items():
        yield "raytune_emotion_trials", {"status": status}, float(trials)
    for trial in snapshot.at_work:
        if trial.report is not None:
            tags = {"trial": trial.proposal.trial_id}
            yield "raytune_emotion_trial_js", tags, trial.report[OBJECTIVE]
            yield "raytune_emotion_trial_epoch", tags, trial.report["epoch"]
            yield "raytune_emotion_trial_images_per_second", tags, trial.report["images_per_second"]


@contextlib.contextmanager
def study_metrics(progress: StudyProgress) -> Iterator[None]:
    """Set the gauges of a study every few seconds until the block ends. A cluster that has died changes nothing."""
    gauges = {name: Gauge(name, about, tags) for name, (about, tags) in METRICS.items()}
    stop = threading.Event()

    def set_gauges() -> None:
        snapshot = progress.snapshot()
        for name, tags, value in values_of(snapshot):
            gauges[name].set(value, {"study": snapshot.summary.study, **tags})

    def keep_set() -> None:
        while True:
            with contextlib.suppress(Exception):  # metrics are nothing that a study depends on
                set_gauges()
            if stop.wait(_EVERY_S):
                return

    ended = run_in_thread("metrics", keep_set)
    try:
        yield
    finally:
        stop.set()
        ended.wait(_EVERY_S)
