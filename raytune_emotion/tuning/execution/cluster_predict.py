"""Predict images on all nodes of a Ray cluster with Ray Data."""

import logging
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from raytune_emotion.data.decode import UndecodableImage
from raytune_emotion.data.pictures import PictureFiles, PredictedBatch
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.export_files import CONFIG, WEIGHTS
from raytune_emotion.learn.export_folder import load_package
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
        good_N = batch["error"] == ""
        yield PredictedBatch(
            [str(label) for label in batch["label"][good_N]],
            np.array([*batch["probabilities"][good_N]], np.float64),
            [f"{label}: {why}" for label, why in zip(batch["label"][~good_N], batch["error"][~good_N], strict=True)],
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
        package, found = self._package, []
        for folder, file in zip(batch["folder"], batch["file"], strict=True):
            source = PictureFiles(parse_location(str(folder)), [str(file)])
            ((_, pixels),) = source.decode(package.image_size, 1)
            found.append(pixels)
        good = [pixels for pixels in found if not isinstance(pixels, UndecodableImage)]
        prob_NK = np.zeros((len(found), len(package.classes)))
        if good:
            good_N = [not isinstance(pixels, UndecodableImage) for pixels in found]
            prob_NK[good_N] = package.predict(np.stack(good), mirror=self._mirror)
        errors = [str(pixels) if isinstance(pixels, UndecodableImage) else "" for pixels in found]
        return {"label": batch["label"], "probabilities": prob_NK, "error": np.array(errors, object)}
