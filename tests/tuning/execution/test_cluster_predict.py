"""Predictions on a Ray cluster that has died or has no room; what one predicts is tested in tests/machines."""

import contextlib
import threading
from types import SimpleNamespace

import pytest

from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.tuning.execution import capacity, cluster_nodes, cluster_predict
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution.cluster_nodes import ClusterNode
from tests.support.commands import exit_code
from tests.support.exports import untrained_best


@pytest.fixture
def predict(faces, tmp_path, monkeypatch):
    """Runs the command on a cluster of stand-ins: its predictions, its nodes, and what is not free."""
    end = threading.Event()

    def run(predictions, *, lost=(), cores=2.0, none_free=frozenset()):
        monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")  # the command sets it
        monkeypatch.setattr(cluster_module, "check_cluster", lambda address: None)
        watch = SimpleNamespace(failure=lambda: "".join(lost), none_free=lambda: none_free)
        monkeypatch.setattr(cluster_module, "ray_session", lambda address: contextlib.nullcontext(watch))
        monkeypatch.setattr(cluster_nodes, "list_nodes", lambda: {"head": ClusterNode("head", {"CPU": cores})})
        monkeypatch.setattr(cluster_nodes, "has_autoscaler", lambda: False)
        monkeypatch.setattr(cluster_predict, "predict_on_cluster", lambda *_, **__: predictions(end))
        write_package(tmp_path / "best", untrained_best("test_resnet", 32))
        try:
            return exit_code(["predict", tmp_path / "best", faces / "val_set" / "images", "--address", "auto"])
        finally:
            end.set()

    return run


def test_prediction_whose_cluster_has_died_ends(predict, capsys):
    lost = []

    def predict_nothing(end):
        lost.append("Ray has died")
        end.wait(600)
        yield

    assert predict(predict_nothing, lost=lost) == 1
    assert capsys.readouterr().err.endswith("error: Ray has died\n")


def test_prediction_on_a_cluster_without_cores_is_refused_at_once(predict, capsys):
    assert predict(lambda end: iter(()), cores=0.0) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(
        "error: the cluster has no core to work on: 1 node with 0 CPU, and no autoscaler; start its worker nodes\n"
    )


def test_prediction_without_a_free_gpu_is_said_to_wait(predict, monkeypatch, capsys):
    def predict_late(end):
        end.wait(3)
        return
        yield

    monkeypatch.setattr(capacity, "_WAIT_S", 0.5)
    assert predict(predict_late, none_free={"GPU"}) == 0
    assert "no result from the cluster for 0 s; all of its GPUs are in use\n" in capsys.readouterr().err
