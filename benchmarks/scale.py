"""Measure the driver of a large study: processor time, memory, disk, and the time of its start and resumption.

Nothing is trained, and Ray does not run: 64 or 512 simulated workers write histories as trials do, and report to the
recorder, which writes the real journal and tables and asks the real policy. `ray_share` measures Ray's own share of a
report.
"""

import heapq
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import Table
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.policy.decisions import Policy
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL, Proposal
from raytune_emotion.tuning.study.spec import StudySpec

EPOCHS = 10
#: Samplers with schedulers, numbers of trials at once, and numbers of trials of the studies.
RECORD, DEFAULT = ("random", "none"), ("forecast", "freeze-thaw")
CASES = [
    *((RECORD, 64, trials) for trials in (100, 500, 1000, 2000)),
    (RECORD, 512, 2000),
    *((DEFAULT, 64, trials) for trials in (100, 500, 2000)),
]
SPACE = {
    "model.backbone": {"choice": ["resnet18", "efficientnet_b0", "convnext_tiny", "vit_small_patch16_224"]},
    "model.dropout": {"uniform": [0.0, 0.4]},
    "optim.lr": {"log_uniform": [1e-5, 1e-2]},
    "optim.weight_decay": {"log_uniform": [1e-4, 0.3]},
    "augment.mixup": {"uniform": [0.0, 0.5]},
    "loss": {"simplex": ["mse", "kl", "js"]},
}
_METRICS = (
    "kl", "ce", "tvd", "mse", "l1", "emd", "chebyshev", "clark", "canberra", "cosine", "intersection", "accuracy",
    "emd_va",
)  # fmt: skip


class Clock:
    """Add up the processor time of calls, of all threads or of the calling one."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock, self.seconds, self.slowest = clock, 0.0, 0.0

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            began = self._clock()
            try:
                return call(*args, **named)
            finally:
                took = self._clock() - began
                self.seconds += took
                self.slowest = max(self.slowest, took)

        return timed


class Workers:
    """Simulate trials: each writes its history, and reports after every epoch."""

    def __init__(self, folder: Path, at_once: int, epochs: int) -> None:
        self._folder, self._at_once, self._epochs = folder, at_once, epochs
        self._queue: list[tuple[float, int, Proposal, Iterator[dict[str, Any]]]] = []
        self.now, self._order, self.reports, self.begun = 0.0, 0, 0, 0

    def run(self, recorder: Recorder, clock: Clock, until: Callable[[], bool]) -> None:
        """Run until a condition holds, or the study is over. The clock adds up the recorder's time."""
        next_trial, report = clock(recorder.next), clock(recorder.report)
        write = clock(recorder.write_in_time)
        while not until():
            while len(self._queue) < self._at_once and (proposal := next_trial()) is not None:
                self._push(proposal, self._train(proposal))
            if not self._queue:
                return
            self.now, _, proposal, reports = heapq.heappop(self._queue)
            if report(proposal.trial_id, next(reports)):
                self._push(proposal, reports)
            self.reports += 1
            write()

    def _push(self, proposal: Proposal, reports: Iterator[dict[str, Any]]) -> None:
        self._order += 1
        seconds = 3.0 + self._order % 5
        heapq.heappush(self._queue, (self.now + seconds, self._order, proposal, reports))

    def _train(self, proposal: Proposal) -> Iterator[dict[str, Any]]:
        folder = self._folder / "trials" / proposal.trial_id
        self.begun += not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LAST, BEST):
            (folder / name).write_bytes(b"weights")
        there = (folder / HISTORY).read_text().splitlines() if (folder / HISTORY).exists() else []
        draw = np.random.default_rng([int(proposal.trial_id), 7])
        level = 0.1 + 0.02 * (np.log10(proposal.settings["optim.lr"]) + 3) ** 2 + 0.03 * draw.random()
        done_R = np.arange(1, self._epochs + 1) / self._epochs
        js_R = level + 0.3 * np.exp(-5 * done_R) + 0.003 * draw.random(self._epochs)
        for number in range(len(there) + 1, self._epochs + 1):
            report = make_report(number, js_R, self.now)
            with (folder / HISTORY).open("a") as file:
                file.write(json.dumps(report) + "\n")
            yield report


