"""Gather rows of a split as batches: from files, one batch ahead, or from the GPU if all images fit there."""

import math
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from raytune_emotion.data.store import Split, Store

#: Largest share of a process's GPU memory that one split may use.
_SHARE = 0.4
#: Number of rows that are copied to a GPU at once.
_COPIED_AT_ONCE = 1024


@dataclass(frozen=True)
class Batch:
    """Rows of a split on a device; rows_B stays on the host, where it seeds the augmentation."""

    x_BHWC: torch.Tensor  # uint8
    prob_BK: torch.Tensor  # float32
    rows_B: npt.NDArray[np.int64]


@dataclass(frozen=True)
class DeviceSplit:
    """A split whose images are all on a device. Its batches cost the host almost no time."""

    x_NHWC: torch.Tensor  # uint8
    prob_NK: torch.Tensor  # float32

    def __len__(self) -> int:
        return len(self.x_NHWC)

    @property
    def side(self) -> int:
        """Side of the images, px."""
        return self.x_NHWC.shape[1]


#: Splits of the last store, by fingerprint, name, rows and device. Successive trials of a process share them.
_placed: dict[tuple[str, str, int, torch.device], DeviceSplit] = {}


def cache_on_device(store: Store, device: torch.device) -> tuple[Split | DeviceSplit, Split | DeviceSplit]:
    """Copy each split of a store to a device if it may use that much memory there; otherwise leave it in its files.

    The splits stay on the device until another store is copied.

    Returns:
        The training and the validation split.
    """
    # The larger split comes first, while most room is free.
    splits = {
        (store.fingerprint, name, len(split), device): split
        for name, split in (("train", store.train), ("val", store.val))
    }
    kept = {key: _placed[key] for key in splits if key in _placed}
    _placed.clear()
    for key, split in splits.items():
        room = _room(device) + sum(resident.x_NHWC.numel() for resident in kept.values())
        here = kept.pop(key, None)
        if lives_on_device(size_of(split), room):
            _placed[key] = _copy_to_device(split, device) if here is None else here
        del here  # free a split that does not stay before the next one is measured
    train, val = (_placed.get(key, split) for key, split in splits.items())
    return train, val


def clear_cache() -> None:
    """Free the splits of the last store."""
    _placed.clear()


def lives_on_device(size: float, room: float) -> bool:
    """Tell whether images of `size` bytes are kept on a device where this process may use `room` bytes."""
    return size <= _SHARE * room


def size_of(split: Split) -> int:
    """Return the size of the images of a split, bytes."""
    return len(split) * math.prod(split.shards[0].shape[1:])


def _copy_to_device(split: Split, device: torch.device) -> DeviceSplit:
    x_NHWC = torch.empty((len(split), *split.shards[0].shape[1:]), dtype=torch.uint8, device=device)
    for start in range(0, len(split), _COPIED_AT_ONCE):
        part = x_NHWC[start : start + _COPIED_AT_ONCE]
        part.copy_(torch.from_numpy(split.gather(np.arange(start, start + len(part)))))
    return DeviceSplit(x_NHWC, torch.from_numpy(np.array(split.prob_NK)).to(device))


def _room(device: torch.device) -> float:
    """Return the GPU memory that this process may still use, bytes; 0 for a CPU, whose memory maps the files."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - used  # free memory that torch has not returned to the device
    return min(free + kept, torch.cuda.get_per_process_memory_fraction(device.index) * total - used)


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return a permutation of n rows, [n], which depends only on (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    source: Split | DeviceSplit, batches_of_rows: Iterable[npt.NDArray[np.int64]], device: torch.device
) -> Generator[Batch, None, None]:
    """Yield a batch for every array of row numbers, in their order.

    From files, a background thread gathers the next batch while the caller works on this one. The thread ends with the
    iterator, also if it is closed early, and errors of the thread are raised here. Every batch has its own memory, so
    the caller may keep it. On CUDA the caller's current stream waits for the copy; the host does not.
    """
    if isinstance(source, DeviceSplit):
        for rows_B in batches_of_rows:
            yield _batch_of(source, rows_B)
        return
    side = _side_stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        ahead: deque[Future[tuple[Batch, torch.Event | None]]] = deque()
        for rows_B in batches_of_rows:
            ahead.append(thread.submit(_load, source, rows_B, device, side))
            if len(ahead) == 2:
                yield _after_copy(*ahead.popleft().result())
        while ahead:
            yield _after_copy(*ahead.popleft().result())


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One stream for all: torch keeps memory that was freed on a stream for that stream only.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _batch_of(source: DeviceSplit, rows_B: npt.NDArray[np.int64]) -> Batch:
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
    # The current stream and device belong to a thread, and this thread has not set them yet.
    with torch.cuda.stream(side):
        # Pinned blocks come from torch's cache, which reuses a block only after all copies from it are done.
        x_BHWC = torch.empty((len(rows_B), *split.gather(rows_B[:0]).shape[1:]), dtype=torch.uint8, pin_memory=True)
        split.gather(rows_B, out=x_BHWC.numpy())
        prob_BK = torch.from_numpy(split.prob_NK[rows_B]).pin_memory()
        batch = Batch(x_BHWC.to(device, non_blocking=True), prob_BK.to(device, non_blocking=True), rows_B)
        return batch, side.record_event()


def _after_copy(batch: Batch, copied: torch.Event | None) -> Batch:
    """Order the caller's stream after the copy, and the memory's reuse by the side stream after the caller's."""
    if copied is not None:
        stream = torch.cuda.current_stream(batch.x_BHWC.device)
        stream.wait_event(copied)
        batch.x_BHWC.record_stream(stream)
        batch.prob_BK.record_stream(stream)
    return batch
