"""Draw a learnable sample of faces, which needs no download and no licence.

Each face has a point in the plane of valence and arousal. Its label is `label_distribution` of that point. The point
bends and opens the mouth, opens the eyes, tilts and lifts the brows and tints the skin. Everything else (the person and
their features at rest, pose, light, background, sensor noise) is nuisance and is drawn independently.

The label is thus an exact function of the drawn point, not of the pixels. A reader that recovered the point without
error would have a Jensen-Shannon divergence of zero. How close a reader of pixels can come to zero is not known, and no
lower bound is claimed: faces at rest differ, arousal below zero hardly moves the mouth, and a small image rounds
everything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from raytune_emotion.data.affectnet import SPLITS
from raytune_emotion.emotions import VALENCE_AROUSAL, label_distribution
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import atomic_folder
from raytune_emotion.storage.cache import cache_folder

#: Size of the built-in sample: training faces, validation faces, and side of the images in px.
TRAIN, VAL, IMAGE_SIZE = 2000, 500, 64
_SAMPLE = f"sample-v1-{TRAIN}-{VAL}-{IMAGE_SIZE}px"

Colour = tuple[int, int, int]
Points = npt.NDArray[np.float64]

_SKIN = ((255, 224, 196), (243, 200, 165), (226, 172, 131), (198, 137, 96), (154, 100, 66), (112, 70, 46), (82, 52, 38))
_HAIR = ((36, 26, 24), (70, 44, 30), (112, 70, 40), (160, 96, 48), (214, 170, 96), (150, 146, 146), (196, 78, 40))
_IRIS = ((92, 60, 36), (64, 96, 60), (70, 112, 150), (60, 60, 64))
_CLOTHES = ((58, 90, 140), (170, 66, 66), (74, 128, 96), (228, 186, 84), (90, 80, 120), (236, 232, 224), (52, 54, 62))
_HAIRSTYLES = ("bald", "short", "fringe", "long", "curly", "bun")

# Enough points to make polygons look round on the largest canvas.
_ARC = np.linspace(0, 2 * math.pi, 49)
_T = np.linspace(-1, 1, 15)


def write_sample(dest: Path, *, train: int, val: int, image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
    """Write a folder of the AffectNetFused layout with drawn faces.

    A face depends on (seed, split, number, image_size) alone, so a sample is the first part of every larger one.
    The folder is written atomically.

    Args:
        dest: folder to make; must not exist.
        train: faces in the training split.
        val: faces in the validation split.
        image_size: side of the square images, px.
        seed: seed of all random numbers.

    Raises:
        UserError: dest exists, or cannot be written.
    """
    with atomic_folder(dest) as folder:
        for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
            _write_split(folder / SPLITS[split], count, image_size, (seed, number))


def sample_folder() -> Path:
    """Return the folder of the built-in sample, which is made once in the cache: 2,000 and 500 faces of 64 px."""
    folder = cache_folder() / _SAMPLE
    if not folder.exists():
        try:
            write_sample(folder, train=TRAIN, val=VAL)
        except UserError:
            if not folder.exists():  # else another process was faster, with the same faces
                raise
    return folder


def is_of_sample(store: Path) -> bool:
    """Tell whether a packed store, named after the folder of its faces, has those of the built-in sample."""
    return store.name.startswith(_SAMPLE)


def _write_split(folder: Path, count: int, image_size: int, key: tuple[int, int]) -> None:
    images, annotations = folder / "images", folder / "annotations"
    images.mkdir(parents=True)
    annotations.mkdir()
    points = np.empty((count, 2))
    for index in range(count):
        rng = np.random.default_rng((*key, index))
        points[index] = valence, arousal = draw_point(rng)
        Image.fromarray(draw_face(valence, arousal, rng, image_size)).save(images / f"{index}.jpg", quality=92)
    for index, probs in enumerate(label_distribution(points[:, 0], points[:, 1]).tolist()):
        (annotations / f"{index}_prob_rank.txt").write_text(",".join(map(repr, probs)) + "\n")


def draw_point(rng: np.random.Generator) -> tuple[float, float]:
    """Draw valence and arousal in [-1, 1] from the Gaussian of a uniformly drawn class."""
    v_mean, v_std, a_mean, a_std = list(VALENCE_AROUSAL.values())[rng.integers(len(VALENCE_AROUSAL))]
    while True:
        valence, arousal = float(rng.normal(v_mean, v_std)), float(rng.normal(a_mean, a_std))
        if abs(valence) <= 1 and abs(arousal) <= 1:
            return valence, arousal


@dataclass(frozen=True)
class _Person:
    """Features of a face other than its expression. The unit of length is half the height of the head."""

    skin: Colour
    hair: Colour
    iris: Colour
    clothes: Colour
    hairstyle: str
    glasses: bool
    half_width: float
    squareness: float
    jaw: float
    eye_gap: float
    eye_size: float
    brow_rest: float
    brow_weight: float
    nose: float
    mouth_rest: float
    mouth_width: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Person":
        return cls(
            skin=_between(_SKIN, rng),
            hair=_between(_HAIR, rng),
            iris=_IRIS[rng.integers(len(_IRIS))],
            clothes=_CLOTHES[rng.integers(len(_CLOTHES))],
            hairstyle=_HAIRSTYLES[rng.integers(len(_HAIRSTYLES))],
            glasses=bool(rng.random() < 0.2),
            half_width=rng.uniform(0.74, 0.88),
            squareness=rng.uniform(2.0, 2.7),
            jaw=rng.uniform(0.0, 0.22),
            eye_gap=rng.uniform(0.31, 0.37),
            eye_size=rng.uniform(0.85, 1.15),
            brow_rest=rng.uniform(-0.03, 0.03),
            brow_weight=rng.uniform(0.045, 0.08),
            nose=rng.uniform(0.16, 0.26),
            mouth_rest=rng.uniform(-0.04, 0.04),
            mouth_width=rng.uniform(0.9, 1.1),
        )


def _between(palette: tuple[Colour, ...], rng: np.random.Generator) -> Colour:
    """Draw a colour by linear interpolation in a palette."""
    whole, part = divmod(rng.uniform(0, len(palette) - 1), 1)
    return _mix(palette[int(whole)], palette[int(whole) + 1], part)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour that is `share` of b and the rest a."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class _Canvas:
    """Draw shapes in the head's coordinates: origin between the ears, x right, y down, half the height is one."""

    draw: ImageDraw.ImageDraw
    to_pixels: Callable[[Points], Points]
    scale: float  # px per unit

    def fill(self, points: Points, colour: Colour) -> None:
        self.draw.polygon(self.to_pixels(points).ravel().tolist(), fill=colour)

    def line(self, points: Points, colour: Colour, width: float) -> None:
        pixels, thick = self.to_pixels(points), max(1, round(width * self.scale))
        self.draw.line(pixels.ravel().tolist(), fill=colour, width=thick, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self.draw.circle((x, y), thick / 2 - 0.5, fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.fill(np.stack([x + rx * np.cos(_ARC), y + ry * np.sin(_ARC)], axis=1), colour)


def draw_face(valence: float, arousal: float, rng: np.random.Generator, image_size: int) -> npt.NDArray[np.uint8]:
    """Draw a face: its expression comes from valence and arousal, everything else from the generator.

    Returns:
        [H, W, 3], RGB.
    """
    person = _Person.draw(rng)
    # Draw it larger and average it down, because the drawing has hard edges.
    fine = max(2, math.ceil(256 / image_size))
    size = fine * image_size
    scale = size * rng.uniform(0.31, 0.38)
    tilt = rng.normal(0, 0.1)
    centre = size * (np.array([0.5, 0.51]) + rng.normal(0, 0.025, 2))
    turn = scale * np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])

    wall = _mix((70, 80, 100), (245, 240, 230), rng.random())
    image = Image.new(
        "RGB", (size, size), tuple(int(c + d) for c, d in zip(wall, rng.integers(-20, 11, 3), strict=True))
    )
    canvas = _Canvas(ImageDraw.Draw(image), lambda points: points @ turn + centre, scale)
    if rng.random() < 0.5:
        edge, slope = rng.uniform(-1, 1, 2)
        strip = np.array([[-4, edge - 4 * slope], [4, edge + 4 * slope], [4, 5], [-4, 5]])
        canvas.fill(strip, _mix(wall, (120, 110, 100), 0.4))
    _draw_head(canvas, person, valence, arousal)
    _draw_eyes(canvas, person, valence, arousal)
    _draw_mouth(canvas, person, valence, arousal)

    y, x = np.mgrid[-1 : 1 : image_size * 1j, -1 : 1 : image_size * 1j]
    angle = rng.uniform(0, 2 * math.pi)
    light = rng.uniform(0.8, 1.04) * (1 + rng.uniform(0, 0.2) * (x * math.cos(angle) + y * math.sin(angle)))
    pixels = np.asarray(image.reduce(fine), dtype=np.float64) * light[..., None]
    pixels += rng.normal(0, rng.uniform(1, 7), (image_size, image_size, 1))
    face: npt.NDArray[np.uint8] = pixels.clip(0, 255).round().astype(np.uint8)
    return face


