"""Draw `docs/faces.png` from a study on the drawn faces: python docs/pictures.py STUDY."""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from raytune_emotion.cli import run_guarded
from raytune_emotion.data.store import Split, open_store
from raytune_emotion.errors import UserError
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.learn.losses import js
from raytune_emotion.tuning.study.spec import read_spec

DOCS = Path(__file__).parent
#: Faces of the contact sheet: the first of the validation set that are likeliest to be these.
SHOWN = ("happy", "surprised", "sad", "angry", "contempt", "serene")
_TRUE, _PREDICTED = "#c9b79c", "#1f6f8b"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="folder of a study that has ended")
    args = parser.parse_args()
    return run_guarded(lambda: draw(args.study))


def draw(study: Path) -> None:
    """Write `faces.png` beside this file.

    Raises:
        UserError: the study is not on the generated faces; faces of people have no place here.
    """
    spec = read_spec(study)
    if spec.data != "generated faces":
        raise UserError(f"{study}: is a study on {spec.data}; the pictures show generated faces only")
    package = load_package(study / "best")
    split = open_store(Path(spec.stores[package.image_size])).val
    rows = faces(split, package.classes)
    pixels_BHWC = split.gather(rows)
    with torch.inference_mode():
        prob_BK = package.model(torch.from_numpy(pixels_BHWC))
    target_BK = torch.from_numpy(split.prob_NK[rows])
    figure = sheet(pixels_BHWC, target_BK, prob_BK, package.classes)
    figure.savefig(DOCS / "faces.png", dpi=110)
    # Few colours are in a plot: a palette makes the file a third as large.
    with Image.open(DOCS / "faces.png") as image:
        image.convert("RGB").quantize(256).save(DOCS / "faces.png", optimize=True)


def faces(split: Split, classes: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Return the first row of a split for each of SHOWN, by the target alone: none is picked for its prediction."""
    likeliest_N = split.prob_NK.argmax(axis=1)
    return np.array([int(np.flatnonzero(likeliest_N == classes.index(name))[0]) for name in SHOWN])


def sheet(
    pixels_BHWC: npt.NDArray[np.uint8], target_BK: torch.Tensor, prob_BK: torch.Tensor, classes: tuple[str, ...]
) -> Figure:
    """Faces above their distributions, true and predicted."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        grid: npt.NDArray[np.object_] = figure.subplots(2, len(SHOWN), height_ratios=(1, 1.7), sharey="row")
        for column, divergence in enumerate(js(prob_BK.log(), target_BK).tolist()):
            image: Axes = grid[0, column]
            image.imshow(pixels_BHWC[column])
            image.set_axis_off()
            image.set_title(f"JS {divergence:.3f} bits", fontsize=8)
            _bars(grid[1, column], target_BK[column], prob_BK[column], classes)
        grid[1, -1].legend(frameon=False, fontsize=7, loc="upper right")
    return figure


def _bars(axes: Axes, target_K: torch.Tensor, prob_K: torch.Tensor, classes: tuple[str, ...]) -> None:
    place_K = np.arange(len(classes))
    axes.barh(place_K - 0.2, target_K.numpy(), 0.4, color=_TRUE, label="true")
    axes.barh(place_K + 0.2, prob_K.numpy(), 0.4, color=_PREDICTED, label="predicted")
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], yticks=place_K, yticklabels=classes)
    axes.yaxis.set_inverted(True)
    axes.tick_params(labelsize=7, length=2)


if __name__ == "__main__":
    sys.exit(main())
