"""Train one configuration on a store, from the start or from its last checkpoint, report by report.

All randomness is a function of the seed and of the position in the run. A run therefore resumes without the state of a
generator. On the CPU, a run that is stopped after a report and resumed equals the uninterrupted one bit for bit.

With several workers (torch.distributed is initialised), each takes its share of every batch and of the validation rows.
All yield the same reports, and only the first writes files.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from raytune_emotion.config import RunConfig
from raytune_emotion.data.augment import decide
from raytune_emotion.data.loader import DeviceSplit, batches, cache_on_device, clear_cache, epoch_order
from raytune_emotion.data.store import Split, Store
from raytune_emotion.errors import UserError
from raytune_emotion.learn import checkpoint, losses
from raytune_emotion.learn.checkpoint import Progress
from raytune_emotion.learn.device import compile_model
from raytune_emotion.learn.evaluation import ROWS, means_of_metrics, predict_share
from raytune_emotion.learn.model import batchnorm_layers, build_model, mean_std, to_device
from raytune_emotion.learn.optim import build_optimizer, lr_factor, reports_since_best
from raytune_emotion.learn.origin import WeightsUnavailableError, find_origin
from raytune_emotion.learn.report import Report
from raytune_emotion.learn.run_folder import LAST
from raytune_emotion.learn.step import Step, make_targets
from raytune_emotion.terminal import count

#: Largest number of steps between two updates of the weight average. One update costs a tenth of a step of a small
#: model.
_AVERAGED_EVERY = 4

#: Waits before the hub is asked again, seconds: it may have had too many requests, or the network may have failed.
_WAITS = (1.0, 5.0, 20.0)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Number of training images of 224 px, or as many pixels, from which `train.compile: auto` compiles the model. On an
#: H200 compiling takes 33 to 81 s and then saves 25 to 91 microseconds per image. It pays off from 0.7 to 1.3 million
#: images (benchmarks: compiling, training).
_COMPILED_FROM = 1.5e6

#: Settings that may change when a run is resumed.
_MAY_CHANGE = {"train.epochs", "train.patience", "train.accumulate", "train.compile", "model.weights_dir"}


class Divergence(ArithmeticError):
    """Report that the loss or a metric is not finite. The checkpoints are still those of the previous report."""


@dataclass(frozen=True)
class Plan:
    """The optimizer steps of a run, and this worker's rank."""

    batch_rows: int  # rows per step, over all workers
    steps_per_epoch: int
    stops: tuple[int, ...]  # steps of an epoch after which there is a report
    epochs: int
    rank: int
    workers: int

    def span(self, report: int) -> tuple[int, int, int]:
        """Return the epoch, and the first step and the end within it, of a report's training. Counts begin at 0."""
        epoch, part = divmod(report, len(self.stops))
        return epoch, (0, *self.stops)[part], self.stops[part]

    @property
    def averaged_every(self) -> int:
        """Return the steps between two updates of the weight average. Each report comes after at least one update."""
        return min(_AVERAGED_EVERY, *(end - first for first, end in itertools.pairwise((0, *self.stops))))


@dataclass(frozen=True)
class Run:
    """The objects with which a run is trained."""

    config: RunConfig
    store: Store
    device: torch.device
    plan: Plan
    model: nn.Module
    average: ModelEmaV3 | None
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    step: Step
    train: Split | DeviceSplit
    val: Split | DeviceSplit


