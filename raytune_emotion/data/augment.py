"""Augment batches on the device.

A row's random numbers are a function of (seed, epoch, row) alone. An image is therefore augmented in the same way in
every batch, order and worker. The only exception is the partner of mixup and cutmix, which is the previous row in the
batch; the share that a row keeps of itself does not depend on the batch.

All decisions are made on the host, where the row numbers are, for many batches at once, and are sent to the device in
one copy. Each draw has a fixed position in a row's sequence: an operation that is switched on changes no numbers of the
others. An operation that is off is not run.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from raytune_emotion.config import AugmentConfig
from raytune_emotion.data.loader import Batch

Triple = tuple[float, float, float]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
#: Parameters of the augmentation of a batch: by name, [B, 1, 1, 1], float32, on the device. Operations that are off
#: have no entry. Lengths are shares of the side for crops, and px for boxes (erase, cut).
Decisions = Mapping[str, torch.Tensor]

#: Number of rows decided at once: enough to make numpy's cost per call negligible; their numbers fit into a cache.
_DECIDED_AT_ONCE = 2048
#: Number of random numbers per row, before those of `_LARGEST`.
_DRAWS = 19
#: Operations of RandAugment (Cubuk et al., 2019), and their strengths at magnitude 1: shears and translations in sides,
#: rotation in radians, colours by the change of a factor, posterising in bits, solarising by the share of the levels.
#: They run in a fixed order. The operations that need a histogram or neighbouring pixels are left out.
_LARGEST = {
    "nothing": 0.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.45,
    "translate_y": 0.45,
    "rotate": math.pi / 6,
    "brightness": 0.9,
    "contrast": 0.9,
    "saturation": 0.9,
    "posterise": 4.0,
    "solarise": 1.0,
}
#: More than the error of a pixel that a warp only copies, at any size of image.
_ROUNDING = 0.03
_NO_STRENGTH: Floats = np.zeros(1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOG_CROP_ASPECT = math.log(4 / 3)
_LOG_ERASE_ASPECT = math.log(3.3)


def normalise(x_BHWC: torch.Tensor, mean: Triple, std: Triple) -> torch.Tensor:
    """Map pixels of 0 to 255 to (x / 255 - mean) / std.

    Returns:
        [B, C, H, W], float32, in channels-last memory.
    """
    return _normalise(x_BHWC.to(torch.float32), mean, std).permute(0, 3, 1, 2)


def decide(
    config: AugmentConfig,
    batches_of_rows: Sequence[npt.NDArray[np.int64]],
    *,
    seed: int,
    epoch: int,
    side: int,
    device: torch.device,
) -> Iterator[Decisions]:
    """Yield the augmentation parameters of each batch.

    Args:
        config: operations and their strengths.
        batches_of_rows: row numbers, [B] a batch.
        seed: seed of the run.
        epoch: number of the pass over the training set.
        side: side of the images, px.
        device: device on which they are augmented.
    """
    many = max(1, _DECIDED_AT_ONCE // len(batches_of_rows[0]))
    for first in range(0, len(batches_of_rows), many):
        some = batches_of_rows[first : first + many]
        plan = _plan(config, np.concatenate(some), seed=seed, epoch=epoch, side=side)
        if not plan:
            yield from ({} for _ in some)
            continue
        table = torch.from_numpy(np.stack(list(plan.values())).astype(np.float32))
        if device.type == "cuda":
            table = table.pin_memory()  # so that the host does not wait for the copy
        table = table.to(device, non_blocking=True)[..., None, None, None]
        for part in torch.split(table, [len(rows_B) for rows_B in some], dim=1):
            yield dict(zip(plan, part, strict=True))


def augment(batch: Batch, decisions: Decisions, *, mean: Triple, std: Triple) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment the pixels and distributions of a training batch.

    The order is: shears, rotation and translation, random crop and mirror image, colour jitter and greyscale,
    posterising and solarising, normalisation, erasing (to the mean colour), mixup or cutmix. If both are on, a fair
    coin chooses one of the two for each row.

    Args:
        batch: square images; not changed.
        decisions: output of `decide` for its rows.
        mean: mean of the model's input, for pixels in [0, 1].
        std: standard deviation of the model's input.

    Returns:
        x_BCHW, float32, normalised, in channels-last memory; and prob_BK.
    """
    x_BHWC, prob_BK = batch.x_BHWC, batch.prob_BK
    side = x_BHWC.shape[1]

    # Sum the whole image in integers: a float sum would depend on how the batch is split among threads.
    pivot = _grey(x_BHWC.sum((1, 2), dtype=torch.int32)[:, None, None] / side**2) if "pivot" in decisions else None
    if "crop_width" in decisions:
        x_BHWC = _crop(x_BHWC, decisions)
    elif "flip" in decisions:
        # Select by bit operations: on a CPU, where() takes four times as long on bytes.
        chosen = (decisions["flip"] * 255).to(torch.uint8)
        x_BHWC = x_BHWC.flip(2).bitwise_xor_(x_BHWC).bitwise_and_(chosen).bitwise_xor_(x_BHWC)
    x_BHWC = x_BHWC.to(torch.float32)
    if "own_colour" in decisions:
        offset = _grey(x_BHWC) * decisions["grey"]
        if pivot is not None:
            offset += pivot * decisions["pivot"]
        x_BHWC = x_BHWC.mul_(decisions["own_colour"]).add_(offset).clamp_(0, 255)
    if "step" in decisions:
        x_BHWC -= torch.remainder(x_BHWC + _ROUNDING, decisions["step"]) * decisions["posterise"]
        x_BHWC = torch.where(x_BHWC >= decisions["solarise_from"], 255 - x_BHWC, x_BHWC)
    x_BHWC = _normalise(x_BHWC, mean, std)
    if "erase_top" in decisions:
        x_BHWC = x_BHWC.mul_(_outside("erase", decisions, side))

    if "share" in decisions:
        partner_BHWC, share_B1 = x_BHWC.roll(1, 0), decisions["share"][:, 0, 0]
        if "mixup" in decisions:
            x_BHWC = x_BHWC.mul_(decisions["mixup"]).add_(partner_BHWC * (1 - decisions["mixup"]))
        if "cut_top" in decisions:
            x_BHWC = torch.where(_outside("cut", decisions, side) > 0, x_BHWC, partner_BHWC)
        prob_BK = prob_BK * share_B1 + prob_BK.roll(1, 0) * (1 - share_B1)
    return x_BHWC.permute(0, 3, 1, 2), prob_BK


