import torch

from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.metrics import distances_of, per_sample
from raytune_emotion.learn.report import DRIVER_KEYS, OBJECTIVE, Report


def test_the_driver_hears_the_objective():
    assert OBJECTIVE in DRIVER_KEYS


def test_the_type_of_a_report_names_every_metric():
    prob_BK = torch.full((1, len(EMOTIONS)), 1 / len(EMOTIONS))
    metrics = per_sample(torch.zeros(1, len(EMOTIONS)), prob_BK, distances_of(EMOTIONS))
    named = {name for name in Report.__annotations__ if name.startswith("val_")}
    assert named == {f"val_{name}" for name in metrics}