def _skin(person: _Person, valence: float, arousal: float) -> Colour:
    """Return a skin colour: flushed if valence is low and arousal high, pale if both are low."""
    tense = max(-valence, 0) * arousal
    return (
        _mix(person.skin, (214, 60, 44), 0.45 * tense)
        if tense > 0
        else _mix(person.skin, (150, 168, 190), -0.6 * tense)
    )


def _draw_head(canvas: _Canvas, person: _Person, valence: float, arousal: float) -> None:
    skin, hair = _skin(person, valence, arousal), person.hair
    shade = _mix(skin, (60, 30, 30), 0.18)
    cos, sin = np.cos(_ARC), np.sin(_ARC)
    x = person.half_width * np.sign(cos) * np.abs(cos) ** (2 / person.squareness)
    y = np.sign(sin) * np.abs(sin) ** (2 / person.squareness)
    head = np.stack([x * (1 - person.jaw * np.maximum(y, 0) ** 2), y], axis=1)
    wide = person.half_width

    if person.hairstyle == "long":
        canvas.fill(head * (1.22, 1.12), hair)
        canvas.fill(np.array([[-wide * 1.2, 0], [wide * 1.2, 0], [wide * 1.25, 1.35], [-wide * 1.25, 1.35]]), hair)
    if person.hairstyle == "bun":
        canvas.ellipse(0, -1.15, 0.32, 0.28, hair)
    canvas.ellipse(0, 1.95, 1.25, 0.75, person.clothes)
    canvas.fill(np.array([[-0.3, 0.6], [0.3, 0.6], [0.34, 1.3], [0, 1.45], [-0.34, 1.3]]), shade)
    if person.hairstyle == "curly":
        for angle in np.linspace(1.0, 2.0, 11) * math.pi:
            canvas.ellipse(wide * math.cos(angle), -0.12 + 0.86 * math.sin(angle), 0.27, 0.27, hair)
    for side in (-1, 1):
        canvas.ellipse(side * wide, 0.05, 0.13, 0.2, skin)
        canvas.ellipse(side * wide, 0.05, 0.06, 0.11, shade)
    canvas.fill(head, skin)
    glow = _mix(skin, (240, 90, 90), 0.1 + 0.4 * max(valence, 0))
    for side in (-1, 1):
        canvas.ellipse(side * 0.5 * wide / 0.8, 0.3, 0.17, 0.12, glow)

    if person.hairstyle != "bald":
        # The hairline, from the right temple to the left, closes the upper half of a slightly larger head.
        top = head[len(head) // 2 :] * (1.05, 1.07)
        across = np.linspace(1.0, -1.0, 15)
        low = {"short": -0.66, "fringe": -0.5, "long": -0.62, "curly": -0.58, "bun": -0.7}[person.hairstyle]
        bend = 0.06 if person.hairstyle == "fringe" else 0.25
        line = np.stack(
            [across * wide, low + bend * across**2 + 0.3 * np.maximum(np.abs(across) - 0.8, 0) / 0.2], axis=1
        )
        canvas.fill(np.concatenate([top, line]), hair)

    canvas.line(np.array([[0.02, 0.0], [0.08, person.nose], [-0.05, person.nose + 0.03]]), shade, 0.035)


def _draw_eyes(canvas: _Canvas, person: _Person, valence: float, arousal: float) -> None:
    skin = _skin(person, valence, arousal)
    dark = _mix(skin, (30, 16, 16), 0.75)
    frown = 0.32 * math.tanh(2.5 * max(-valence, 0) * arousal)  # inner ends down: tense; up: sad
    width = 0.2 * person.eye_size
    upper = (0.05 + 0.065 * (arousal + 1)) * person.eye_size
    lower = (0.09 - 0.045 * max(valence, 0)) * person.eye_size  # smiling lifts the lower lid
    arch = 1 - _T**2
    far = np.stack([1.1 * width * np.cos(_ARC[:25]), 0.24 * person.eye_size * np.sin(_ARC[:25])], axis=1)
    for side in (-1, 1):
        x, y = centre = np.array([side * person.eye_gap, -0.1])
        above = np.stack([x + width * _T, y - upper * arch], axis=1)
        below = np.stack([x + width * _T, y + lower * arch], axis=1)
        canvas.fill(np.concatenate([above, below[::-1]]), (250, 250, 248))
        canvas.ellipse(x, y - 0.01, 0.115, 0.115, person.iris)
        canvas.ellipse(x, y - 0.01, 0.06, 0.06, (16, 14, 16))
        canvas.ellipse(x - 0.035, y - 0.05, 0.028, 0.028, (255, 255, 255))
        # Lids cover the parts of the iris outside of the eye's opening.
        canvas.fill(np.concatenate([above, centre + far * (1, -1)]), skin)
        canvas.fill(np.concatenate([below, centre + far]), skin)
        canvas.line(above, dark, 0.035)
        canvas.line(below, _mix(skin, dark, 0.4), 0.015)

        height = -0.36 - 0.1 * arousal + person.brow_rest
        brow_x = 0.24 * _T
        brow_y = height - side * frown * _T * 0.5 - 0.05 * arch + 0.1 * abs(frown)
        canvas.line(np.stack([x + brow_x, brow_y], axis=1), _mix(person.hair, (30, 20, 20), 0.4), person.brow_weight)
        if person.glasses:
            rim = np.stack([x + 0.28 * np.cos(_ARC), y + 0.25 * np.sin(_ARC)], axis=1)
            canvas.line(rim, (40, 40, 46), 0.035)
            temple = np.array([[x + side * 0.28, y], [side * person.half_width, y - 0.04]])
            canvas.line(temple, (40, 40, 46), 0.035)
    if person.glasses:
        inner = person.eye_gap - 0.28
        canvas.line(np.array([[-inner, -0.12], [inner, -0.12]]), (40, 40, 46), 0.035)


def _draw_mouth(canvas: _Canvas, person: _Person, valence: float, arousal: float) -> None:
    lips = _mix(_skin(person, valence, arousal), (196, 60, 76), 0.6)
    bend = 0.2 * valence + person.mouth_rest
    gap = 0.34 * max(arousal, 0) ** 1.3
    width = person.mouth_width * (0.34 + 0.07 * valence - 0.07 * max(arousal, 0))
    x, arch = width * _T, 1 - _T**2
    middle = 0.52 + bend * (arch - 0.5)
    above, below = middle - 0.3 * gap * arch, middle + 0.7 * gap * arch**0.7
    if gap > 0.02:
        canvas.fill(np.stack([np.r_[x, x[::-1]], np.r_[above, below[::-1]]], axis=1), (84, 20, 28))
        teeth = np.minimum(above + 0.3 * gap, below)
        canvas.fill(np.stack([np.r_[x, x[::-1]], np.r_[above, teeth[::-1]]], axis=1), (250, 248, 240))
        tongue = np.maximum(below - 0.3 * gap * arch, above)[3:-3]
        canvas.fill(np.stack([np.r_[x[3:-3], x[-4:2:-1]], np.r_[tongue, below[-4:2:-1]]], axis=1), (206, 90, 96))
    canvas.line(np.stack([x, below], axis=1), lips, 0.05)
    canvas.line(np.stack([x, above], axis=1), lips, 0.04)
