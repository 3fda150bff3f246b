"""Train any model with any loss and optimizer in scripts, with checkpoints, TensorBoard events, and a history."""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raytune_emotion.data.progress import progress
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn.checkpoint import load_state, read_header, save_with_header
from raytune_emotion.learn.device import exact_fp32
from raytune_emotion.learn.events import EventWriter
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.library.metrics import MetricsCalculator

Batches: TypeAlias = Iterable[tuple[Tensor, Tensor]]
#: Name -> one number per epoch. `pandas.DataFrame(history)` has one row per epoch.
History: TypeAlias = dict[str, list[float]]

_EPOCH, _BEST_LOSS, _KIND, _GROUPS, _PARAMS = "epoch", "best_loss", "optimizer", "param_groups", "params"


class Checkpoint(NamedTuple):
    """The state of a training in a checkpoint."""

    epoch: int  # epochs trained
    best_loss: float  # lowest validation loss so far, in the unit of the loss


#: State of a new model.
UNTRAINED = Checkpoint(0, math.inf)


class Trainer:
    """See `create_trainer`."""

    def __init__(
        self,
        model: nn.Module,
        train_loader: Batches,
        val_loader: Batches,
        loss_fn: nn.Module,
        optimizer: Optimizer,
        checkpoint_dir: Path,
        log_dir: Path,
        *,
        gradient_accumulation_steps: int,
        grad_clip: float,
        start: Checkpoint,
        classes: Iterable[str],
    ) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self._train_loader, self._val_loader = train_loader, val_loader
        self._checkpoint_dir, self._log_dir = checkpoint_dir, log_dir
        self._accumulate, self._grad_clip = gradient_accumulation_steps, grad_clip
        self._metrics = MetricsCalculator(classes=classes)
        self._start = start
        self.history: History = {}

    def train(
        self,
        num_epochs: int,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        early_stopping_patience: int | None = 5,
    ) -> History:
        """Train for a number of epochs, or until early stopping. Another call continues the training.

        After early stopping, a further call trains only with more patience, or with None.

        After each epoch, the whole validation set is evaluated and events are written. If the validation loss is the
        lowest so far, the checkpoint `best.safetensors` is also written.

        Args:
            num_epochs: largest number of passes over the training loader.
            scheduler: scheduler of the learning rate, which takes a step after every epoch. `ReduceLROnPlateau` gets
                the validation loss.
            early_stopping_patience: epochs without a lower validation loss before training stops, at least 1; None: it
                never stops early.

        Returns:
            The history of all epochs of this trainer: `epoch`, `train_loss` (mean over the rows, in the unit of the
            loss), `val_loss` (the same), `val_js` (bits), `val_kl` (nats) and the other metrics, `lr` (of the epoch),
            `seconds` (since the start of the call).

        Raises:
            UserError: the patience is out of range, or a loader has no batch.
            Breakdown: a loss is NaN or infinite.
        """
        if early_stopping_patience is not None and early_stopping_patience < 1:
            raise UserError(
                f"early_stopping_patience: expected a positive integer, got {early_stopping_patience!r}; None never "
                f"stops early"
            )
        began = time.perf_counter()
        with EventWriter(self._log_dir) as events, progress() as bars:
            bar = bars.add_task("training", total=num_epochs * _length(self._train_loader))
            for _ in range(num_epochs):
                if early_stopping_patience is not None and self._epochs_since_best() >= early_stopping_patience:
                    break
                lr = float(self.optimizer.param_groups[0]["lr"])
                losses = {"train_loss": self._train_epoch(bars, bar), **self._evaluate()}
                report = {"epoch": self.epochs + 1, **losses, "lr": lr, "seconds": time.perf_counter() - began}
                for name, value in report.items():
                    self.history.setdefault(name, []).append(value)
                events.write_report(report, self.epochs)
                if self._epochs_since_best() == 0:
                    self._save()
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(losses["val_loss"])
                elif scheduler is not None:
                    scheduler.step()
                bars.update(bar, description=f"epoch {self.epochs}  val JS {losses['val_js']:.4f} bits")
        return {name: list(values) for name, values in self.history.items()}

    @property
    def epochs(self) -> int:
        """Count the trained epochs, including those before the start."""
        return self._start.epoch + len(self.history.get("val_loss", ()))

    def _epochs_since_best(self) -> int:
        losses = [self._start.best_loss, *self.history.get("val_loss", ())]
        return len(losses) - 1 - losses.index(min(losses))

    def _train_epoch(self, bars: Progress, bar: TaskID) -> float:
        device, total, rows = _device(self.model), 0.0, 0
        self.model.train()
        for group in _groups(self._train_loader, self._accumulate):
            # Compute the gradient of the mean over all rows of the step, however they are split into batches.
            step_rows = sum(len(images) for images, _ in group)
            for images, targets in group:
                predictions = self.model(images.to(device, non_blocking=True))
                loss = self.loss_fn(predictions, targets.to(device, non_blocking=True))
                (loss * (len(images) / step_rows)).backward()
                total, rows = total + loss.item() * len(images), rows + len(images)
                bars.advance(bar)
            if self._grad_clip > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self._mean("training", total, rows)

    def _evaluate(self) -> dict[str, float]:
        device, total = _device(self.model), 0.0
        predicted: list[Tensor] = []
        true: list[Tensor] = []
        self.model.eval()
        with torch.inference_mode(), exact_fp32():
            for images, targets in self._val_loader:
                predictions = self.model(images.to(device, non_blocking=True))
                total += self.loss_fn(predictions, targets.to(device)).item() * len(images)
                predicted.append(predictions.cpu())
                true.append(targets.cpu())
        loss = self._mean("validation", total, sum(map(len, true)))
        metrics = self._metrics.compute_all(torch.cat(predicted), torch.cat(true))
        return {"val_loss": loss, **{f"val_{name}": value for name, value in metrics.items()}}

    def _mean(self, what: str, total: float, rows: int) -> float:
        if rows == 0:
            raise UserError(f"the {what} loader: expected at least one batch, got none")
        if not math.isfinite(total):
            raise Breakdown(
                f"epoch {self.epochs + 1}: the {what} loss is {total}; choose a smaller learning rate or a grad_clip"
            )
        return total / rows

    def _save(self) -> None:
        groups = [
            {name: len(value) if name == _PARAMS else _plain(value) for name, value in group.items()}
            for group in self.optimizer.param_groups
        ]
        kind = type(self.optimizer).__name__
        header = {_EPOCH: self.epochs, _BEST_LOSS: self.history["val_loss"][-1], _KIND: kind, _GROUPS: groups}
        save_with_header(self._checkpoint_dir / BEST, self.model, self.optimizer, header)


