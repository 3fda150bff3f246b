"""Log a running study to MLflow: a run for the study with a child run for each trial.

Only this module imports MLflow. The log is written in a thread of the driver. A failed request is repeated later, and
the study never waits for the server.
"""

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raytune_emotion.interruption import run_in_thread
from raytune_emotion.known_errors import first_line
from raytune_emotion.learn.report import DRIVER_KEYS, OBJECTIVE
from raytune_emotion.learn.run_folder import read_history
from raytune_emotion.terminal import warn
from raytune_emotion.tuning.execution.recorder import Event, Watch
from raytune_emotion.tuning.study.database import split_address
from raytune_emotion.tuning.study.drivers import one_at_a_time
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.records import winner
from raytune_emotion.tuning.study.spec import SPEC, created_at

EXPERIMENT = "raytune_emotion"
#: Tags by which a resumed study finds its runs. Another study may have had the same name before.
STUDY_TAG, CREATED_TAG, TRIAL_TAG = "raytune_emotion.study", "raytune_emotion.created", "raytune_emotion.trial"
#: Seconds between two attempts at a failed request, and longest time for the remaining requests at the end.
_AGAIN_S, _END_S = 5.0, 30.0
#: Largest number of metrics that MLflow accepts at once.
_BATCH = 1000
#: Environment variables that MLflow reads. It has no arguments for them.
_MLFLOW_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
#: Keys of the position of a report.
_AT = ("report", "time", "epoch")
_RUN_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "paused": "SCHEDULED"}


@contextlib.contextmanager
def mlflow_log(uri: str, study: OpenStudy) -> Iterator[Watch]:
    """Log a study until the block ends, and then the export in its folder."""
    log = _Log(uri, study)
    thread = _Thread(uri)
    thread.do(log.begin)
    try:
        yield lambda event: thread.do(lambda: log.take(event))
    finally:
        thread.do(log.end)
        thread.close()


