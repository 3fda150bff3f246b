"""Predictions on a Ray cluster that has died; what one predicts is tested in tests/machines."""

import contextlib
import threading
from types import SimpleNamespace

from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution import cluster_predict
from tests.support.commands import exit_code
from tests.support.exports import untrained_best


def test_prediction_whose_cluster_has_died_ends(faces, tmp_path, monkeypatch, capsys):
    lost, end = [], threading.Event()

    def predict_nothing(*_, **__):
        lost.append("Ray has died")
        end.wait(600)
        yield

    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")  # the command sets it
    monkeypatch.setattr(cluster_module, "check_cluster", lambda address: None)
    session = contextlib.nullcontext(SimpleNamespace(failure=lambda: "".join(lost)))
    monkeypatch.setattr(cluster_module, "ray_session", lambda address: session)
    monkeypatch.setattr(cluster_predict, "predict_on_cluster", predict_nothing)
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    try:
        assert exit_code(["predict", tmp_path / "best", faces / "val_set" / "images", "--address", "auto"]) == 1
    finally:
        end.set()
    assert capsys.readouterr().err.endswith("error: Ray has died\n")
