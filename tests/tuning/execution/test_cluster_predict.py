"""Predictions on a Ray cluster."""

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import ray

from raytune_emotion.data.pictures import PictureFiles
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.predict import predict
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution import cluster_predict
from raytune_emotion.tuning.execution.cluster_predict import predict_on_cluster
from tests.support.commands import exit_code
from tests.support.exports import untrained_best


def test_cluster_predicts_in_the_same_order_what_this_machine_predicts(cluster, faces, tmp_path, monkeypatch):
    asked, strategy = [], ray.data.ActorPoolStrategy

    def one_actor(**options):
        asked.append(options)
        return strategy(size=1)

    monkeypatch.setattr(ray.data, "ActorPoolStrategy", one_actor)
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    (tmp_path / "bad.jpg").write_text("no picture")
    names = [file.name for file in sorted((faces / "train_set" / "images").iterdir())]
    sources = [
        PictureFiles(Folder(faces / "train_set" / "images"), names),
        PictureFiles(Folder(tmp_path), ["bad.jpg"]),
    ]
    here, there = (
        list(batches)
        for batches in (
            predict(load_package(tmp_path / "best"), sources),
            predict_on_cluster(tmp_path / "best", sources, mirror=False),
        )
    )
    assert asked == [{"min_size": 1, "max_size": 2}]
    assert [name for batch in there for name in batch.names] == [name for batch in here for name in batch.names]
    assert [fault for batch in there for fault in batch.faults] == [
        f"{tmp_path}/bad.jpg: no picture in JPEG, PNG, BMP, GIF or WebP format"
    ]
    found, wanted = (np.concatenate([batch.prob_NK for batch in some if batch.names]) for some in (there, here))
    assert np.abs(found - wanted).max() < 1e-6


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
