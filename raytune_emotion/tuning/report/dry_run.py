"""What a space holds and what its trials cost, before any of them runs."""

import statistics
import time
from dataclasses import dataclass

import torch

from raytune_emotion.config import RunConfig
from raytune_emotion.learn import losses
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.optim import build_optimizer
from raytune_emotion.tuning.space.space import Space

_ROWS = 32
_STEPS = 5


@dataclass(frozen=True)
class Cost:
    """Of training one backbone at one image size."""

    backbone: str
    image_size: int  # px
    params_millions: float
    images_per_second: float  # in training, without augmentation and evaluation


def costs(space: Space, sizes: tuple[int, ...], device: torch.device) -> list[Cost]:
    """Trains each backbone of a space for some steps on noise, with the threads that this process has."""
    backbones = space.possible("model.backbone") or (RunConfig().model.backbone,)
    return [_cost(name, size, device) for name in backbones for size in sizes]


def _cost(backbone: str, size: int, device: torch.device) -> Cost:
    config = RunConfig.from_flat({"model.backbone": backbone, "data.image_size": size})
    model = build_model(config, weights=False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.optim)
    loss = losses.mixture(config.loss.weights)
    x_BCHW = torch.randn(_ROWS, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    prob_BK = torch.rand(_ROWS, len(config.data.classes), device=device).softmax(dim=1)

    def step() -> None:
        loss(model(x_BCHW), prob_BK).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # the first one chooses kernels and takes memory
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return Cost(backbone, size, millions, _ROWS / statistics.median(seconds))