def fit(
    config: RunConfig,
    store: Store,
    *,
    device: torch.device,
    folder: Path | None = None,
    resident: bool = True,
    wait_for_all: Callable[[], None] = lambda: None,
) -> Generator[Report, None, None]:
    """Train, and yield a report after every evaluation, once its checkpoint is written.

    A finished run yields nothing. With more `train.epochs`, it continues.

    Args:
        config: configuration of the run.
        store: data with the configuration's image size and classes.
        device: device of this worker.
        folder: folder of the checkpoints, which all workers can access; made if missing. A run in it is resumed.
            None keeps nothing.
        resident: whether the images may be kept on a GPU, if there is room for them.
        wait_for_all: waits for all workers, see `start`.

    Yields:
        `report` (1, 2, ...), `epoch` (trained so far), `seconds` (of training and evaluation so far), `time` (unix),
        `train_loss` (mean over the rows since the previous report), `lr` (of the newest step), `images_per_second` (in
        training, over all workers), `val_` and each metric of `per_sample`, `best_val_js`, `best_report`,
        `accumulate` (micro-batches of each worker per step), `workers`, `params_millions`, `finished` (no further
        report will follow).

    Raises:
        UserError: the configuration does not fit the store, the device, the workers or the run in the folder.
        Divergence: the loss or a metric is NaN or infinite.
    """
    plan = make_plan(config, store, device)
    progress = _read_progress(config, store, device, folder, plan)
    history = list(progress.history) if progress is not None else []
    if is_finished(config, plan, history):
        return
    origin = progress.origin if progress is not None else None
    run = start(
        config, store, device, plan, fresh=progress is None, origin=origin, resident=resident, wait_for_all=wait_for_all
    )
    if progress is None:
        origin = find_origin(config.model, weights=False).description
    average: nn.Module | None = run.average.module if run.average is not None else None
    if folder is not None and progress is not None:
        checkpoint.load_state(folder / LAST, run.model, run.optimizer, average)
        if progress.scaler:  # otherwise the run began on a device that needs no scaler
            run.scaler.load_state_dict(progress.scaler)

    while not is_finished(config, plan, history):
        began = time.perf_counter()
        train_loss, lr = train_segment(run, history)
        trained = time.perf_counter()
        share_batchnorm(run.model, plan.workers)
        if average is not None:
            share_batchnorm(average, plan.workers)
        logits_BK, prob_BK = predict_share(average or run.model, run.val, device=device, rows=rows_to_evaluate(run))
        metrics = means_of_metrics(logits_BK, prob_BK, store.classes)
        _check_finite(metrics, plan, history)
        history.append(_report(run, history, train_loss, lr, metrics, began, trained))
        improved = history[-1]["best_report"] == history[-1]["report"]
        predicted_NK = _gather_predictions(logits_BK, len(run.val), plan) if folder is not None and improved else None
        if folder is not None and plan.rank == 0:
            newest = Progress(config.to_flat(), store.fingerprint, tuple(history), run.scaler.state_dict(), origin)
            checkpoint.save(folder, run.model, run.optimizer, newest, average, predicted_NK)
        if plan.workers > 1:
            # The other workers wait here, so that each report is written before it is yielded.
            history[-1] = _with_clocks_of_the_first(history[-1], device)
        yield history[-1].copy()


