"""Training images a second of `fit` as it runs in a trial, against a bare loop on one synthetic batch.

The bare loop is forward pass, loss, backward pass and step of the optimizer in the same precision, on one batch that
lies in memory: no loader, no augmentation, no clipping of gradients, no sum of the loss. `fit` does all of that, once
with the default settings (mirror images) and once with those of a study (crops, erasing, clipping). The plain loop is
the bare one as people write it first: fp32, the memory format and the optimizer that torch has by default.

All take turns, report by report, in one process that keeps the memory it frees, as trials do. On a CPU it has one
thread and is held on one core, so that the loader's thread has no core of its own. A ratio is the median over the turns
of those within a turn.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim import AdamW

from benchmarks import Table
from raytune_emotion.config import RunConfig
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.learn import losses, malloc
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.optim import build_optimizer


@dataclass(frozen=True)
class Setup:
    """What is measured on a kind of device."""

    size: int  # px
    rows: int
    repeats: int  # of the rows, in an epoch
    batch: int
    turns: int
    backbones: dict[str, int]  # and into how many reports an epoch is cut, so that a turn takes about a second at most


SETUPS = {
    "cpu": Setup(48, 1024, 1, 32, 7, {"test_resnet": 1, "test_byobnet": 1, "resnet10t": 4}),
    "cuda": Setup(224, 1024, 8, 64, 4, {"resnet18": 1, "resnet50": 2, "efficientnet_b0": 2, "vit_base_patch16_224": 8}),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETUP = SETUPS[DEVICE.type]
PRECISIONS = ("fp32", "bf16")
STUDY = {"augment.crop_scale": 0.9, "augment.erase": 0.15, "train.grad_clip": 5, "optim.weight_decay": 0.05}


def run() -> Table:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        command = [sys.executable, "-m", "benchmarks.training", str(faces(Path(scratch)))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for (backbone, precision), turns in json.loads(done.stdout):
        for way, rates in turns.items():
            ratios = [[rate / other for rate, other in zip(rates, turns[to], strict=True)] for to in ("bare", "plain")]
            rows.append(
                (backbone, precision, way, statistics.median(rates), *_summary(ratios[0]), statistics.median(ratios[1]))
            )
    columns = ("model", "precision", "way", "images/s", "times bare", "least", "most", "times plain")
    notes = [f"{SETUP.size} px, batches of {SETUP.batch}, {SETUP.turns} turns."]
    return Table(columns, rows, notes)


def faces(scratch: Path) -> Path:
    """Packs drawn faces of the setup's size, and returns their store."""
    write_sample(scratch / "faces", train=SETUP.rows, val=8, image_size=SETUP.size)
    return pack(scratch / "faces", scratch / "store", image_size=SETUP.size).path


def open_repeated(path: Path) -> Store:
    """The store with its training rows as often as the setup says."""
    store, times = open_store(path), SETUP.repeats
    train = store.train
    repeated = dataclasses.replace(
        train, ids=[*train.ids] * times, prob_NK=np.tile(train.prob_NK, (times, 1)), shards=train.shards * times
    )
    return dataclasses.replace(store, train=repeated)


def config(backbone: str, precision: str, **settings: object) -> RunConfig:
    """Of a run that never ends."""
    return RunConfig.from_flat(
        {
            "data.image_size": SETUP.size,
            "model.backbone": backbone,
            "train.batch_size": SETUP.batch,
            "train.precision": precision,
            "train.epochs": 10**6,
            "train.evals_per_epoch": SETUP.backbones[backbone],
            "loss.kl": 0.5,
            "loss.js": 0.5,
            **settings,
        }
    )


def _summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _measure(store: Store) -> list[tuple[tuple[str, str], dict[str, list[float]]]]:
    """Images a second in every turn, by model, precision and way."""
    if DEVICE.type == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    malloc.keep_freed()
    measured = []
    for backbone, precision in itertools.product(SETUP.backbones, PRECISIONS):
        settings = config(backbone, precision)
        ways = {
            "fit": _rates_of_fit(settings, store),
            "fit of a study": _rates_of_fit(config(backbone, precision, **STUDY), store),
            "bare": _rates_of_loop(settings, plain=False),
            "plain": _rates_of_loop(settings, plain=True),
        }
        turns = [{name: next(rates) for name, rates in ways.items()} for _ in range(1 + SETUP.turns)][1:]
        measured.append(((backbone, precision), {name: [turn[name] for turn in turns] for name in ways}))
    return measured


def _rates_of_fit(settings: RunConfig, store: Store) -> Iterator[float]:
    for report in fit(settings, store, device=DEVICE):
        yield report["images_per_second"]


def _rates_of_loop(settings: RunConfig, *, plain: bool) -> Iterator[float]:
    layout = torch.contiguous_format if plain else torch.channels_last
    model = build_model(settings).to(DEVICE, memory_format=layout)
    optimizer = AdamW(model.parameters()) if plain else build_optimizer(model, settings.optim)
    loss = losses.mixture(settings.loss.weights)
    batch = settings.train.batch_size
    x_BCHW = torch.randn(batch, 3, SETUP.size, SETUP.size).to(DEVICE, memory_format=layout)
    prob_BK = torch.randn(batch, len(settings.data.classes)).softmax(1).to(DEVICE)
    bf16 = settings.train.precision == "bf16" and not plain
    steps = SETUP.rows * SETUP.repeats // settings.train.evals_per_epoch // batch
    while True:
        began = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                logits_BK = model(x_BCHW)
            mean = loss(logits_BK.float(), prob_BK).mean()
            mean.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean.item()  # on a GPU, waits for the steps
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        yield steps * batch / (time.perf_counter() - began)


def _main(store: str) -> None:
    print(json.dumps(_measure(open_repeated(Path(store)))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
