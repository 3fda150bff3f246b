"""One short training run, and what of it is compared."""

import dataclasses

import numpy as np
import torch
from safetensors.torch import load_file

from raytune_emotion.config import RunConfig
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.run_folder import LAST
from tests.support.reports import without_clocks

CPU = torch.device("cpu")


EVERYTHING = {
    "train__evals_per_epoch": 2,
    "train__epochs": 3,
    "model__dropout": 0.3,
    "augment__crop_scale": 0.6,
    "augment__colour": 0.4,
    "augment__erase": 0.3,
    "augment__mixup": 0.4,
}


def run_config(**changes):
    """Make the settings of a run of two epochs; 96 rows are 6 steps an epoch."""
    flat = {
        "data.image_size": 32,
        "model.backbone": "test_resnet",
        "train.batch_size": 16,
        "train.epochs": 2,
        "loss.kl": 1.0,
    }
    return RunConfig.from_flat(flat | {key.replace("__", "."): value for key, value in changes.items()})


def reports_of_run(settings, store, folder=None, stop=None):
    """Train, all the way or until report `stop`, and return the reports without their clocks."""
    reports = []
    iterator = fit(settings, store, device=CPU, folder=folder)
    for report in iterator:
        reports.append(report)
        if len(reports) == stop:
            iterator.close()
    return without_clocks(reports)


def state_of(folder):
    return load_file(folder / LAST)


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def shortened(store, rows):
    """Return the store with its first training rows only, in memory."""
    pixels, prob_NK = store.train.gather(np.arange(rows)), store.train.prob_NK[:rows].copy()
    train = dataclasses.replace(store.train, ids=store.train.ids[:rows], prob_NK=prob_NK, shards=(pixels,))
    return dataclasses.replace(store, train=train)
