import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raytune_emotion import plot_training_curves, visualize_predictions
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError

IMAGES, PREDICTED, TRUE = torch.rand(6, 3, 16, 16), torch.rand(6, 13).softmax(-1), torch.rand(6, 13).softmax(-1)
HISTORY = {"epoch": [1, 2], "train_loss": [2.0, 1.0], "val_loss": [2.0, 1.5], "val_js": [0.5, 0.4], "lr": [0.1, 0.1]}


def test_faces_stand_above_true_and_predicted_distributions(tmp_path):
    figure = visualize_predictions(IMAGES, PREDICTED, TRUE, num_samples=3, save_path=tmp_path / "a.png")
    faces, bars = figure.axes[:3], figure.axes[3:]
    np.testing.assert_allclose(faces[1].images[0].get_array(), IMAGES[1].permute(1, 2, 0), atol=1e-6)
    widths = [bar.get_width() for bar in bars[1].patches]
    np.testing.assert_allclose(widths, torch.cat([TRUE[1], PREDICTED[1]]), atol=1e-6)
    assert [label.get_text() for label in bars[0].get_yticklabels()] == [*EMOTIONS]
    assert Image.open(tmp_path / "a.png").size[0] > 300
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "images",
    [IMAGES, IMAGES.numpy(), IMAGES.permute(0, 2, 3, 1), (IMAGES * 255).to(torch.uint8)],
    ids=["tensor", "array", "channels last", "bytes"],
)
def test_images_come_in_every_usual_layout(images):
    assert len(visualize_predictions(images, PREDICTED, TRUE).axes) == 8


def test_predictions_may_be_of_half_precision():
    bars = visualize_predictions(IMAGES[:1], PREDICTED[:1].bfloat16(), TRUE[:1].half()).axes[1]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], torch.cat([TRUE[0], PREDICTED[0]]), rtol=0.01)


def test_fewer_images_than_samples_are_all_drawn():
    assert len(visualize_predictions(IMAGES[:1], PREDICTED[:1], TRUE[:1]).axes) == 2


@pytest.mark.parametrize(
    ("images", "options", "what"),
    [
        (IMAGES[:2], {}, "images: expected"),
        (IMAGES[:, :1], {}, "images: expected"),
        (IMAGES, {"num_samples": 0}, "num_samples: expected a positive integer"),
        (IMAGES, {"num_samples": 1.5}, "num_samples: expected a positive integer"),
        (IMAGES, {"save_path": "none/v.png"}, r"^none/v.png: cannot be written \(No such file or directory\); name"),
        (IMAGES, {"classes": ("a", "b")}, "classes: expected 13 names"),
    ],
)
def test_what_does_not_fit_is_refused(images, options, what):
    with pytest.raises(UserError, match=what):
        visualize_predictions(images, PREDICTED, TRUE, **options)


@pytest.mark.parametrize("history", [HISTORY, pd.DataFrame(HISTORY).to_dict("records")], ids=["lists", "reports"])
def test_curves_are_drawn_of_a_history_and_of_reports(history, tmp_path):
    figure = plot_training_curves(history, save_path=tmp_path / "curves.pdf")
    losses, metrics, rate = figure.axes
    assert [[*line.get_ydata()] for line in losses.lines] == [[2.0, 1.0], [2.0, 1.5]]
    assert [[*line.get_ydata()] for line in metrics.lines] == [[0.5, 0.4]]
    assert [line.get_label() for line in rate.lines] == ["lr"]
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_a_history_without_epochs_and_an_unknown_suffix_are_refused(tmp_path):
    with pytest.raises(UserError, match="history: expected at least one epoch"):
        plot_training_curves({})
    with pytest.raises(UserError, match="expected one of the suffixes"):
        plot_training_curves(HISTORY, save_path=tmp_path / "curves.doc")
    assert not [*tmp_path.iterdir()]
