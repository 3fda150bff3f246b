"""Checkpoints to export."""

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
    return Best(weights, config.flat(), "f1a9", report)
