"""Small folders of faces as AffectNetFused has them."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from raytune_emotion.data.affectnet import SPLITS

UNIFORM = ",".join(["0.076923"] * 13) + "\n"


def picture(seed, size=(20, 20)):
    """Make an image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_row(folder: Path, split, id_, text=UNIFORM, suffix="png", size=(20, 20)):
    """Write one row: a good one, unless `text` says otherwise."""
    images, annotations = folder / SPLITS[split] / "images", folder / SPLITS[split] / "annotations"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    picture(zlib.crc32(str(id_).encode()), size).save(images / f"{id_}.{suffix}")
    (annotations / f"{id_}_prob_rank.txt").write_text(text)


def write_folder(folder: Path, train=6, val=3):
    """Write a folder of good rows."""
    for i in range(train):
        write_row(folder, "train", i)
    for i in range(val):
        write_row(folder, "val", 1000 + i)
    return folder
