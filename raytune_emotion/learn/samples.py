"""Draw sample predictions of a run for TensorBoard: validation faces with true and predicted distributions."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from raytune_emotion.data.store import Store
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import read_kept_predictions
from raytune_emotion.learn.events import EventWriter

TAG = "validation/samples"
_COUNT, _COLUMNS = 8, 2
#: Height of a class's row, width of its name, length of its longest bar, and space around a face; px.
_ROW, _NAME, _BAR, _SPACE = 13, 84, 110, 10
_TRUE, _PREDICTED, _INK, _PAPER = (150, 160, 170), (230, 120, 40), (40, 40, 40), (255, 255, 255)


def write_samples(events: EventWriter, folder: Path, store: Store) -> None:
    """Write a picture of predictions of a run's best evaluation. If that fails, write none."""
    with contextlib.suppress(OSError, UserError):
        kept = read_kept_predictions(folder)
        if kept is None or len(kept[1]) != len(store.val):
            return
        number, prob_NK = kept
        # The faces are the same for every trial of a study.
        rows = np.unique(np.linspace(0, len(store.val) - 1, _COUNT).astype(np.int64))
        picture = draw_samples(
            store.val.gather(rows), store.val.prob_NK[rows], prob_NK[rows.tolist()].numpy(), store.classes
        )
        events.write_picture(TAG, picture, number)


def draw_samples(
    images_NHWC: npt.NDArray[np.uint8],
    true_NK: npt.NDArray[np.floating],
    predicted_NK: npt.NDArray[np.floating],
    classes: Sequence[str],
) -> npt.NDArray[np.uint8]:
    """Draw each face beside its true (grey) and predicted (orange) distribution, in two columns.

    Returns:
        [H, W, 3], uint8.
    """
    side = _ROW * len(classes)
    width, height = side + _NAME + _BAR + 3 * _SPACE, side + _SPACE
    lines = -(-len(images_NHWC) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width, lines * height + _SPACE), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for n, image in enumerate(images_NHWC):
        left, top = n % _COLUMNS * width + _SPACE, n // _COLUMNS * height + _SPACE
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), (left, top))
        names = left + side + _SPACE
        for k, name in enumerate(classes):
            y = top + k * _ROW
            draw.text((names, y), name[:14], _INK, font)
            for prob, colour, up in ((true_NK[n, k], _TRUE, 1), (predicted_NK[n, k], _PREDICTED, 6)):
                length = round(_BAR * float(prob))
                draw.rectangle((names + _NAME, y + up, names + _NAME + length, y + up + 4), colour)
    return np.asarray(sheet)