def make_plan(config: RunConfig, store: Store, device: torch.device) -> Plan:
    """Plan the steps of a run, and this worker's rank.

    An epoch leaves out the rows that do not fill a batch, so that all steps are alike. These are other rows in every
    epoch, because the order changes. A training set smaller than a batch is one step.

    Raises:
        UserError: the configuration does not fit the store, the device or the number of workers.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    train = config.train
    batch_rows = min(train.batch_size, len(store.train))
    faults = []
    if store.image_size != config.data.image_size:
        faults.append(
            f"data.image_size: {store.path} holds images of {store.image_size} px, but the configuration has "
            f"{config.data.image_size}; pack the data at that size, or change the setting"
        )
    if store.classes != config.data.classes:
        faults.append(
            f"data.classes: {store.path} has the classes {', '.join(store.classes)}, but the configuration has "
            f"{', '.join(config.data.classes)}; pack the data with these classes, or change the setting"
        )
    if train.precision == "fp16" and device.type != "cuda":
        faults.append("train.precision: fp16 needs a GPU; choose bf16 or fp32")
    faults += batch_faults(config, len(store.train), workers)
    faults += evaluation_faults(train.evals_per_epoch, rows=len(store.train), batch_size=train.batch_size)
    if faults:
        raise UserError(faults)
    steps = len(store.train) // batch_rows
    stops = {math.ceil(steps * i / train.evals_per_epoch) for i in range(1, train.evals_per_epoch + 1)}
    return Plan(batch_rows, steps, tuple(sorted(stops)), train.epochs, rank, workers)


def batch_faults(config: RunConfig, rows: int, workers: int) -> list[str]:
    """Return an error if the batches of a run are too small for the micro-batches of its workers.

    Args:
        config: configuration of the run. If a micro-batch has one row, its model is built: BatchNorm needs two rows.
        rows: number of training rows.
        workers: number of workers.

    Raises:
        UserError: the model had to be built, but cannot be built.
    """
    batch_rows, accumulate = min(config.train.batch_size, rows), config.train.accumulate
    micro_rows = batch_rows // (workers * accumulate)
    if micro_rows == 0:
        what = f"are too few for {accumulate} micro-batches (train.accumulate) for each of {workers} workers"
    elif micro_rows == 1 and batchnorm_layers(build_model(config, weights=False)):
        what = (
            f"make micro-batches of one row, {accumulate} (train.accumulate) for each of {count(workers, 'worker')}, "
            f"and the BatchNorm layers of {config.model.backbone} see no variance in one row"
        )
    else:
        return []
    return [f"train.batch_size: {batch_rows} rows {what}; choose a larger batch or fewer of the others"]


def evaluation_faults(evals_per_epoch: int, *, rows: int, batch_size: int) -> list[str]:
    """Return an error if an epoch has fewer steps than evaluations. Trials are compared report by report."""
    steps = rows // min(batch_size, rows)
    if evals_per_epoch <= steps:
        return []
    return [
        f"train.evals_per_epoch: {count(rows, 'row')} in batches of {batch_size} (train.batch_size) make "
        f"{count(steps, 'step')} an epoch, but each of {evals_per_epoch} evaluations needs a step; choose at most "
        f"{steps}, or a smaller batch"
    ]


def is_finished(config: RunConfig, plan: Plan, history: Sequence[Report]) -> bool:
    """Tell whether a run has ended: its epochs or its patience are used up."""
    if not history:
        return False
    waited = reports_since_best([report["val_js"] for report in history])
    patience = config.train.patience * len(plan.stops)
    return len(history) >= plan.epochs * len(plan.stops) or 0 < patience <= waited


def start(
    config: RunConfig,
    store: Store,
    device: torch.device,
    plan: Plan,
    *,
    fresh: bool,
    origin: Mapping[str, Any] | None = None,
    resident: bool = True,
    wait_for_all: Callable[[], None] = lambda: None,
) -> Run:
    """Build the objects of a run. Pretrained weights are loaded only if it is fresh.

    Args:
        config: settings of the run.
        store: store to train on.
        device: device to train on.
        plan: plan of the run.
        fresh: whether the run is new.
        origin: description of the backbone's origin, from the checkpoint of a resumed run.
        resident: whether the images may be kept on a GPU, if they fit.
        wait_for_all: waits until all workers have their weights and images. Everything else that is shared among
            workers waits less long than a machine may take to fetch them.
    """
    model = _build_patiently(config, weights=fresh, description=origin)
    model = to_device(model, device)
    # With timm's warm-up, the average contains recent weights already in the first reports.
    decay = config.train.ema_decay**plan.averaged_every
    average = ModelEmaV3(model, decay, use_warmup=True) if decay > 0 else None
    optimizer = build_optimizer(model, config.optim)
    if not resident:
        clear_cache()
    train, val = cache_on_device(store, device) if resident else (store.train, store.val)
    wait_for_all()
    net = compile_model(model) if is_compiled(config, device, plan) else model
    dtype = _dtype(config, device, plan.workers)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mean, std = mean_std(model)
    step = Step(
        net,
        optimizer,
        scaler,
        losses.mixture(config.loss.weights),
        mean=mean,
        std=std,
        dtype=dtype,
        device=device,
        batch_rows=plan.batch_rows,
        workers=plan.workers,
        targets=make_targets(
            store.train.prob_NK, smoothing=config.train.smoothing, balance=config.train.balance, device=device
        ),
        grad_clip=config.train.grad_clip,
        # Several workers wait for each other within a step, so their steps are not captured.
        capture=device.type == "cuda" and torch.cuda.is_available() and plan.workers == 1,
    )
    return Run(config, store, device, plan, model, average, optimizer, scaler, step, train, val)


def _build_patiently(config: RunConfig, *, weights: bool, description: Mapping[str, Any] | None) -> nn.Module:
    """Build the model. If the hub does not serve its weights, retry a few times."""
    for wait in _WAITS:
        try:
            return build_model(config, weights=weights, description=description)
        except WeightsUnavailableError:
            # Other workers wait meanwhile, because training begins together.
            time.sleep(wait)
    return build_model(config, weights=weights, description=description)


def is_compiled(config: RunConfig, device: torch.device, plan: Plan) -> bool:
    """Tell whether a run compiles its model. With `auto`, a resumed run of more epochs may compile it later."""
    if config.train.compile != "auto":
        return config.train.compile == "always"
    images = plan.epochs * plan.steps_per_epoch * plan.batch_rows
    as_224_px = images * (config.data.image_size / 224) ** 2
    return device.type == "cuda" and plan.workers == 1 and as_224_px >= _COMPILED_FROM


def _dtype(config: RunConfig, device: torch.device, workers: int) -> torch.dtype:
    dtype = _DTYPES[config.train.precision]
    if dtype != torch.bfloat16 or device.type != "cuda":
        return dtype
    supported = torch.tensor(int(torch.cuda.is_bf16_supported(including_emulation=False)), device=device)
    if workers > 1:  # they may have GPUs of different types, and must scale their gradients alike
        dist.all_reduce(supported, dist.ReduceOp.MIN)
    # GPUs without bf16 get fp16 with scaled gradients.
    return torch.bfloat16 if supported.item() else torch.float16


def train_segment(run: Run, history: Sequence[Report]) -> tuple[float, float]:
    """Train from the newest report to the next one.

    No step waits for the device: the loss is summed there, and read at the end.

    Returns:
        The mean loss over the rows of all workers, and the learning rate of the last step.

    Raises:
        Divergence: the mean is NaN or infinite.
    """
    config, plan, device = run.config, run.plan, run.device
    accumulate, val_js = config.train.accumulate, [report["val_js"] for report in history]
    epoch, first, end = plan.span(len(history))
    order_N = epoch_order(len(run.store.train), config.train.seed, epoch)
    # This worker's share of every batch, cut into micro-batches.
    steps = order_N[: plan.steps_per_epoch * plan.batch_rows].reshape(plan.steps_per_epoch, plan.batch_rows)[first:end]
    rows = [rows_B for share in steps[:, plan.rank :: plan.workers] for rows_B in np.array_split(share, accumulate)]
    decisions = decide(
        config.augment,
        rows,
        seed=config.train.seed,
        epoch=epoch,
        side=run.store.image_size,
        device=device,
    )
    lr = 0.0

    every = plan.averaged_every
    run.model.train()
    run.step.loss_sum.zero_()
    with (
        _randomness(device, config.train.seed, len(history), plan.rank),
        contextlib.closing(batches(run.train, rows, device)) as stream,
    ):
        for step in range(first, end):
            lr = config.optim.lr * lr_factor(
                config.optim,
                step=epoch * plan.steps_per_epoch + step,
                steps_per_epoch=plan.steps_per_epoch,
                total_steps=plan.epochs * plan.steps_per_epoch,
                val_js=val_js,
                evals_per_epoch=len(plan.stops),
            )
            only_head = epoch * plan.steps_per_epoch + step < config.model.freeze_epochs * plan.steps_per_epoch
            run.step([(next(stream), next(decisions)) for _ in range(accumulate)], lr, only_head=only_head)
            looks, between = divmod(epoch * plan.steps_per_epoch + step + 1, every)
            if run.average is not None and between == 0:
                run.average.update(run.model, step=looks)

    if plan.workers > 1:
        dist.all_reduce(run.step.loss_sum)
    train_loss = run.step.loss_sum.item() / (plan.batch_rows * (end - first))
    _check_finite({"training loss": train_loss}, plan, history)
    return train_loss, lr


def share_batchnorm(model: nn.Module, workers: int) -> None:
    """Average the running statistics of BatchNorm over the workers, since each worker computes its own."""
    # timm's `distribute_bn` does the same with a reduction for each buffer: 40 in a resnet18, not one.
    layers = batchnorm_layers(model)
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
    if workers > 1 and buffers:
        flat = torch.cat(buffers)
        dist.all_reduce(flat)
        flat /= workers
        for buffer, mean in zip(buffers, torch.split(flat, [len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(mean)


def rows_to_evaluate(run: Run) -> int:
    """Return the rows of an evaluation batch: on a GPU at most those of a micro-batch, to limit its memory."""
    micro_rows = run.plan.batch_rows // (run.plan.workers * run.config.train.accumulate)
    return min(ROWS, micro_rows) if run.device.type == "cuda" else ROWS


def _gather_predictions(logits_BK: torch.Tensor, count: int, plan: Plan) -> torch.Tensor:
    """Gather the predictions of all workers in the order of the rows, [N, K]."""
    with torch.inference_mode():
        predicted_NK = logits_BK.new_zeros(count, logits_BK.shape[1])
        predicted_NK[plan.rank :: plan.workers] = logits_BK.softmax(-1)
        if plan.workers > 1:
            dist.all_reduce(predicted_NK)
        return predicted_NK


def _report(
    run: Run,
    history: Sequence[Report],
    train_loss: float,
    lr: float,
    metrics: dict[str, float],
    began: float,
    trained: float,
) -> Report:
    plan, number = run.plan, len(history) + 1
    epoch, first, end = plan.span(len(history))
    images = plan.batch_rows * (end - first)
    before = history[-1]["seconds"] if history else 0.0
    best = min([metrics["js"], *(report["val_js"] for report in history)])
    improved = not history or metrics["js"] < history[-1]["best_val_js"]
    report: Any = {
        "report": number,
        "epoch": epoch + end / plan.steps_per_epoch,
        "seconds": before + time.perf_counter() - began,
        "time": time.time(),
        "train_loss": train_loss,
        "lr": lr,
        "images_per_second": images / (trained - began),
        **{f"val_{name}": value for name, value in metrics.items()},
        "best_val_js": best,
        "best_report": number if improved else history[-1]["best_report"],
        "accumulate": run.config.train.accumulate,
        "workers": plan.workers,
        "params_millions": sum(parameter.numel() for parameter in run.model.parameters()) / 1e6,
        "finished": False,
    }
    report["finished"] = is_finished(run.config, plan, [*history, report])
    return cast("Report", report)


def _with_clocks_of_the_first(report: Report, device: torch.device) -> Report:
    """Return a worker's report with the times of the first worker. Everything else is equal on all workers."""
    clocks = [report["seconds"], report["time"], report["images_per_second"]]
    taken = torch.tensor(clocks, dtype=torch.float64, device=device)
    dist.broadcast(taken, src=0)
    seconds, at, rate = taken.tolist()
    return {**report, "seconds": seconds, "time": at, "images_per_second": rate}


