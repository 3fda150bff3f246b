"""Sample predictions in TensorBoard."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raytune_emotion.learn import samples
from raytune_emotion.learn.events import EventWriter
from raytune_emotion.learn.run_folder import PREDICTIONS, read_history
from raytune_emotion.learn.samples import TAG, draw_samples, write_samples
from raytune_emotion.tuning.execution.job import Job, train_here
from raytune_emotion.tuning.execution.resources import Resources


@pytest.fixture
def job(tmp_path, store):
    settings = {
        "data.image_size": 32, "model.backbone": "test_resnet", "model.pretrained": False, "optim.lr": 3e-3,
        "train.epochs": 3, "train.batch_size": 32,
    }  # fmt: skip
    return Job("a trial", str(tmp_path / "trial"), str(store.path), settings, Resources(1, 1.0, 0.0))


def pictures(folder):
    read = EventAccumulator(str(folder))
    read.Reload()
    return [event for tag in read.Tags()["images"] if tag == TAG for event in read.Images(tag)]


def test_a_trial_leaves_a_picture_of_its_best_evaluation(job, tmp_path):
    with contextlib.closing(train_here(job)) as reports:
        next(reports)
        next(reports)  # and is stopped, as by the scheduler
    (picture,) = pictures(tmp_path / "trial")
    assert picture.step == read_history(tmp_path / "trial")[-1]["best_report"]
    image = Image.open(io.BytesIO(picture.encoded_image_string))
    assert image.size == (picture.width, picture.height)
    assert len(picture.encoded_image_string) < 300_000


def test_bars_are_as_long_as_probabilities():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    drawn = draw_samples(images, np.array([[1.0, 0.0]]), np.array([[0.25, 0.75]]), ("calm", "tense"))
    lengths = {
        colour: [int((line == colour).all(-1).sum()) for line in drawn if (line == colour).all(-1).any()]
        for colour in (samples._TRUE, samples._PREDICTED)
    }
    assert {*lengths[samples._TRUE]} == {samples._BAR + 1, 1}
    assert {*lengths[samples._PREDICTED]} == {round(samples._BAR * 0.25) + 1, round(samples._BAR * 0.75) + 1}


@pytest.mark.parametrize("damage", [None, b"", b"not safetensors"])
def test_predictions_that_cannot_be_read_make_no_picture(damage, tmp_path, store):
    if damage is not None:
        (tmp_path / PREDICTIONS).write_bytes(damage)
    with EventWriter(tmp_path) as events:
        write_samples(events, tmp_path, store)
    assert pictures(tmp_path) == []