def make_report(number: int, js_R: npt.NDArray[np.float64], now: float) -> dict[str, Any]:
    """Make a trial's report of this number, with all that a history has, from the JS of all of its reports, [R]."""
    return {
        "report": number, "epoch": float(number), "seconds": 5.0 * number, "finished": number == len(js_R),
        "best_val_js": float(js_R[:number].min()), "val_js": float(js_R[number - 1]), "params_millions": 11.7,
        "images_per_second": 1234.5, "time": now, "train_loss": 0.5, "lr": 1e-3, "accumulate": 1,
        "best_report": int(js_R[:number].argmin()) + 1, **dict.fromkeys((f"val_{m}" for m in _METRICS), 0.123),
    }  # fmt: skip


def measure(case: tuple[tuple[str, str], int, int], epochs: int = EPOCHS) -> tuple[Any, ...]:
    """Run a study until all of its trials have begun, leave it as if it was killed, and resume it."""
    (sampler, scheduler), at_once, trials = case
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        folder, began = Path(scratch) / "study", time.monotonic()
        make_study(folder, spec_of(sampler, scheduler, trials, epochs))
        recorder, clock, policy = Recorder(load(folder)), Clock(), Clock()
        _time_policy(recorder, policy)
        workers = Workers(folder, at_once, epochs)
        workers.run(recorder, clock, lambda: workers.reports > 0)
        first_s = time.monotonic() - began
        workers.run(recorder, clock, lambda: workers.begun >= trials)
        if recorder.error is not None:
            raise recorder.error

        again = time.monotonic()
        recorder = Recorder(load(folder))
        recorder.next()
        resume_s = time.monotonic() - again
        tables = time.monotonic()
        recorder.close()
        tables_s = time.monotonic() - tables
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return (
            f"{sampler}, {scheduler}", at_once, workers.begun, workers.reports, 1000 * clock.seconds / workers.reports,
            1000 * policy.seconds / workers.reports, 1000 * policy.slowest, first_s, resume_s, tables_s,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            size / 1e6, (folder / JOURNAL).stat().st_size / 1e6,
        )  # fmt: skip


def run() -> Table:
    rows = []
    for case in CASES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, case).result())
            print(rows[-1], file=sys.stderr, flush=True)
    return Table(
        (
            "policy", "at once", "trials", "reports", "ms a report", "of it policy", "slowest decision ms",
            "first trial s", "resume s", "tables s", "driver MiB", "folder MB", "journal MB",
        ),
        rows,
        [f"A trial reports up to {EPOCHS} times. Milliseconds are the driver's processor time, over all reports."],
    )  # fmt: skip


def _time_policy(recorder: Recorder, clock: Clock) -> None:
    policy: Policy = recorder._searcher._policy
    policy.next, policy.decide = clock(policy.next), clock(policy.decide)  # type: ignore[method-assign]


def spec_of(sampler: str, scheduler: str, trials: int, epochs: int) -> StudySpec:
    return StudySpec(
        name="study",
        seed=0,
        objective="val_js",
        sampler=sampler,
        scheduler=scheduler,
        trials=trials,
        epochs=epochs,
        concurrency=None,
        workers_per_trial=1,
        gpus_per_worker=1.0,
        max_failures=3,
        data="faces",
        stores={96: "store"},
        fingerprints={96: "0"},
        classes=EMOTIONS,
        weights_dir=None,
        space=SPACE,
        baseline={"js": 0.4},
    )


if __name__ == "__main__":
    kind, at_once, trials, *epochs = sys.argv[1:]
    print(measure((RECORD if kind == "record" else DEFAULT, int(at_once), int(trials)), *map(int, epochs)))
