"""Log a running study to MLflow: a run of the study, and below it one for each trial. MLflow is imported here alone.

All of it happens in a thread of the driver. A server that is away is tried again, and never keeps the study waiting.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raytune_emotion.interruption import run_in_thread
from raytune_emotion.learn.report import DRIVER_KEYS, OBJECTIVE
from raytune_emotion.learn.run_folder import read_history
from raytune_emotion.terminal import warn
from raytune_emotion.tuning.execution.recorder import Event, Watch
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.spec import SPEC, created_at

EXPERIMENT = "raytune_emotion"
#: Tags by which a study that goes on finds its runs. Another study may have had the same name before.
STUDY_TAG, CREATED_TAG, TRIAL_TAG = "raytune_emotion.study", "raytune_emotion.created", "raytune_emotion.trial"
#: Between two attempts at a server that is away; and what is left at the end gets so long.
_AGAIN_S, _END_S = 5.0, 30.0
#: MLflow takes so many metrics at once.
_BATCH = 1000
#: MLflow reads these from the environment, and has no arguments in their place.
_MLFLOW_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
#: Where a report belongs.
_AT = ("report", "time", "epoch")
_RUN_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "paused": "SCHEDULED"}


@contextlib.contextmanager
def mlflow_log(uri: str, study: OpenStudy) -> Iterator[Watch]:
    """Log a study until the block ends, and then the export that lies in its folder."""
    log = _Log(uri, study)
    thread = _Thread(uri)
    thread.do(log.begin)
    try:
        yield lambda event: thread.do(lambda: log.take(event))
    finally:
        thread.do(log.end)
        thread.close()


class _Thread:
    """Do one thing after the other in a thread; what fails is done again."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._left: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._closes = threading.Event()
        self._ended = run_in_thread("mlflow", self._work)

    def do(self, action: Callable[[], None]) -> None:
        self._left.put(action)

    def close(self) -> None:
        """Give what is left some time."""
        self._left.put(None)
        self._closes.set()
        if not self._ended.wait(_END_S) or not self._left.empty():
            warn(f"--mlflow {self._uri}: not all was logged; the study itself is whole")

    def _work(self) -> None:
        said = False
        while (action := self._left.get()) is not None:
            while not self._try(action, said=said):
                said = True
                if self._closes.wait(_AGAIN_S):
                    return

    def _try(self, action: Callable[[], None], *, said: bool) -> bool:
        try:
            action()
        except Exception as error:  # of whatever class: it is MLflow's, and the study goes on
            if not said:
                why = (str(error).splitlines() or [type(error).__name__])[0]
                warn(f"--mlflow {self._uri}: {why}; the study goes on, and this is tried again")
            return False
        return True


class _Log:
    """Write the runs of one study. It is called by one thread alone; a method that has failed can be called again."""

    def __init__(self, uri: str, study: OpenStudy) -> None:
        self._uri, self._study, self._name = uri, study, study.folder.name
        self._client: Any = None
        self._experiment = self._parent = ""
        self._runs: dict[str, str] = {}  # of trials whose parameters are logged
        self._best = float("inf")

    def begin(self) -> None:
        """Make the study's run, or go on with it."""
        for name, value in _MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
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
        """Log what happened to a trial."""
        if event.elsewhere:
            return
        trial_id = event.proposal.trial_id
        if trial_id not in self._runs:
            tags = {TRIAL_TAG: trial_id, "mlflow.parentRunId": self._parent}
            made = self._run({**tags, "study": self._name}, f"{self._name} {trial_id}")
            self._params(made, self._study.spec.settings_now(event.proposal.settings))
            self._runs[trial_id] = made  # only now: else a retry would leave the parameters out
        run_id = self._runs[trial_id]
        if event.report is not None:
            report: Mapping[str, Any] = event.report
            self._metrics(run_id, [report])
            if event.status != "failed":
                self._log_best(report[OBJECTIVE])
        if event.status == "running":
            self._client.update_run(run_id, status="RUNNING")
            return
        if event.status != "paused":
            # What the driver does not hear: every metric of every evaluation.
            history = read_history(self._study.trial_folder(trial_id))
            self._metrics(
                run_id, [{k: v for k, v in report.items() if k in _AT or k not in DRIVER_KEYS} for report in history]
            )
        self._tag(run_id, {"status": event.status, "reason": event.reason})
        self._client.set_terminated(run_id, _RUN_STATUS[event.status])

    def end(self) -> None:
        """Log the export, if there is one, and end the study's run."""
        best = self._study.folder / "best"
        if best.is_dir():
            self._client.log_artifacts(self._parent, str(best), "best")
        self._client.set_terminated(self._parent, "FINISHED" if self._study.is_over() else "KILLED")

    def _log_best(self, js: float) -> None:
        """Log a JS if it is the study's best: an earlier search, or another driver, may have had a better one."""
        if js >= self._best:
            return
        logged = self._client.get_run(self._parent).data.metrics.get(OBJECTIVE, float("inf"))
        if js < logged:
            self._client.log_metric(self._parent, OBJECTIVE, js)
        self._best = min(js, logged)

    def _run(self, tags: dict[str, str], name: str) -> str:
        """Return the run with these tags; make it where there is none."""
        wanted = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        for run in self._client.search_runs([self._experiment], wanted, max_results=1):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        return str(self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id)

    def _children(self) -> dict[str, str]:
        """Return the runs of trials that an earlier search has logged with their parameters."""
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
        """Log the numbers of reports, each at its number and its time."""
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
