"""Predict images on all nodes of a Ray cluster with Ray Data."""

import itertools
import logging
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from raytune_emotion.data.pictures import Picture, PictureFiles, PredictedBatch
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.export_files import CONFIG, WEIGHTS
from raytune_emotion.learn.export_folder import load_package, predict_batch
from raytune_emotion.storage.atomic import scratch_folder
from raytune_emotion.storage.locations import parse_location

_BATCH = 64


def predict_on_cluster(
    export: Path, sources: Sequence[PictureFiles], *, mirror: bool
) -> Generator[PredictedBatch, None, None]:
    """Predict images on the joined cluster, and yield predictions in the order of the images.

    Every node reads the images itself, so all must be able to access their folder or URI. The export is sent to them.

    Args:
        export: folder of the export, on this machine.
        sources: images to predict.
        mirror: whether to predict the mean of each image and its mirror image.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    files = {name: (export / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    held = ray.put(files)
    rows = [
        {"folder": source.location.address, "file": name, "label": source.label(name)}
        for source in sources
        for name in source.files
    ]
    room = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(room.get("GPU", 0))
    predicted = ray.data.from_items(rows).map_batches(
        _Predictor,
        batch_size=_BATCH,
        # The reference is in a list, so that the actor gets the reference itself, and fetches the export once.
        fn_constructor_args=([held], mirror),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, gpus or int(room.get("CPU", 1)))),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # hide messages about execution plans
    for batch in predicted.iter_batches(batch_size=_BATCH, batch_format="numpy"):
        good_N = batch["fault"] == ""
        yield PredictedBatch(
            [str(name) for name in batch["name"][good_N]],
            np.array([*batch["probabilities"][good_N]], np.float64),
            [str(fault) for fault in batch["fault"][~good_N]],
        )


class _Predictor:
    """An actor of the cluster that holds the model."""

    def __init__(self, files: Sequence[Any], mirror: bool) -> None:
        content: Mapping[str, bytes] = ray.get(files[0])
        with scratch_folder() as folder:
            for name, raw in content.items():
                (folder / name).write_bytes(raw)
            self._package = load_package(folder)
        self._package.model.to(find_device())
        self._mirror = mirror

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pictures: list[Picture] = []
        rows = zip(batch["folder"], batch["file"], batch["label"], strict=True)
        for folder, group in itertools.groupby(rows, key=lambda row: str(row[0])):
            files, labels = zip(*((str(file), str(label)) for _, file, label in group), strict=True)
            source = PictureFiles(parse_location(folder), files)
            # The actor has one core.
            decoded = source.decode(self._package.image_size, len(files), threads=1)
            pictures += zip(labels, (pixels for _, pixels in decoded), strict=True)
        found = predict_batch(self._package, pictures, mirror=self._mirror)
        good, bad = len(found.names), len(found.faults)
        return {
            "name": np.array([*found.names, *[""] * bad], object),
            "probabilities": np.concatenate([found.prob_NK, np.zeros((bad, len(self._package.classes)))]),
            "fault": np.array([*[""] * good, *found.faults], object),
        }
