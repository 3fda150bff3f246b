"""What Ray's metrics say of a study: value by value, and as a real Prometheus reads them."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import ray
from ruamel.yaml import YAML

import raytune_emotion
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.report import ray_metrics
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.report.ray_metrics import METRICS, study_metrics, values_of
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.cluster import RUN_SPACE
from tests.support.events import event
from tests.support.studies import spec_of

PROMETHEUS = shutil.which("prometheus")
CONFIGURATION = Path(raytune_emotion.__file__).parents[1] / "jobs" / "monitoring" / "prometheus.yml"


@pytest.fixture
def progress(tmp_path, store):
    make_study(tmp_path / "study", spec_of(store))
    return StudyProgress(load(tmp_path / "study"))


def values_now(progress):
    return {(name, *tags.values()): value for name, tags, value in values_of(progress.snapshot())}


def test_gauges_follow_the_trials(progress):
    assert {name for name, *_ in values_now(progress)} == {"raytune_emotion_trials"}, "nothing has reported"
    progress.watch(event("0000", "running"))
    progress.watch(event("0001", "running", 0.3, 2.0))
    now = values_now(progress)
    assert now["raytune_emotion_trials", "running"] == 2.0
    assert now["raytune_emotion_best_js",] == now["raytune_emotion_trial_js", "0001"] == 0.3
    assert now["raytune_emotion_trial_epoch", "0001"] == 2.0
    assert now["raytune_emotion_trial_images_per_second", "0001"] == 1234.0
    assert {name for name, *_ in now} == {*METRICS}
    progress.watch(event("0002", "failed", 0.1))
    progress.watch(event("0001", "complete", 0.25, 4.0))
    now = values_now(progress)
    assert (now["raytune_emotion_trials", "failed"], now["raytune_emotion_best_js",]) == (1.0, 0.25)
    assert not any("trial_js" in name for name, *_ in now), "a trial that has ended is gone"


def test_metrics_that_cannot_be_set_disturb_no_study(progress, monkeypatch):
    asked = threading.Event()

    def fail(*_):
        asked.set()
        raise RuntimeError("the cluster has died")

    monkeypatch.setattr(ray_metrics, "values_of", fail)
    with study_metrics(progress):
        progress.watch(event("0000", "running", 0.3))
        assert asked.wait(60)


@pytest.fixture
def prometheus(tmp_path, cluster):
    """Ask a Prometheus that reads this cluster, by the configuration of the project, for an expression."""
    nodes = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    (tmp_path / "nodes.json").write_text(json.dumps([{"targets": nodes}]))
    configuration = YAML(typ="safe").load(CONFIGURATION)
    (scrape,) = configuration["scrape_configs"]
    scrape["file_sd_configs"][0]["files"] = [str(tmp_path / "nodes.json")]
    configuration["global"]["scrape_interval"] = "1s"
    YAML(typ="safe").dump(configuration, tmp_path / "prometheus.yml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [PROMETHEUS, f"--config.file={tmp_path / 'prometheus.yml'}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}"]

    def ask(expression: str) -> list[dict]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        yield ask
        process.terminate()


@pytest.mark.skipif(PROMETHEUS is None, reason="Debian's package prometheus is not installed")
def test_prometheus_reads_a_running_study(tmp_path, store, prometheus):
    folder = tmp_path / "watched"
    make_study(folder, spec_of(store, name="watched", space=RUN_SPACE, scheduler="none", trials=2, epochs=2000))
    read, seen, over = {}, threading.Event(), threading.Event()

    def look():
        """Ask until all numbers are there."""
        while len(read) < len(METRICS) and not over.wait(1):
            with contextlib.suppress(OSError):
                read.update((name, found) for name in METRICS if (found := prometheus(f"ray_{name}")))
        seen.set()

    place = Placement(Resources(1, 1.0, 0.0), 1, limit=1)
    reader, deadline = threading.Thread(target=look), threading.Timer(120, over.set)
    study = load(folder)
    progress = StudyProgress(study)
    run = StudyRun(study, place, watch=progress.watch, failure=lambda: "seen" if seen.is_set() else "")
    with study_metrics(progress):
        reader.start()
        deadline.start()
        try:
            with pytest.raises(ClusterLost, match="seen"):  # which ends a study from within
                run_study(run)
        finally:
            deadline.cancel()
            over.set()
            reader.join()
    for thread in threading.enumerate():  # other tests share the cluster
        if thread.name == "tune":
            thread.join(60)
    assert {*read} == {*METRICS}
    assert {found["metric"]["study"] for all_found in read.values() for found in all_found} == {"watched"}
    states = {found["metric"]["status"]: float(found["value"][1]) for found in read["raytune_emotion_trials"]}
    assert states == {"running": 1.0, "complete": 0.0, "pruned": 0.0, "failed": 0.0, "paused": 0.0}
    (js,), (epoch,) = read["raytune_emotion_trial_js"], read["raytune_emotion_trial_epoch"]
    assert js["metric"]["trial"] == epoch["metric"]["trial"] == "0000"
    heard = {report["best_val_js"] for report in study.records()[0].reports}
    assert float(js["value"][1]) in heard
    assert float(epoch["value"][1]) >= 1.0
