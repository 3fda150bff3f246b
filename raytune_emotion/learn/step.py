"""Take one step of the optimizer: forward and backward pass of its micro-batches, gradient clipping, update.

On a GPU, a step of a small model takes as long as the launches of its kernels. Therefore, after a few steps, all
kernels of a step are captured as one CUDA graph, which is then launched as a whole (Nguyen et al., "Accelerating
PyTorch with CUDA Graphs", 2021). A captured step gives the same result as a launched one.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from raytune_emotion.data.augment import Decisions, Triple, augment
from raytune_emotion.data.loader import Batch
from raytune_emotion.learn.device import is_out_of_memory
from raytune_emotion.learn.losses import Loss

Input = tuple[Batch, Decisions]

#: Number of steps before the capture. They choose kernels, and create the optimizer's state and cuBLAS workspaces.
_LAUNCHED_FIRST = 3


@dataclasses.dataclass(frozen=True)
class Targets:
    """Smoothing of the training targets, and weights of the rows in the loss."""

    mean_K: torch.Tensor | None = None  # mean training target, which is mixed into each target; None: no smoothing
    smoothing: float = 0.0  # share of the mean in each target
    weight_K: torch.Tensor | None = None  # weight of a row by its majority class; None: all have weight 1

    def smooth(self, prob_BK: torch.Tensor) -> torch.Tensor:
        """Return the smoothed targets of a batch, whose images may be mixtures."""
        return prob_BK if self.mean_K is None else torch.lerp(prob_BK, self.mean_K.expand_as(prob_BK), self.smoothing)

    def weigh(self, prob_BK: torch.Tensor) -> torch.Tensor | None:
        """Return the weights of rows from their own distributions; None if all are equal."""
        return None if self.weight_K is None else self.weight_K[prob_BK.argmax(1)]


def make_targets(
    prob_NK: npt.NDArray[np.float32], *, smoothing: float, balance: float, device: torch.device
) -> Targets:
    """Build the targets of a training set.

    Args:
        prob_NK: distributions of the training rows.
        smoothing: share of their mean in each target; 0: none.
        balance: exponent of the weight of a row, which is the inverse frequency of its majority class to this power,
            scaled to mean 1 over the rows; 0: all rows have weight 1.
        device: device of the training.
    """
    mean_K = weight_K = None
    if smoothing:
        mean_K = torch.from_numpy(prob_NK.mean(axis=0, dtype=np.float64)).float().to(device)
    if balance:
        share_K = np.bincount(prob_NK.argmax(axis=1), minlength=prob_NK.shape[1]) / len(prob_NK)
        raw_K = np.where(share_K > 0, np.maximum(share_K, 1e-12) ** -balance, 0.0)
        weight_K = torch.from_numpy(raw_K / (share_K * raw_K).sum()).float().to(device)
    return Targets(mean_K, smoothing, weight_K)


class Step:
    """Train a model on one batch per call. A call does not wait for the device.

    Args:
        net: the model, compiled or not.
        optimizer: optimizer of its parameters.
        scaler: scaler of the gradients.
        loss: function of logits and targets, with one number per row.
        mean: mean of the model's input, for pixels in [0, 1].
        std: standard deviation of the model's input.
        dtype: precision of the forward and backward pass.
        device: device of the model.
        batch_rows: rows of a batch, over all workers.
        workers: number of workers, which each train on their share of a batch.
        targets: smoothing of the targets and weights of the rows.
        grad_clip: largest L2 norm of the gradient; 0: no limit.
        capture: whether to capture a step as a CUDA graph. All batches must then have the same shapes.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        loss: Loss,
        *,
        mean: Triple,
        std: Triple,
        dtype: torch.dtype,
        device: torch.device,
        batch_rows: int,
        workers: int,
        targets: Targets,
        grad_clip: float,
        capture: bool,
    ) -> None:
        self._net, self._optimizer, self._scaler, self._loss = net, optimizer, scaler, loss
        self._mean, self._std, self._dtype, self._device = mean, std, dtype, device
        self._workers, self._scale, self._targets, self._grad_clip = workers, workers / batch_rows, targets, grad_clip
        self._shared_net = _share_gradients(net, device, workers)
        self._only_head = False
        self.capture = capture
        #: Sum of the losses of all rows since the last reset to zero.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        # A captured step reads the learning rates of the groups from the device.
        factors = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        self._lr_G = torch.zeros(len(factors), device=device) if capture else None
        self._factors_G = torch.tensor(factors, device=device)  # factors on them
        self._launched = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Input] = []  # inputs of the graph

    @property
    def captured(self) -> bool:
        """Tell whether steps are launched as a graph."""
        return self._graph is not None

    def __call__(self, inputs: Sequence[Input], lr: float, *, only_head: bool = False) -> None:
        """Train on the micro-batches of one batch.

        Args:
            inputs: the micro-batches, each with its augmentation parameters.
            lr: the learning rate, before the factors of the optimizer's groups.
            only_head: whether only the classifier is trained.
        """
        if only_head != self._only_head:
            self._freeze(only_head=only_head)
        self._set_learning_rates(lr)
        if self.capture and self._graph is None and self._launched >= _LAUNCHED_FIRST:
            self._capture_graph(inputs)
        if self._graph is not None:
            for to, values in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
                to.copy_(values, non_blocking=True)
            self._graph.replay()
        elif self.capture:
            self._launch_aside(inputs)
        else:
            self._launch(inputs)
        self._launched += 1

    def _freeze(self, *, only_head: bool) -> None:
        """Train only the classifier, or all parameters.

        Frozen parameters have no gradients: there is no backward pass through them, the norm of the gradients does not
        include them, and the optimizer creates their state when they are trained.
        """
        self._only_head = only_head
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(not only_head or group["head"])
        # The wrapper for workers, and a captured graph, hold the parameters that were trained when they were made.
        self._shared_net = _share_gradients(self._net, self._device, self._workers)
        if self._graph is not None:
            torch.cuda.synchronize(self._device)  # the graph may still run
        self._graph, self._inputs, self._launched = None, [], 0

    def _set_learning_rates(self, lr: float) -> None:
        groups = self._optimizer.param_groups
        if self._lr_G is None:
            for group in groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            return
        torch.mul(self._factors_G, lr, out=self._lr_G)
        if self._graph is None:
            for group, lr_of_group in zip(groups, self._lr_G, strict=True):
                group["lr"] = lr_of_group

    def _launch(self, inputs: Sequence[Input]) -> None:
        for index, (batch, decisions) in enumerate(inputs):
            x_BCHW, prob_BK = augment(batch, decisions, mean=self._mean, std=self._std)
            prob_BK, weight_B = self._targets.smooth(prob_BK), self._targets.weigh(batch.prob_BK)
            # Workers add their gradients once per step, at its last micro-batch.
            with contextlib.nullcontext() if index == len(inputs) - 1 else _no_sync(self._shared_net):
                with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                    logits_BK = self._shared_net(x_BCHW)
                loss_B = self._loss(logits_BK.float(), prob_BK)
                loss = (loss_B if weight_B is None else loss_B * weight_B).sum()
                # Compute the gradient of the mean over the whole batch, however it is split. The factor `workers`
                # undoes the mean over workers in the wrapper.
                self._scaler.scale(loss * self._scale).backward()  # type: ignore[no-untyped-call]
            self.loss_sum += loss.detach()
        if self._grad_clip > 0:
            self._scaler.unscale_(self._optimizer)
            _clip([p for group in self._optimizer.param_groups for p in group["params"]], self._grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()

    def _launch_aside(self, inputs: Sequence[Input]) -> None:
        """Launch a step on a separate stream, as PyTorch requires before a capture."""
        aside, current = _capture_stream(self._device), torch.cuda.current_stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._launch(inputs)
        current.wait_stream(aside)

    def _capture_graph(self, inputs: Sequence[Input]) -> None:
        """Capture a step as a graph. If the model cannot be captured, its kernels are still launched one by one.

        Raises:
            torch.OutOfMemoryError: the device has too little memory for the graph.
        """
        self._inputs = [_copy(given) for given in inputs]
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graph allocates from a separate memory pool
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(_capture_stream(self._device)), _capturable(self._optimizer):
                # "thread_local" allows copies of the loader's thread meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._launch(self._inputs)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.capture, self._inputs = False, []
            # Only the text is kept: the error holds the tensors of the failed step.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            ran_out, text = is_out_of_memory(first), str(first)
            del first
        else:
            self._graph = graph
            return
        del graph  # with its memory
        if ran_out:
            raise torch.OutOfMemoryError(text)
        warnings.warn(f"the training step cannot be captured as a CUDA graph: {text}", stacklevel=2)
        self._optimizer.zero_grad()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all steps before a capture, and of all captures, in this process.

    torch has 32 streams for each device, and then returns the first ones again. A new stream for each step would in
    time be that of the loader, whose copies would become part of the graph. And memory that was freed on a stream is
    kept for that stream only.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer be captured within the block. Outside of a graph, it would warn about this setting."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _tensors(inputs: Sequence[Input]) -> list[torch.Tensor]:
    return [
        tensor
        for batch, decisions in inputs
        for tensor in (batch.x_BHWC, batch.prob_BK, *(decisions[name] for name in decisions))
    ]


def _copy(given: Input) -> Input:
    batch, decisions = given
    copied = dataclasses.replace(batch, x_BHWC=batch.x_BHWC.clone(), prob_BK=batch.prob_BK.clone())
    return copied, {name: tensor.clone() for name, tensor in decisions.items()}


def _clip(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Scale the gradients so that their total norm is at most this."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    # A comparison would wait for a GPU. On a CPU, it saves a pass through the memory of all gradients.
    if norm.is_cuda or not norm <= most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm, foreach=True)


def _share_gradients(net: nn.Module, device: torch.device, workers: int) -> nn.Module:
    """Wrap a model so that its workers add the gradients of the trained parameters. One worker needs no wrapper."""
    if workers == 1:
        return net
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option will be renamed
        # Buffers are shared before evaluations instead: once per report, not once per step.
        return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def _no_sync(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    return net.no_sync() if isinstance(net, DistributedDataParallel) else contextlib.nullcontext()