# ---- decisions, on the host


def splitmix64(x: Words) -> Words:
    """Return the output of Steele, Lea and Flood's generator (OOPSLA 2014) at state x: a bijection that mixes well."""
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: int, epoch: int, rows_B: npt.NDArray[np.int64], draws: int) -> Floats:
    """Draw uniform numbers in [0, 1), [draws, B]: column b is a function of (seed, epoch, rows_B[b]) alone."""
    key = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64(epoch))
    start_B = splitmix64(key ^ rows_B.astype(np.uint64))
    words = splitmix64(start_B + _GOLDEN * np.arange(draws, dtype=np.uint64)[:, None])
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def symmetric_beta(u: Floats, v: Floats, alpha: float) -> Floats:
    """Map two uniform numbers to Beta(alpha, alpha), exactly and without rejection.

    Bailey's polar method draws a Student t with 2 alpha degrees of freedom, which is mapped to the symmetric Beta
    (Devroye, "Random variate generation in one line of code", 1996). The formula does not overflow for small alpha.
    """
    q, cos = u ** (1 / alpha), np.cos(2 * math.pi * v)
    t = cos * np.sqrt((1 - q) / (q + (1 - q) * cos**2))
    beta: Floats = np.clip(0.5 + 0.5 * t, 0, 1)
    return beta


