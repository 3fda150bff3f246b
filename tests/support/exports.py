"""Checkpoints to export, and pictures to predict."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from raytune_emotion.config import RunConfig
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.checkpoint import Best
from raytune_emotion.learn.model import build_model


def untrained_best(backbone: str, size: int, classes: tuple[str, ...] = EMOTIONS, seed: int = 0) -> Best:
    """Make the best checkpoint of a run whose weights are untrained."""
    settings = {
        "model.backbone": backbone,
        "data.image_size": size,
        "data.classes": list(classes),
        "train.seed": seed,
        "model.weights_dir": "/home/somebody/weights",
    }
    config = RunConfig.from_flat(settings)
    weights = {name: tensor.clone() for name, tensor in build_model(config, weights=False).state_dict().items()}
    report = {"report": 3, "epoch": 2.5, "val_js": 0.25, "val_accuracy": 0.625, "seconds": 10.0}
    return Best(weights, config.to_flat(), "f1a9", report)


def turned_picture(file: Path, orientation: int) -> None:
    """Write a photo of a size that is decoded at a fraction, neither square nor a multiple of 8, turned by EXIF."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 30, 3), np.uint8)
    image = Image.fromarray(noise).resize((331, 270), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, quality=95, exif=exif)


def predict_with_card(card: str) -> list[npt.NDArray[Any]]:
    """Run the code that a model card shows, on `face.jpg` here; return the probabilities of each format."""
    scope: dict[str, Any] = {}
    read, *uses = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(read, scope)
    found = []
    for use in uses:
        exec(use, scope)
        found.append(np.asarray(scope.pop("probabilities")))
    return found