class _Thread:
    """Run actions one after the other in a thread. A failed action is repeated."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._left: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._closes, self._until = threading.Event(), math.inf  # time at which a closed log gives up
        self._ended = run_in_thread("mlflow", self._work)

    def do(self, action: Callable[[], None]) -> None:
        self._left.put(action)

    def close(self) -> None:
        """Give the remaining actions some time."""
        self._left.put(None)
        self._until = time.monotonic() + _END_S
        self._closes.set()
        if not self._ended.wait(_END_S) or not self._left.empty():
            warn(f"--mlflow {self._uri}: the log is incomplete; the study's own files are not affected")

    def _work(self) -> None:
        said = False
        while (action := self._left.get()) is not None:
            while not self._try(action, said=said):
                said = True
                if self._closes.wait(_AGAIN_S):
                    time.sleep(min(_AGAIN_S, 1.0))
                if time.monotonic() >= self._until:
                    return

    def _try(self, action: Callable[[], None], *, said: bool) -> bool:
        try:
            action()
        except Exception as error:  # any error of MLflow: the study continues
            if not said:
                warn(f"--mlflow {self._uri}: {_reason(error)}; the study continues, and this request is repeated")
            return False
        return True


def _reason(error: BaseException) -> str:
    """Return why a request failed: that of the system, if a connection failed, which libraries wrap several times."""
    innermost = error
    while (inner := innermost.__cause__ or innermost.__context__) is not None:
        innermost = inner
    if isinstance(innermost, OSError):
        return innermost.strerror or first_line(innermost)
    return first_line(error)


class _Log:
    """Write the runs of one study. Only one thread calls it, and a failed method can be called again."""

    def __init__(self, uri: str, study: OpenStudy) -> None:
        self._uri, self._study, self._name = uri, study, study.folder.name
        self._client: Any = None
        self._experiment = self._parent = ""
        self._runs: dict[str, str] = {}  # run of each trial whose parameters are logged
        self._best = float("inf")

    def begin(self) -> None:
        """Make the study's run, or continue it."""
        for name, value in _MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        address = self._study.spec.storage
        # Drivers that begin at once would make a run each. The lock has a connection of its own: that of the driver
        # must not wait for a server of MLflow.
        with one_at_a_time(split_address(address)[0], f"{address}/mlflow") if address else contextlib.nullcontext():
            self._find_or_make()

    def _find_or_make(self) -> None:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        self._experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        created = created_at((self._study.folder / SPEC).read_bytes())
        self._parent = self._run({STUDY_TAG: self._name, CREATED_TAG: str(created)}, self._name)
        spec = self._study.spec
        said = ("objective", "sampler", "scheduler", "trials", "epochs", "seed", "data")
        self._tag(self._parent, {name: getattr(spec, name) for name in said})
        for trial_id, run_id in self._children().items():
            self._runs[trial_id] = run_id

    def take(self, event: Event) -> None:
        """Log an event of a trial."""
        if event.elsewhere:
            return
        trial_id = event.proposal.trial_id
        if trial_id not in self._runs:
            tags = {TRIAL_TAG: trial_id, "mlflow.parentRunId": self._parent}
            made = self._run({**tags, "study": self._name}, f"{self._name} {trial_id}")
            self._params(made, self._study.spec.settings_now(event.proposal.settings))
            if self._study.drivers.own is not None:
                self._client.update_run(self._parent, status="RUNNING")  # another driver may have ended it
            self._runs[trial_id] = made  # only after the parameters, so that a retry logs them again
        run_id = self._runs[trial_id]
        if event.report is not None:
            report: Mapping[str, Any] = event.report
            self._metrics(run_id, [report])
            if event.status != "failed":
                self._log_best(report[OBJECTIVE])
        if event.status == "failed":
            self._correct_best(trial_id)
        if event.status == "running":
            self._client.update_run(run_id, status="RUNNING")
            return
        if event.status != "paused":
            # Log the metrics that the driver does not receive, of every evaluation.
            history = read_history(self._study.trial_folder(trial_id))
            self._metrics(
                run_id, [{k: v for k, v in report.items() if k in _AT or k not in DRIVER_KEYS} for report in history]
            )
        self._tag(run_id, {"status": event.status, "reason": event.reason})
        self._client.set_terminated(run_id, _RUN_STATUS[event.status])

    def end(self) -> None:
        """Log the export, if there is one, and end the study's run. A driver that goes on resumes it."""
        best = self._study.folder / "best"
        if best.is_dir():
            self._client.log_artifacts(self._parent, str(best), "best")
        self._client.set_terminated(self._parent, "FINISHED" if self._study.is_over() else "KILLED")

    def _log_best(self, js: float) -> None:
        """Log a JS if it is the study's best. An earlier search, or another driver, may have had a better one."""
        if js >= self._best:
            return
        logged = self._logged_best()
        if js < logged:
            self._client.log_metric(self._parent, OBJECTIVE, js)
        self._best = min(js, logged)

    def _correct_best(self, failed: str) -> None:
        """Log the best JS of the other trials if the failed one had the study's best: it is never the winner."""
        leader = winner(record for record in self._study.records() if record.trial_id != failed)
        js = leader.best["val_js"] if leader is not None and leader.best is not None else math.inf
        if js > self._logged_best():
            # MLflow deletes no metric: without another trial, there is no number.
            self._client.log_metric(self._parent, OBJECTIVE, js if math.isfinite(js) else math.nan)
        self._best = js

    def _logged_best(self) -> float:
        """Return the best JS that the study's run has, bits; infinity if it has none."""
        js = float(self._client.get_run(self._parent).data.metrics.get(OBJECTIVE, math.inf))
        return math.inf if math.isnan(js) else js

    def _run(self, tags: dict[str, str], name: str) -> str:
        """Return the run with these tags; make it if there is none."""
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        if not found:
            return str(self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id)
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _children(self) -> dict[str, str]:
        """Return the runs of trials that an earlier search has logged completely, with their parameters."""
        found, token = dict[str, str](), None
        while True:
            wanted = f"tags.`mlflow.parentRunId` = '{self._parent}'"
            page = self._client.search_runs([self._experiment], wanted, page_token=token)
            found |= {run.data.tags[TRIAL_TAG]: run.info.run_id for run in page if run.data.params}
            token = page.token
            if not token:
                return found

    def _params(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(name, str(value)) for name, value in settings.items()])

    def _tag(self, run_id: str, tags: Mapping[str, Any]) -> None:
        for name, value in tags.items():
            self._client.set_tag(run_id, name, str(value))

    def _metrics(self, run_id: str, reports: list[Any]) -> None:
        """Log the numbers of reports, each with the number and the time of its report."""
        from mlflow.entities import Metric

        now = time.time()
        metrics = [
            Metric(name, float(value), int(1000 * report.get("time", now)), report["report"])
            for report in reports
            for name, value in report.items()
            if isinstance(value, float) and name not in ("time", "epoch")
        ]
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