def _plan(
    config: AugmentConfig, rows_B: npt.NDArray[np.int64], *, seed: int, epoch: int, side: int
) -> dict[str, Floats | npt.NDArray[np.bool_]]:
    """Draw the augmentation parameters of rows, [B] for each name."""
    plan: dict[str, Floats | npt.NDArray[np.bool_]] = {}
    if dataclasses.replace(config, recipe=None) == AugmentConfig(flip=0):
        return plan
    (flip, area, aspect, left, top, bright, contrast, colourful, grey, erase, *rest) = uniforms(
        seed, epoch, rows_B, _DRAWS + (2 * len(_LARGEST) if config.operations else 0)
    )
    (erase_area, erase_aspect, erase_left, erase_top, coin, beta_u, beta_v, cut_x, cut_y, *rest) = rest
    strength = _choose_operations(config, np.array(rest))

    if config.flip:
        plan["flip"] = flip < config.flip
    if config.operations:
        plan |= _warp_plan(strength)
        plan |= {"posterise": strength["posterise"] != 0, "step": 2 ** np.abs(strength["posterise"])}
        plan["solarise_from"] = 256 * (1 - np.abs(strength["solarise"]))
    if config.crop_scale < 1 or config.operations:
        area = config.crop_scale + (1 - config.crop_scale) * area
        # An aspect beyond 1/area would reach outside of the image.
        log_aspect = (2 * aspect - 1) * np.minimum(_LOG_CROP_ASPECT, -np.log(area))
        width, height = np.sqrt(area * np.exp(log_aspect)), np.sqrt(area * np.exp(-log_aspect))
        plan |= {"crop_left": left * (1 - width), "crop_width": width}
        plan |= {"crop_top": top * (1 - height), "crop_height": height}
    if config.colour or config.grey or config.operations:
        # Brightness b, contrast c about the mean grey m, saturation s, each as the usual blend; together
        # x -> b c s x + b c (1 - s) grey(x) + b (1 - c) m.
        factors = {"brightness": bright, "contrast": contrast, "saturation": colourful}
        b, c, s = ((1 + config.colour * (2 * u - 1)) * (1 + strength[name]) for name, u in factors.items())
        s = np.where(grey < config.grey, 0.0, s)
        plan |= {"own_colour": b * c * s, "grey": b * c * (1 - s)}
        if config.colour or config.operations:
            plan["pivot"] = b * (1 - c)
    if config.erase:
        # Shares and aspects of Zhong et al., "Random Erasing Data Augmentation", 2017.
        area = np.where(erase < config.erase, 0.02 + (1 / 3 - 0.02) * erase_area, 0.0)
        half_log = (erase_aspect - 0.5) * _LOG_ERASE_ASPECT
        width, height = (np.minimum(np.round(side * np.sqrt(area) * np.exp(h)), side) for h in (half_log, -half_log))
        x, y = np.floor(erase_left * (side - width + 1)), np.floor(erase_top * (side - height + 1))
        plan |= {"erase_left": x, "erase_right": x + width, "erase_top": y, "erase_bottom": y + height}
    if config.mixup or config.cutmix:
        mixes = coin < (0.5 if config.mixup and config.cutmix else float(config.mixup > 0))
        plan["share"] = np.ones(len(rows_B))
        if config.mixup:
            plan["mixup"] = plan["share"] = np.where(mixes, symmetric_beta(beta_u, beta_v, config.mixup), 1.0)
        if config.cutmix:
            # A box of share 1 - lambda about a uniformly drawn point, clipped to the image (Yun et al., "CutMix",
            # 2019). The distributions are mixed by the share of pixels that are really replaced.
            half = np.where(mixes, 0.0, 0.5 * np.sqrt(1 - symmetric_beta(beta_u, beta_v, config.cutmix)))
            x0, x1 = (np.round(side * np.clip(cut_x + sign * half, 0, 1)) for sign in (-1, 1))
            y0, y1 = (np.round(side * np.clip(cut_y + sign * half, 0, 1)) for sign in (-1, 1))
            plan |= {"cut_left": x0, "cut_right": x1, "cut_top": y0, "cut_bottom": y1}
            plan["share"] = np.where(mixes, plan["share"], 1 - (x1 - x0) * (y1 - y0) / side**2)
    return plan


def _choose_operations(config: AugmentConfig, u_DB: Floats) -> dict[str, Floats]:
    """Return the signed strength of each operation of RandAugment, [B] by its name; 0 for rows that do not get it."""
    if not config.operations:
        return dict.fromkeys(_LARGEST, _NO_STRENGTH)
    order_OB, sign_OB = np.split(u_DB, 2)
    chosen_OB = order_OB.argsort(0).argsort(0) < config.operations
    largest_O1 = np.array([*_LARGEST.values()])[:, None]
    return dict(zip(_LARGEST, chosen_OB * np.where(sign_OB < 0.5, -1, 1) * largest_O1 * config.magnitude, strict=True))


