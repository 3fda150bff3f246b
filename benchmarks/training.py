"""Measure training images per second of `fit` as in a trial, relative to a bare loop on one synthetic batch.

The bare loop is forward pass, loss, backward pass and optimizer step in the same precision, launched operation by
operation, on one batch in memory: no loader, no augmentation, no clipping, no sum of the loss. `fit` does all of that,
once with the default settings (mirror images) and once with those of a study (crops, erasing, clipping). The plain loop
is the bare loop in its simplest form: fp32, torch's default memory format and optimizer. `evaluate` predicts in exact
fp32, once.

On a GPU, four more are measured: the bare loop, captured as a CUDA graph, as `fit` captures its steps; the body of
timm's training script (`train_one_epoch`: channels last, autocast, timm's optimizer and loss) on the same synthetic
batch, thus without the cost of its loader; `fit` of some compiled models; and all of this also at the best batch size,
the smallest one at which `fit` is almost fastest. (cuDNN's search for kernels, `cudnn.benchmark`, gained nothing.)

A turn is the training between two reports. On a CPU, all ways take turns in one process that keeps freed memory, as
trials do. It has one thread and runs on one core, so that the loader's thread has no core of its own. On a GPU, one way
takes its turns after the other, to save memory. A ratio is the median over the turns of the ratios within a turn;
`times bare` is relative to the faster bare loop.
"""

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy  # type: ignore[attr-defined]
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from torch import nn
from torch.optim import AdamW

from benchmarks import Table
from benchmarks.__main__ import measure
from raytune_emotion.config import RunConfig
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.learn import loop, losses, malloc
from raytune_emotion.learn.device import reduce_fragmentation
from raytune_emotion.learn.evaluation import means_of_metrics, predict_rows
from raytune_emotion.learn.loop import Run, make_plan, rows_to_evaluate, start, train_segment
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.optim import build_optimizer


@dataclass(frozen=True)
class Setup:
    """The measurements on a kind of device."""

    size: int  # px
    rows: int
    repeats: int  # number of repetitions of the rows in an epoch
    batch: int
    batches: tuple[int, ...]  # further batch sizes, of which the best is measured, too
    turns: int
    seconds: float  # of a turn, about
    precisions: tuple[str, ...]
    backbones: tuple[str, ...]  # those first that are the most important to measure


@dataclass(frozen=True)
class Measured:
    """The measurements of a model."""

    backbone: str
    precision: str
    batch: int
    turns: dict[str, list[float]]  # images per second in every turn, by way
    once: dict[str, float]  # single measurements