def _read_progress(
    config: RunConfig, store: Store, device: torch.device, folder: Path | None, plan: Plan
) -> Progress | None:
    """Read the progress of the run in a folder, check that all workers can continue it, and repair its files."""
    progress = checkpoint.read_progress(folder) if folder is not None else None
    if dist.is_initialized():
        _check_same_checkpoint(device, folder, progress)
    if progress is not None:
        check_same_run(config, store, folder, progress)
    if folder is not None and plan.rank == 0:
        checkpoint.repair_from_last(folder, progress)
    return progress


def _check_same_checkpoint(device: torch.device, folder: Path | None, progress: Progress | None) -> None:
    """Check that all workers see the same checkpoint."""
    least = torch.tensor(len(progress.history) if progress is not None else 0, device=device)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if least != most:
        raise UserError(f"{folder}: the workers do not see the same checkpoint; choose a folder that all share")


def check_same_run(config: RunConfig, store: Store, folder: object, progress: Progress) -> None:
    """Check that a configuration and a store match the run in a folder.

    Raises:
        UserError: they do not: one sentence for each difference.
    """
    asked = config.to_flat()
    # A setting that an older version did not know has had its default.
    began = RunConfig().to_flat() | progress.settings
    faults = [
        f"{folder}: the run there began with {key} = {value}, not {asked.get(key)}; keep that value, or choose "
        f"another folder"
        for key, value in began.items()
        if key not in _MAY_CHANGE and asked.get(key) != value
    ]
    if progress.fingerprint != store.fingerprint:
        faults.append(f"{folder}: the run there began with other data than {store.path}; choose another folder")
    if faults:
        raise UserError(faults)


def _check_finite(values: dict[str, float], plan: Plan, history: Sequence[Report]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            epoch, _, end = plan.span(len(history))
            raise Divergence(
                f"diverged before report {len(history) + 1} (step {epoch * plan.steps_per_epoch + end}): the {name} is "
                f"{value}; choose a smaller optim.lr or a longer optim.warmup_epochs, or set train.grad_clip"
            )


@contextlib.contextmanager
def _randomness(device: torch.device, *key: int) -> Iterator[None]:
    """Seed torch's generators with a key for the block, then restore their state."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield
