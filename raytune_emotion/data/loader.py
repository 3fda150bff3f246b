"""From rows of a split to batches on a device, one batch ahead of their use."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raytune_emotion.data.store import Split


@dataclass(frozen=True)
class Batch:
    """Rows of a split on a device; rows_B stays on the host, where it seeds the augmentation."""

    x_BHWC: torch.Tensor  # uint8
    prob_BK: torch.Tensor  # float32
    rows_B: npt.NDArray[np.int64]


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of n rows, [n], that is a function of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(split: Split, batches_of_rows: Iterable[npt.NDArray[np.int64]], device: torch.device) -> Iterator[Batch]:
    """Yields a batch for every array of row numbers, in their order.

    A background thread gathers the next batch while the caller works on this one. It ends with the iterator,
    also when that is closed early, and what it raises is raised here. Every batch has memory of its own, so
    the caller may keep it. On CUDA the caller's current stream waits for the copy; the host does not.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        ahead: deque[Future[tuple[Batch, torch.Event | None]]] = deque()
        for rows_B in batches_of_rows:
            ahead.append(thread.submit(_load, split, rows_B, device, side))
            if len(ahead) == 2:
                yield _arrived(*ahead.popleft().result())
        while ahead:
            yield _arrived(*ahead.popleft().result())


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
