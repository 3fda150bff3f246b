"""A study in MLflow: on a real server of this machine, and with a server that is away."""

import dataclasses
import errno
import math
import threading
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

from raytune_emotion.tuning.report import mlflow_log as mlflow_module
from raytune_emotion.tuning.report.mlflow_log import EXPERIMENT, STUDY_TAG, TRIAL_TAG, mlflow_log
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.spec import SPEC
from tests.support.commands import exit_code
from tests.support.events import event
from tests.support.studies import write_study


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The application of MLflow's server on sqlite, in a thread of this process: its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    database = f"sqlite:///{folder / 'runs.db'}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_MLFLOW_SERVER_FILE_STORE": database,
            "MLFLOW_TRACKING_URI": database,  # the server sets it, so that it is undone here
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "art"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        }.items():
            patch.setenv(name, value)
        from mlflow.server import app

        server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Silent(WSGIRequestHandler):
    def log_request(self, *_):
        pass


@pytest.fixture
def study(tmp_path, store, request):
    """A study with a name of its own: MLflow finds it by that, and by the second when it was created."""
    write_study(tmp_path / request.node.name, store)
    return load(tmp_path / request.node.name)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What a log sets in the environment of the process is undone."""
    for name, value in mlflow_module._MLFLOW_SETTINGS.items():
        monkeypatch.setenv(name, value)


def runs_of(server, study):
    """Return the runs of studies with this study's name, and those of their trials."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server)
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    parents = [run for run in runs if run.data.tags.get(STUDY_TAG) == study.folder.name]
    ids = {parent.info.run_id for parent in parents}
    return client, parents, [run for run in runs if run.data.tags.get("mlflow.parentRunId") in ids]


def events_of(study):
    """What the recorder says of a study's trials, as it ran."""
    for record in study.records():
        yield event(record.trial_id, "running", settings=record.settings)
        for report in record.reports:
            yield event(record.trial_id, "running", report["best_val_js"], report["epoch"], settings=record.settings)
        last = record.reports[-1]
        yield event(record.trial_id, record.status, last["best_val_js"], last["epoch"], settings=record.settings)


@pytest.mark.long
def test_a_study_is_a_run_with_one_run_below_it_for_each_trial(study, server):
    (study.folder / "best").mkdir(exist_ok=True)
    (study.folder / "best" / "config.json").write_text("{}")
    for _ in range(2):  # a study that goes on goes on with its runs
        with mlflow_log(server, study) as watch:
            for each in events_of(study):
                watch(each)
    client, (parent,), runs = runs_of(server, study)
    children = {run.data.tags[TRIAL_TAG]: run for run in runs}
    records = {record.trial_id: record for record in study.records()}
    assert children.keys() == records.keys()
    assert len(runs) == len(records)
    best = min(record.best["val_js"] for record in records.values())
    assert parent.data.metrics["best_val_js"] == pytest.approx(best)
    assert parent.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "best")] == ["best/config.json"]
    for trial_id, run in children.items():
        record = records[trial_id]
        assert run.data.params == {name: str(value) for name, value in record.settings.items()}
        assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "complete")
        curve = client.get_metric_history(run.info.run_id, "val_js")
        assert {(m.step, m.value) for m in curve} == {(r["report"], r["val_js"]) for r in record.reports}


def test_a_search_that_goes_on_does_not_undo_the_best(study, server):
    for js in (0.2, 0.3, 0.1):  # of a search each
        with mlflow_log(server, study) as watch:
            watch(event(f"{js}", "running", js, 1.0))
    client, (parent,), runs = runs_of(server, study)
    assert {run.data.tags[TRIAL_TAG] for run in runs} == {"0.2", "0.3", "0.1"}
    assert [m.value for m in client.get_metric_history(parent.info.run_id, "best_val_js")] == [0.2, 0.1]


def test_the_best_of_a_trial_that_fails_is_taken_back(study, server):
    leader, *others = sorted(study.records(), key=lambda record: record.best["val_js"])
    with mlflow_log(server, study) as watch:
        watch(event(leader.trial_id, "running", leader.best["val_js"], 1.0))
        watch(event(leader.trial_id, "failed", reason="diverged"))
    _, (parent,), _ = runs_of(server, study)
    assert parent.data.metrics["best_val_js"] == others[0].best["val_js"]


def test_the_best_of_the_only_trial_is_no_number_once_it_fails(study, server, monkeypatch):
    monkeypatch.setattr(type(study), "records", lambda self: [])
    with mlflow_log(server, study) as watch:
        watch(event("0000", "running", 0.1, 1.0))
        watch(event("0000", "failed", reason="diverged"))
        watch(event("0001", "running", 0.3, 1.0))
    client, (parent,), _ = runs_of(server, study)
    first, taken_back, last = (m.value for m in client.get_metric_history(parent.info.run_id, "best_val_js"))
    assert (first, math.isnan(taken_back), last) == (0.1, True, 0.3)