def _warp_plan(strength: Mapping[str, Floats]) -> dict[str, Floats]:
    """Combine shears, rotation and translation to one affine map, from a place in the result to one in the image.

    Places are those of `grid_sample`: 0 is the centre, -1 and 1 are the edges.
    """
    shear_x, shear_y = strength["shear_x"], strength["shear_y"]
    cos, sin = np.cos(strength["rotate"]), np.sin(strength["rotate"])
    return {
        "warp_xx": cos - sin * shear_y,
        "warp_xy": cos * shear_x - sin * (1 + shear_x * shear_y),
        "warp_x": 2 * strength["translate_x"],
        "warp_yx": sin + cos * shear_y,
        "warp_yy": sin * shear_x + cos * (1 + shear_x * shear_y),
        "warp_y": 2 * strength["translate_y"],
    }


# ---- execution, on the device


@lru_cache(maxsize=8)
def _scale_and_shift(mean: Triple, std: Triple, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std] * width, dtype=torch.float32)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)] * width, dtype=torch.float32)
    return scale.to(device), shift.to(device)


def _normalise(x_BHWC: torch.Tensor, mean: Triple, std: Triple) -> torch.Tensor:
    """Normalise float32 in place, as lines of W*C: broadcasting only 3 channels is nine times slower on a CPU."""
    B, H, W, C = x_BHWC.shape
    scale, shift = _scale_and_shift(mean, std, W, x_BHWC.device)
    lines = x_BHWC.view(B, H, W * C)
    return torch.addcmul(shift, lines, scale, out=lines).view(B, H, W, C)  # one pass through the memory


def _grey(x: torch.Tensor) -> torch.Tensor:
    """Return the luma of ITU-R BT.601, [..., 3] to [..., 1]."""
    return x[..., 0:1] * 0.299 + x[..., 1:2] * 0.587 + x[..., 2:3] * 0.114


def _crop(x_BHWC: torch.Tensor, decisions: Decisions) -> torch.Tensor:
    """Warp, crop, and resize bilinearly. A crop is only ever enlarged, so it needs no smoothing before."""
    side = x_BHWC.shape[1]
    # Centres of the output pixels, from -1 to 1 as in grid_sample.
    centres = (torch.arange(side, device=x_BHWC.device) * 2 + 1) / side - 1
    left, width, top, height = (decisions[f"crop_{name}"][..., 0] for name in ("left", "width", "top", "height"))
    sign = 1 - 2 * decisions["flip"][..., 0] if "flip" in decisions else 1
    x = centres * (width * sign) + (2 * left + width - 1)
    y = centres[:, None] * height + (2 * top + height - 1)
    if "warp_x" in decisions:
        xx, xy, x0, yx, yy, y0 = (decisions[f"warp_{name}"][..., 0] for name in ("xx", "xy", "x", "yx", "yy", "y"))
        x, y = xx * x + xy * y + x0, yx * x + yy * y + y0
    grid = torch.stack([x.expand(-1, side, side), y.expand(-1, side, side)], dim=-1)
    x_BCHW = x_BHWC.to(torch.float32).permute(0, 3, 1, 2)
    cropped = functional.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cropped.permute(0, 2, 3, 1).contiguous()


def _outside(box: str, decisions: Decisions, side: int) -> torch.Tensor:
    """Return one outside of each row's box and zero inside, [B, H, W, C], as whole lines, as in `_normalise`.

    The result is float, because a CPU broadcasts booleans seven times as slowly.
    """
    left, right, top, bottom = (decisions[f"{box}_{edge}"][..., 0] for edge in ("left", "right", "top", "bottom"))
    at = torch.arange(side, device=left.device)
    y, x = at[:, None], at.repeat_interleave(3)
    outside = torch.maximum(((y < top) | (y >= bottom)).float(), ((x < left) | (x >= right)).float())
    return outside.view(-1, side, side, 3)
