"""Predictions on a Ray cluster."""

import numpy as np
import ray

from raytune_emotion.data.pictures import PictureFiles
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.predict import predict
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.execution.cluster_predict import predict_on_cluster
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