def test_drivers_that_begin_at_once_share_one_run_which_a_driver_that_goes_on_resumes(study, server, monkeypatch):
    from mlflow.tracking import MlflowClient

    found, turn = MlflowClient.search_runs, threading.Lock()

    def late(*arguments, **options):
        answer = found(*arguments, **options)
        time.sleep(0.2)  # so that both would have found nothing
        return answer

    monkeypatch.setattr(MlflowClient, "search_runs", late)
    monkeypatch.setattr(mlflow_module, "one_at_a_time", lambda url, what: turn)
    monkeypatch.setattr(type(study), "is_over", lambda self: False)
    spec = dataclasses.replace(study.spec, storage="postgresql:///faces#study")
    drivers = SimpleNamespace(own=1)
    first, second = (dataclasses.replace(study, spec=spec, drivers=drivers) for _ in range(2))
    with mlflow_log(server, second) as watch:
        with mlflow_log(server, first):
            pass
        _, (parent,), _ = runs_of(server, study)
        assert parent.info.status == "KILLED"
        watch(event("0009", "running"))
        deadline = time.monotonic() + 60
        while runs_of(server, study)[1][0].info.status != "RUNNING":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    _, (parent,), _ = runs_of(server, study)
    assert parent.info.status == "KILLED"


def test_another_study_of_the_same_name_has_runs_of_its_own(study, server):
    """MLflow lets no parameter change: of the second study nothing at all would be logged."""
    for lr in (0.1, 0.2):
        (study.folder / SPEC).write_text(f"created: {lr}\n")
        with mlflow_log(server, study) as watch:
            watch(event("0000", "running", settings={"optim.lr": lr}))
    _, parents, runs = runs_of(server, study)
    assert len(parents) == 2
    assert sorted(run.data.params["optim.lr"] for run in runs) == ["0.1", "0.2"]


def test_a_server_that_is_away_disturbs_no_study(study, monkeypatch, capsys):
    monkeypatch.setattr(mlflow_module, "_AGAIN_S", 0.05)
    monkeypatch.setattr(mlflow_module, "_END_S", 0.5)
    address = "http://127.0.0.1:1"  # nothing listens there
    began = time.monotonic()
    with mlflow_log(address, study) as watch:
        for each in events_of(study):
            watch(each)
        assert time.monotonic() - began < 30, "nothing waits for the server"
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"--mlflow {address}: the log is incomplete; the study's own files are not affected"
    assert all(line.startswith(f"--mlflow {address}: ") for line in said)
    assert len(said) <= 2, "it is said once"


def test_a_request_that_fails_as_a_study_ends_is_repeated(monkeypatch, capsys):
    monkeypatch.setattr(mlflow_module, "_AGAIN_S", 0.05)
    fails, done = [OSError("away"), OSError("still away")], []

    def request():
        if fails:
            raise fails.pop()
        done.append("first")

    thread = mlflow_module._Thread("http://server")
    thread.do(request)
    thread.do(lambda: done.append("second"))
    thread.close()
    assert done == ["first", "second"]
    assert "incomplete" not in capsys.readouterr().err


def test_the_reason_of_a_failed_request_is_that_of_the_system(capsys):
    def request():
        try:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        except OSError as error:
            raise RuntimeError("Max retries exceeded with url: " + 400 * "x") from error

    def refused():
        raise ValueError("the server refuses this\nand says more")

    thread = mlflow_module._Thread("http://server")
    assert not thread._try(request, said=False)
    assert not thread._try(refused, said=False)
    thread.close()
    ends = "; the study continues, and this request is repeated\n"
    assert capsys.readouterr().err == (
        f"--mlflow http://server: Connection refused{ends}--mlflow http://server: the server refuses this{ends}"
    )


def test_parameters_that_a_server_did_not_take_are_logged_again(study):
    log = mlflow_module._Log("", study)
    log._client = client = MagicMock()
    client.search_runs.return_value = []
    client.log_batch.side_effect = [ConnectionError, None]
    began = event("0000", "running", settings={"optim.lr": 0.1})
    with pytest.raises(ConnectionError):
        log.take(began)
    log.take(began)
    log.take(began)
    (_, again) = client.log_batch.call_args_list
    assert "optim.lr" in [param.key for param in again.kwargs["params"]]


def test_a_missing_package_is_said_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert exit_code(["search", "--mlflow", "x", "--results", tmp_path, "--name", "s"]) == 2
    assert "error: --mlflow: the package mlflow is missing; install it with" in capsys.readouterr().err


def test_credentials_in_the_address_are_refused_without_telling_them(tmp_path, capsys):
    assert exit_code(["search", "--mlflow", "http://me:secret@host", "--results", tmp_path, "--name", "s"]) == 2
    (told,) = capsys.readouterr().err.rstrip().splitlines()[-1:]
    assert told.startswith("error: http://***@host: contains credentials, ")
    assert told.endswith("such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