def create_trainer(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    loss_fn: nn.Module,
    optimizer: Optimizer,
    checkpoint_dir: str | Path,
    log_dir: str | Path,
    *,
    gradient_accumulation_steps: int = 1,
    grad_clip: float = 0.0,
    start: Checkpoint = UNTRAINED,
    classes: Iterable[str] | None = None,
) -> Trainer:
    """Prepare a training. `Trainer.train` runs it on the model's device.

    Args:
        model: takes the images of the loaders, and returns probabilities [B, K].
        train_loader: yields images and probabilities [B, K], again for each epoch: one of `create_loaders`, a
            `DataLoader`, or any other.
        val_loader: the same, for validation.
        loss_fn: takes predictions and targets, and returns the mean over the batch.
        optimizer: optimizer of the model's parameters.
        checkpoint_dir: folder for `best.safetensors`; made if missing.
        log_dir: folder for TensorBoard's events; made if missing.
        gradient_accumulation_steps: batches per step of the optimizer; the effective batch is their sum.
        grad_clip: largest L2 norm of the gradient; 0: no limit.
        start: state of the model and the optimizer, as `load_checkpoint` returns it. Epochs are counted from there, and
            only a lower loss replaces `best.safetensors`.
        classes: K names, which determine the metrics; None: the classes of the validation loader, else of the model,
            as `create_loaders` and `create_model` make them, else the 13 emotions.

    Raises:
        UserError: a number is out of range.
    """
    faults = []
    if gradient_accumulation_steps < 1:
        faults.append(f"gradient_accumulation_steps: expected a positive integer, got {gradient_accumulation_steps!r}")
    if grad_clip < 0:
        faults.append(f"grad_clip: expected a number of at least 0, got {grad_clip!r}")
    if faults:
        raise UserError(faults)
    if classes is None:
        classes = getattr(val_loader, "classes", getattr(model, "classes", EMOTIONS))
    for folder in (checkpoint_dir, log_dir):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Trainer(
        model,
        train_loader,
        val_loader,
        loss_fn,
        optimizer,
        Path(checkpoint_dir),
        Path(log_dir),
        gradient_accumulation_steps=gradient_accumulation_steps,
        grad_clip=grad_clip,
        start=start,
        classes=classes,
    )


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> Checkpoint:
    """Load a checkpoint of a trainer into a model and, if given, its optimizer. It cannot run code.

    Args:
        path: the file, or its folder.
        model: model of the same architecture.
        optimizer: optimizer of the same kind for the model's parameters; None: its state is not loaded.

    Returns:
        `epoch` (epochs trained) and `best_loss` (lowest validation loss so far).

    Raises:
        UserError: there is no such checkpoint, it belongs to another model or optimizer, or it is not a safetensors
            file.
    """
    file = Path(path) / BEST if Path(path).is_dir() else Path(path)
    epoch, best_loss, kind, groups = read_header(file, _EPOCH, _BEST_LOSS, _KIND, _GROUPS)
    if optimizer is not None:
        sizes = [len(group[_PARAMS]) for group in optimizer.param_groups]
        if (saved_sizes := [saved.pop(_PARAMS, 0) for saved in groups]) != sizes:
            raise UserError(
                f"{file}: the groups of its optimizer have {', '.join(map(str, saved_sizes))} parameters, those of "
                f"this optimizer {', '.join(map(str, sizes))}; make it as for the training that wrote the checkpoint"
            )
        if kind != type(optimizer).__name__:
            raise UserError(
                f"{file}: its optimizer is {kind}, not {type(optimizer).__name__}; make it as for the training that "
                f"wrote the checkpoint"
            )
    load_state(file, model, optimizer)
    if optimizer is not None:
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            for name, value in saved.items():
                kept = group.get(name)
                group[name] = torch.full_like(kept, value) if isinstance(kept, Tensor) else value
    return Checkpoint(int(epoch), float(best_loss))


def _plain(option: Any) -> Any:
    """Return an option of an optimizer without tensors. The learning rate, for example, may be a tensor."""
    if isinstance(option, tuple | list):
        return [_plain(item) for item in option]
    return option.item() if isinstance(option, Tensor) else option


def _groups(loader: Batches, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    batches = iter(loader)
    while group := list(itertools.islice(batches, size)):
        yield group


def _length(loader: Any) -> int:
    return len(loader) if isinstance(loader, Sized) else 0


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
