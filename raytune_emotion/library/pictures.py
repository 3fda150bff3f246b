"""Draw predictions and training curves as matplotlib figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.learn.figures import make_figure
from raytune_emotion.library.metrics import MetricsCalculator, Probabilities
from raytune_emotion.storage.atomic import atomic_write, destination_error

_TRUE, _PREDICTED = "#1f6f8b", "#d1495b"


def visualize_predictions(
    images: Tensor | npt.NDArray[Any],
    predictions: Probabilities,
    targets: Probabilities,
    num_samples: int = 4,
    save_path: str | Path | None = None,
    *,
    classes: Sequence[str] = EMOTIONS,
) -> Figure:
    """Draw faces with their true and predicted distributions, and the JS between them, in bits.

    Args:
        images: [N, 3, H, W] or [N, H, W, 3]: RGB, float in [0, 1] or uint8.
        predictions: [N, K], probabilities.
        targets: [N, K], probabilities.
        num_samples: number of faces to draw, at most; the first ones are drawn.
        save_path: file to write; its suffix determines the format, such as png or pdf.
        classes: K names.

    Raises:
        UserError: the shapes do not fit together, or the file cannot be written.
    """
    pixels, q_NK, p_NK = (_array(given) for given in (images, predictions, targets))
    if not isinstance(num_samples, int | np.integer) or num_samples < 1:
        raise UserError(f"num_samples: expected a positive integer, got {num_samples!r}")
    if pixels.ndim != 4 or len(pixels) != len(q_NK) or 3 not in (pixels.shape[1], pixels.shape[3]):
        raise UserError(
            f"images: expected [{len(q_NK)}, 3, H, W] or [{len(q_NK)}, H, W, 3], got {[*pixels.shape]}; give an image "
            f"for each prediction"
        )
    js_N = MetricsCalculator(["js"]).compute_per_sample(predictions, targets)["js"].tolist()
    if q_NK.shape[1] != len(classes):
        raise UserError(f"classes: expected {q_NK.shape[1]} names, one a column, got {len(classes)}")
    if pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    count = min(num_samples, len(pixels))
    figure, grid = make_figure(2.6 * count + 1, 5.2, count, 2)
    places = np.arange(len(classes))
    for i, (face, bars) in enumerate(zip(grid[:count], grid[count:], strict=True)):
        face.imshow(pixels[i] if pixels.dtype == np.uint8 else pixels[i].clip(0, 1))
        face.set_title(f"JS {js_N[i]:.3f} bits", fontsize=9)
        face.axis("off")
        bars.barh(places - 0.2, p_NK[i], 0.4, color=_TRUE, label="true")
        bars.barh(places + 0.2, q_NK[i], 0.4, color=_PREDICTED, label="predicted")
        bars.set(yticks=places, yticklabels=classes if i == 0 else [], xlabel="probability", xlim=(0, 1))
        bars.invert_yaxis()
    grid[count].legend(frameon=False, fontsize=8)
    return _save(figure, save_path)


def plot_training_curves(
    history: Mapping[str, Sequence[float]] | Sequence[Mapping[str, Any]], save_path: str | Path | None = None
) -> Figure:
    """Draw the losses, the metrics JS (bits) and KL (nats), and the learning rate, against the epoch.

    Args:
        history: result of `Trainer.train`, or the reports of a trial.
        save_path: file to write; its suffix determines the format, such as png or pdf.

    Raises:
        UserError: the history has no epoch, or the file cannot be written.
    """
    table = pd.DataFrame(history)
    if table.empty:
        raise UserError("history: expected at least one epoch, got none")
    epochs = table["epoch"] if "epoch" in table else pd.Series(range(1, len(table) + 1))
    figure, (losses, metrics, rate) = make_figure(11, 3.2, 3, 1)
    for axes, names, title in (
        (losses, ("train_loss", "val_loss"), "loss"),
        (metrics, ("val_js", "val_kl"), "validation: JS in bits, KL in nats"),
        (rate, ("lr",), "learning rate"),
    ):
        for name in names:
            if name in table:
                axes.plot(epochs, table[name], marker="o", markersize=3, label=name)
        axes.set(xlabel="epoch", title=title)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return _save(figure, save_path)


def _array(given: Any) -> npt.NDArray[Any]:
    if not isinstance(given, Tensor):
        return np.asarray(given)
    # NumPy has no bfloat16.
    return (given.float() if given.dtype == torch.bfloat16 else given).detach().cpu().numpy()


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        file = Path(path)
        known = figure.canvas.get_supported_filetypes()
        kind = file.suffix.removeprefix(".").lower() or "png"
        if kind not in known:
            raise UserError(f"{file}: expected one of the suffixes {', '.join(sorted(known))}; choose another name")
        try:
            with atomic_write(file) as temporary:
                figure.savefig(temporary, dpi=110, format=kind)
        except OSError as error:
            # Without the name of the temporary file, which nobody has asked for.
            raise destination_error(file, OSError(error.errno, error.strerror)) from error
    return figure
