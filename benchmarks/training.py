"""Training images a second of `fit`, against a bare loop on one synthetic batch; and of trials side by side.

The bare loop is forward pass, loss, backward pass and step of the optimizer, on one batch that lies in memory: no
loader, no augmentation, no clipping of gradients, no sum of the loss. `fit` does all of that, once with the default
settings (mirror images) and once with those of a study (crops, erasing, clipping). All three take turns, report by
report, in one process of one thread that is held on one core, so that the loader's thread has no core of its own. A
ratio is the median over the turns of those within a turn.

Trials side by side are processes of their own, held on no core, that train at the same time: their images a second are
added up.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import Table
from raytune_emotion.config import RunConfig
from raytune_emotion.data.sample import write_sample
from raytune_emotion.data.store import Store, open_store, pack
from raytune_emotion.learn import losses
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.optim import build_optimizer

SIZE = 48
ROWS = 1024
TURNS = 5
#: Backbones, and into how many reports an epoch is cut, so that a turn takes a fraction of a second.
BACKBONES = {"test_resnet": 4, "test_byobnet": 4, "resnet10t": 8}
BATCHES = (32, 64)
PRECISIONS = ("fp32", "bf16")
STUDY = {"augment.crop_scale": 0.9, "augment.erase": 0.15, "train.grad_clip": 5, "optim.weight_decay": 0.05}
SIDE_BY_SIDE = (("test_resnet", 32),)
SECONDS = 0.7
SIDE_TURNS = 5

_CPU = torch.device("cpu")


def run() -> Table:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        write_sample(Path(scratch) / "faces", train=ROWS, val=8, image_size=SIZE)
        store = pack(Path(scratch) / "faces", Path(scratch) / "store", image_size=SIZE).path
        done = subprocess.run(_command("alone", store), stdout=subprocess.PIPE, text=True, check=True)
        for label, turns in json.loads(done.stdout).items():
            rows += [(label, name, *_summary(rates, turns["bare loop"])) for name, rates in turns.items()]
        for backbone, batch in SIDE_BY_SIDE:
            turns = _side_by_side(backbone, batch, store)
            label = f"{backbone}, {batch} rows, fp32"
            rows += [(label, name, *_summary(rates, turns["1 trial, 1 thread"])) for name, rates in turns.items()]
    columns = ("model", "way", "images/s", "least", "most", "ratio", "least ", "most ")
    notes = [
        f"{SIZE} px. The ratio is to the bare loop, and of trials side by side to one trial of one thread.",
        f"{os.cpu_count()} cores.",
    ]
    return Table(columns, rows, notes)


def _summary(rates: list[float], references: list[float]) -> tuple[float, ...]:
    ratios = [rate / reference for rate, reference in zip(rates, references, strict=True)]
    return (*(f(rates) for f in (statistics.median, min, max)), *(f(ratios) for f in (statistics.median, min, max)))


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.training", *map(str, arguments)]


def _config(backbone: str, batch: int, precision: str, **settings: object) -> RunConfig:
    return RunConfig.from_flat(
        {
            "data.image_size": SIZE,
            "model.backbone": backbone,
            "train.batch_size": batch,
            "train.precision": precision,
            "train.epochs": 10**6,
            "train.evals_per_epoch": BACKBONES[backbone],
            "loss.kl": 0.5,
            "loss.js": 0.5,
            **settings,
        }
    )


# ---- one trial and the bare loop


def _alone(store: Store) -> dict[str, dict[str, list[float]]]:
    """Images a second in every turn, by model and way."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    measured = {}
    for backbone, batch, precision in itertools.product(BACKBONES, BATCHES, PRECISIONS):
        plain = _config(backbone, batch, precision)
        ways = {
            "fit": _rates_of_fit(plain, store),
            "fit of a study": _rates_of_fit(_config(backbone, batch, precision, **STUDY), store),
            "bare loop": _rates_of_bare_loop(plain, ROWS // BACKBONES[backbone]),
        }
        turns = [{name: next(rates) for name, rates in ways.items()} for _ in range(1 + TURNS)][1:]
        measured[f"{backbone}, {batch} rows, {precision}"] = {name: [turn[name] for turn in turns] for name in ways}
    return measured


def _rates_of_fit(config: RunConfig, store: Store) -> Iterator[float]:
    for report in fit(config, store, device=_CPU):
        yield report["images_per_second"]


def _rates_of_bare_loop(config: RunConfig, images: int) -> Iterator[float]:
    model = build_model(config).to(_CPU, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    loss = losses.mixture(config.loss.weights)
    batch = config.train.batch_size
    x_BCHW = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    prob_BK = torch.randn(batch, len(config.data.classes)).softmax(1)
    bf16 = config.train.precision == "bf16"
    while True:
        began = time.perf_counter()
        for _ in range(images // batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits_BK = model(x_BCHW)
            loss(logits_BK.float(), prob_BK).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield images / (time.perf_counter() - began)


# ---- trials side by side


def _side_by_side(backbone: str, batch: int, store: Path) -> dict[str, list[float]]:
    with contextlib.ExitStack() as stack:
        one, other, both = (
            stack.enter_context(_trial(backbone, batch, threads, store)) for threads in (1, 1, os.cpu_count() or 1)
        )
        cases = {
            "1 trial, 1 thread": [one],
            "2 trials, 1 thread each": [one, other],
            f"1 trial, {os.cpu_count()} threads": [both],
        }
        turns = [{name: _together(trials) for name, trials in cases.items()} for _ in range(1 + SIDE_TURNS)][1:]
    return {name: [turn[name] for turn in turns] for name in cases}


@contextlib.contextmanager
def _trial(backbone: str, batch: int, threads: int, store: Path) -> Iterator["subprocess.Popen[str]"]:
    command = _command("beside", store, backbone, batch, threads)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        _pipe(process.stdout).readline()  # it is warm
        yield process
        _pipe(process.stdin).close()


def _together(trials: list["subprocess.Popen[str]"]) -> float:
    """Images a second of trials that train at the same time, in sum."""
    for trial in trials:
        print("go", file=_pipe(trial.stdin), flush=True)
    return sum(float(_pipe(trial.stdout).readline()) for trial in trials)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _beside(store: Store, backbone: str, batch: int, threads: int) -> None:
    """Trains for some seconds whenever a line comes, and answers with the images a second, evaluation included."""
    torch.set_num_threads(threads)
    reports = fit(_config(backbone, batch, "fp32", **STUDY), store, device=_CPU)
    next(reports)
    print("warm", flush=True)
    for _ in sys.stdin:
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            next(reports)
            images += ROWS // BACKBONES[backbone]
        print(images / (time.perf_counter() - began), flush=True)


def _main(what: str, store: str, *arguments: Any) -> None:
    if what == "alone":
        print(json.dumps(_alone(open_store(Path(store)))))
    else:
        backbone, batch, threads = arguments
        _beside(open_store(Path(store)), backbone, int(batch), int(threads))


if __name__ == "__main__":
    _main(*sys.argv[1:])
