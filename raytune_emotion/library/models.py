"""Provide models whose output is a distribution over the emotions."""

from pathlib import Path

import torch
from torch import Tensor, nn

from raytune_emotion.config import RunConfig
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.model import build_model, mean_std
from raytune_emotion.learn.origin import Colour


class EmotionModel(nn.Module):
    """A timm backbone that takes the images of the loaders, and returns probabilities.

    Args:
        backbone: network with K outputs, which are logits.
        classes: K names, in the order of the probabilities.
        image_size: side of its images, px.
    """

    def __init__(self, backbone: nn.Module, classes: tuple[str, ...], image_size: int) -> None:
        super().__init__()
        self.backbone, self.classes, self.image_size = backbone, classes, image_size
        mean, std = mean_std(backbone)
        self._mean: Tensor
        self._std: Tensor
        for name, colour in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, _as_channels(colour), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Predict probabilities.

        Args:
            x_BCHW: [B, 3, H, W], RGB, float in [0, 1]. The model itself normalises them for its backbone.

        Returns:
            [B, K], each row with sum one.
        """
        return self.logits(x_BCHW).softmax(-1)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Predict the logarithms of probabilities, up to a constant per row: [B, 3, H, W] -> [B, K], float32."""
        logits_BK: Tensor = self.backbone((x_BCHW - self._mean) / self._std)
        return logits_BK.float()


def create_model(
    name: str,
    pretrained: bool = True,
    *,
    image_size: int = 224,
    dropout: float = 0.3,
    weights_dir: str | Path | None = None,
    classes: tuple[str, ...] = EMOTIONS,
    seed: int = 0,
) -> EmotionModel:
    """Build any timm backbone with a head of 13 classes, on the CPU, in training mode.

    Args:
        name: name of a timm model, such as `resnet18`.
        pretrained: whether it starts from timm's weights, from the hub or its cache, or from those in `weights_dir`.
        image_size: side of the square images, px. Backbones whose parameters do not depend on it accept other sizes.
        dropout: dropout probability before the classifier.
        weights_dir: folder with `<name>.safetensors`, for machines without access to the hub.
        classes: K names.
        seed: seed of the weights that are not pretrained.

    Raises:
        UserError: timm has no such model, or its weights are not available.
    """
    config = RunConfig.from_flat(
        {
            "data.image_size": image_size,
            "data.classes": classes,
            "model.backbone": name,
            "model.pretrained": pretrained,
            "model.weights_dir": str(weights_dir) if weights_dir is not None else None,
            "model.dropout": dropout,
            "train.seed": seed,
        }
    )
    return EmotionModel(build_model(config), classes, image_size)


def _as_channels(colour: Colour) -> Tensor:
    return torch.tensor(colour)[:, None, None]
