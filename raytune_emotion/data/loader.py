"""From rows of a split to batches on a device: from files one batch ahead of their use, or from the device itself."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raytune_emotion.data.store import Split

#: Of the memory that a process may take on a GPU, what the images of a split may take up at most.
_SHARE = 0.4
_COPIED_AT_ONCE = 1024  # rows


@dataclass(frozen=True)
class Batch:
    """Rows of a split on a device; rows_B stays on the host, where it seeds the augmentation."""

    x_BHWC: torch.Tensor  # uint8
    prob_BK: torch.Tensor  # float32
    rows_B: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Resident:
    """A split that lies on a device as a whole: batches of it need next to nothing of the host."""

    x_NHWC: torch.Tensor  # uint8
    prob_NK: torch.Tensor  # float32

    def __len__(self) -> int:
        return len(self.x_NHWC)


def place(split: Split, device: torch.device) -> Split | Resident:
    """Copies a split to a device where it may take up so much memory, or leaves it in its files."""
    shape = (len(split), *split.shards[0].shape[1:])
    if math.prod(shape) > _SHARE * _room(device):
        return split
    x_NHWC = torch.empty(shape, dtype=torch.uint8, device=device)
    for start in range(0, len(split), _COPIED_AT_ONCE):
        part = x_NHWC[start : start + _COPIED_AT_ONCE]
        part.copy_(torch.from_numpy(split.gather(np.arange(start, start + len(part)))))
    return Resident(x_NHWC, torch.from_numpy(np.array(split.prob_NK)).to(device))


def _room(device: torch.device) -> float:
    """Bytes of a GPU's memory that this process may still take; 0 for a CPU, which has the files in its memory."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device.index) * total - torch.cuda.memory_reserved(device)
    return min(free, allowed)


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of n rows, [n], that is a function of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    source: Split | Resident, batches_of_rows: Iterable[npt.NDArray[np.int64]], device: torch.device
) -> Iterator[Batch]:
    """Yields a batch for every array of row numbers, in their order.

    From files, a background thread gathers the next batch while the caller works on this one. It ends with the
    iterator, also when that is closed early, and what it raises is raised here. Every batch has memory of its own, so
    the caller may keep it. On CUDA the caller's current stream waits for the copy; the host does not.
    """
    if isinstance(source, Resident):
        for rows_B in batches_of_rows:
            yield _taken(source, rows_B)
        return
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        ahead: deque[Future[tuple[Batch, torch.Event | None]]] = deque()
        for rows_B in batches_of_rows:
            ahead.append(thread.submit(_load, source, rows_B, device, side))
            if len(ahead) == 2:
                yield _arrived(*ahead.popleft().result())
        while ahead:
            yield _arrived(*ahead.popleft().result())


def _taken(source: Resident, rows_B: npt.NDArray[np.int64]) -> Batch:
    if rows_B.size and (rows_B.min() < 0 or rows_B.max() >= len(source)):
        raise IndexError(f"rows {rows_B.min()} to {rows_B.max()} of a split of {len(source)}")
    at_B = torch.from_numpy(rows_B)
    if source.x_NHWC.is_cuda:
        at_B = at_B.pin_memory().to(source.x_NHWC.device, non_blocking=True)
    return Batch(source.x_NHWC[at_B], source.prob_NK[at_B], rows_B)


def _load(
    split: Split, rows_B: npt.NDArray[np.int64], device: torch.device, side: torch.cuda.Stream | None
) -> tuple[Batch, torch.Event | None]:
    if side is None:
        x_BHWC, prob_BK = torch.from_numpy(split.gather(rows_B)), torch.from_numpy(split.prob_NK[rows_B])
        return Batch(x_BHWC.to(device), prob_BK.to(device), rows_B), None
    # The streams and the device that are current belong to a thread, and this one has set none yet.
    with torch.cuda.stream(side):
        # Pinned blocks come from torch's cache, which gives one out again only after the copies from it are done.
        x_BHWC = torch.empty((len(rows_B), *split.gather(rows_B[:0]).shape[1:]), dtype=torch.uint8, pin_memory=True)
        split.gather(rows_B, out=x_BHWC.numpy())
        prob_BK = torch.from_numpy(split.prob_NK[rows_B]).pin_memory()
        batch = Batch(x_BHWC.to(device, non_blocking=True), prob_BK.to(device, non_blocking=True), rows_B)
        return batch, side.record_event()


def _arrived(batch: Batch, copied: torch.Event | None) -> Batch:
    """Orders the caller's stream after the copy, and the memory's reuse by the side stream after the caller's."""
    if copied is not None:
        stream = torch.cuda.current_stream(batch.x_BHWC.device)
        stream.wait_event(copied)
        batch.x_BHWC.record_stream(stream)
        batch.prob_BK.record_stream(stream)
    return batch