SETUPS = {
    "cpu": Setup(48, 1024, 1, 32, (), 7, 0.7, ("fp32", "bf16"), ("test_resnet", "test_byobnet", "resnet10t")),
    "cuda": Setup(
        224,
        1024,
        8,
        32,
        (128, 256, 512),
        3,
        0.4,
        ("bf16",),
        ("resnet50", "vit_base_patch16_224", "efficientnet_b0", "resnet18"),
    ),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETUP = SETUPS[DEVICE.type]
STUDY: dict[str, Any] = {
    "augment.crop_scale": 0.9,
    "augment.erase": 0.15,
    "train.grad_clip": 5,
    "optim.weight_decay": 0.05,
}
Row = tuple[object, ...]
COLUMNS = ("model", "precision", "batch", "way", "images/s", "times bare", "least", "most", "times plain")


def run(seconds: float = math.inf) -> Iterator[Table]:
    """Measure everything, as far as the time allows."""
    notes = [
        f"{SETUP.size} px, {SETUP.turns} turns of about {SETUP.seconds:g} s.",
        "`compiling` is in seconds, all else in images per second.",
    ]
    found: dict[tuple[str, str, int], list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        command = [sys.executable, "-m", "benchmarks.training", "--seconds", str(seconds)]
        command += ["--store", str(faces(Path(scratch)))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            measured = Measured(*json.loads(line))
            found[measured.backbone, measured.precision, measured.batch] = _rows(measured)
            yield Table(COLUMNS, [row for rows in found.values() for row in rows], notes)
        if process.wait():
            raise RuntimeError(f"the process that measures ended with code {process.returncode}")


def _rows(measured: Measured) -> list[Row]:
    key = measured.backbone, measured.precision, measured.batch
    rows: list[Row] = []
    # A way that has failed has NaN, which is not larger than 0.
    fastest = max((way for way in measured.turns if way in BARE), key=lambda way: max(0, *measured.turns[way]))
    for way, rates in measured.turns.items():
        bases = measured.turns[fastest], measured.turns[PLAIN]
        ratios = [[rate / to for rate, to in zip(rates, base, strict=True)] for base in bases]
        rows.append((*key, way, statistics.median(rates), *_summary(ratios[0]), statistics.median(ratios[1])))
    return rows + [(*key, way, value, "", "", "", "") for way, value in measured.once.items()]


#: The ways with which all others are compared; only the first of the bare loops is always measured.
BARE, PLAIN = ("bare", "bare, captured"), "plain"
#: Models and batches that are also compiled. Each takes up to a minute if `compiling` has not run before.
COMPILED = (("vit_base_patch16_224", 32), ("resnet50", 256), ("vit_base_patch16_224", 256))


#: Variable of the environment: the store of drawn faces that serves several benchmarks.
STORE = "BENCHMARKS_STORE"
#: A larger batch must be faster by this factor.
_GAIN = 1.02
#: Steps that choose kernels and capture, before the first turn.
_FIRST = 5
#: Rows that are evaluated.
_EVALUATED = 1024


def faces(scratch: Path) -> Path:
    """Pack drawn faces of the setup's size, unless that was done before, and return their store."""
    if store := os.environ.get(STORE):
        return Path(store)
    write_sample(scratch / "faces", train=SETUP.rows, val=64, image_size=SETUP.size)
    return pack(scratch / "faces", scratch / "store", image_size=SETUP.size).path


def open_repeated(path: Path) -> Store:
    """Open the store with its training rows repeated as the setup says."""
    store, times = open_store(path), SETUP.repeats
    train = store.train
    repeated = dataclasses.replace(
        train, ids=[*train.ids] * times, prob_NK=np.tile(train.prob_NK, (times, 1)), shards=train.shards * times
    )
    return dataclasses.replace(store, train=repeated)


def config(backbone: str, precision: str, batch: int = SETUP.batch, **settings: object) -> RunConfig:
    """Return the configuration of a run that never ends."""
    return RunConfig.from_flat(
        {
            "data.image_size": SETUP.size,
            "model.backbone": backbone,
            "train.batch_size": batch,
            "train.precision": precision,
            "train.compile": "never",
            "train.epochs": 10**6,
            "loss.kl": 0.5,
            "loss.js": 0.5,
            **settings,
        }
    )


def _summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _measure(store: Store, until: float) -> Iterator[Measured]:
    """Measure each model, precision and batch, until the time is over."""
    if DEVICE.type == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    malloc.keep_freed_memory()
    reduce_fragmentation()
    with mock.patch.object(loop, "build_model", lambda settings, **options: _model(settings)):
        yield from _measure_all(store, until)


def _measure_all(store: Store, until: float) -> Iterator[Measured]:
    """Measure the best batch sizes first, since they tell the most."""
    every = list(itertools.product(SETUP.precisions, SETUP.backbones))
    for precision, backbone in every if SETUP.batches else ():
        rates: dict[int, float] = {}
        for batch in SETUP.batches:
            if time.monotonic() > until:
                return
            rates[batch] = _rate_at(backbone, precision, batch, store)
        once = {f"fit at batch {batch}": rate for batch, rate in rates.items()}
        yield from _measure_one(backbone, precision, best_batch(rates), store, until, once)
    for precision, backbone in every:
        yield from _measure_one(backbone, precision, SETUP.batch, store, until)


def best_batch(rates: Mapping[int, float]) -> int:
    """Return the smallest batch size that is almost the fastest."""
    return min(batch for batch, rate in rates.items() if rate * _GAIN >= max(rates.values()))


def _measure_one(
    backbone: str, precision: str, batch: int, store: Store, until: float, once: Mapping[str, float] | None = None
) -> Iterator[Measured]:
    """Measure one model: what all is compared with first, then the other ways, as far as the time allows."""
    settings = config(backbone, precision, batch)
    study = config(backbone, precision, batch, **STUDY)
    single = dict(once or {})
    cuda = DEVICE.type == "cuda"
    ways: dict[str, Callable[[], Iterator[float]]] = {"bare": lambda: _rates_of_loop(settings, _bare(settings))}
    if cuda:
        ways["bare, captured"] = lambda: _rates_of_loop(settings, _bare(settings, capturable=True), captured=True)
    ways |= {
        PLAIN: lambda: _rates_of_loop(settings, _plain(settings), layout=torch.contiguous_format),
        "fit": lambda: _rates_of_fit(settings, store, single),
        "fit of a study": lambda: _rates_of_fit(study, store),
    }
    if cuda:
        ways["timm"] = lambda: _rates_of_loop(settings, _timm(settings))
        if (backbone, batch) in COMPILED:
            ways["fit, compiled"] = lambda: _rates_of_compiled(settings, store, single)
    for turns in _in_turns(ways, until):
        yield Measured(backbone, precision, batch, turns, single)


def _in_turns(ways: Mapping[str, Callable[[], Iterator[float]]], until: float) -> Iterator[dict[str, list[float]]]:
    """Yield images per second of each way in each turn.

    On a GPU, ways run one after the other, to save memory, and the dict is yielded after each of them.
    """
    if time.monotonic() > until:
        return
    if DEVICE.type == "cpu":
        running = {name: way() for name, way in ways.items()}
        turns = [{name: next(rates) for name, rates in running.items()} for _ in range(SETUP.turns)]
        yield {name: [turn[name] for turn in turns] for name in ways}
        return
    found: dict[str, list[float]] = {}
    for name, way in ways.items():
        if time.monotonic() > until:
            return
        try:
            found[name] = list(itertools.islice(way(), SETUP.turns))
        except (RuntimeError, ArithmeticError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            found[name] = [math.nan] * SETUP.turns
        _free()
        if PLAIN in found:
            yield dict(found)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _rate_at(backbone: str, precision: str, batch: int, store: Store) -> float:
    """Return the images per second of `fit` with a batch size; 0 if it fails, such as for lack of memory."""
    try:
        return statistics.median(itertools.islice(_rates_of_fit(config(backbone, precision, batch), store), 2))
    except (RuntimeError, ArithmeticError) as error:
        print(f"{backbone}, batch {batch}: {error}", file=sys.stderr, flush=True)
        return 0.0
    finally:
        _free()


def _rates(train: Callable[[int], object], rows: int, most: int) -> Iterator[float]:
    """Yield images per second of each turn.

    Args:
        train: trains this number of steps, and waits for the device.
        rows: number of rows of a step.
        most: largest number of steps of a turn.
    """
    train(min(_FIRST, most))
    began = time.perf_counter()
    train(1)
    steps = min(max(1, round(SETUP.seconds / (time.perf_counter() - began))), most)
    while True:
        began = time.perf_counter()
        train(steps)
        yield steps * rows / (time.perf_counter() - began)


def _rates_of_fit(settings: RunConfig, store: Store, once: dict[str, float] | None = None) -> Iterator[float]:
    """Yield the rates of training as in `fit`, which evaluates between the turns; once measure the evaluation."""
    run = start(settings, store, DEVICE, make_plan(settings, store, DEVICE), fresh=True)
    if once is not None:
        once["evaluate"] = _rate_of_evaluation(run)
    yield from _rates_of_run(run)


def _rates_of_compiled(settings: RunConfig, store: Store, once: dict[str, float]) -> Iterator[float]:
    run, once["compiling"] = compiled_run(settings, store)
    yield from _rates_of_run(run)


def _rates_of_run(run: Run) -> Iterator[float]:
    return _rates(lambda steps: _train_steps(run, steps), run.plan.batch_rows, run.plan.steps_per_epoch)


def _train_steps(run: Run, steps: int) -> None:
    train_segment(dataclasses.replace(run, plan=dataclasses.replace(run.plan, stops=(steps,))), [])


def _rate_of_evaluation(run: Run) -> float:
    """Return the images per second of `evaluate` on the first training rows."""
    for _ in range(2):  # the first time chooses kernels
        began = time.perf_counter()
        rows = np.arange(min(_EVALUATED, len(run.train)))
        predicted = predict_rows(run.model, run.train, rows, device=DEVICE, rows=rows_to_evaluate(run))
        means_of_metrics(*predicted, run.store.classes)
    return len(rows) / (time.perf_counter() - began)


def compiled_run(settings: RunConfig, store: Store) -> tuple[Run, float]:
    """Return a run whose step is compiled before it is captured as a graph, and the seconds of its first step."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, compile="always"))
    run = start(settings, store, DEVICE, make_plan(settings, store, DEVICE), fresh=True)
    began = time.perf_counter()
    _train_steps(run, 1)
    return run, time.perf_counter() - began


def _rates_of_loop(
    settings: RunConfig,
    step: Callable[[torch.Tensor, torch.Tensor], None],
    layout: Any = torch.channels_last,
    *,
    captured: bool = False,
) -> Iterator[float]:
    batch = settings.train.batch_size
    x_BCHW = torch.randn(batch, 3, SETUP.size, SETUP.size).to(DEVICE, memory_format=layout)
    prob_BK = torch.randn(batch, len(settings.data.classes)).softmax(1).to(DEVICE)
    call: Callable[[], None] = partial(step, x_BCHW, prob_BK)
    if captured:
        call = _capture(call)

    def train(steps: int) -> None:
        for _ in range(steps):
            call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return _rates(train, batch, SETUP.rows * SETUP.repeats // batch)


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph, as torch's documentation does, and return its launch."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_FIRST):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _model(settings: RunConfig) -> nn.Module:
    """Return a new model. The random weights of a backbone, which take seconds, are drawn once."""
    return copy.deepcopy(_drawn(settings.model.backbone))


@cache
def _drawn(backbone: str) -> nn.Module:
    return build_model(config(backbone, "fp32"))


def _bare(settings: RunConfig, *, capturable: bool = False) -> Callable[[torch.Tensor, torch.Tensor], None]:
    model = _model(settings).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, settings.optim)
    for group in optimizer.param_groups:
        group["capturable"] = capturable
    return _step_of(model, optimizer, settings, autocast=settings.train.precision == "bf16")


def _plain(settings: RunConfig) -> Callable[[torch.Tensor, torch.Tensor], None]:
    model = _model(settings).to(DEVICE)
    return _step_of(model, AdamW(model.parameters()), settings, autocast=False)


def _step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: RunConfig, *, autocast: bool
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    loss = losses.mixture(settings.loss.weights)

    def step(x_BCHW: torch.Tensor, prob_BK: torch.Tensor) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            logits_BK = model(x_BCHW)
        loss(logits_BK.float(), prob_BK).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timm(settings: RunConfig) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Run the body of timm's `train_one_epoch`, with --amp-dtype bfloat16, --channels-last and --opt adamw."""
    model = _model(settings).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    loss_fn = SoftTargetCrossEntropy()  # type: ignore[no-untyped-call]

    def step(x_BCHW: torch.Tensor, prob_BK: torch.Tensor) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = model(x_BCHW)
            loss = loss_fn(output, prob_BK)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing further is measured")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)  # in the process that measures
    args = parser.parse_args()
    if args.store is None:
        command = shlex.join(["python", "-m", "benchmarks.training", "--seconds", f"{args.seconds:g}"])
        measure("training", lambda: run(args.seconds), command)
        return 0
    for measured in _measure(open_repeated(args.store), time.monotonic() + args.seconds):
        print(json.dumps(dataclasses.astuple(measured)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
