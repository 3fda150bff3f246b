"""Gather rows of a split as batches: from files, one batch ahead, or from the GPU, if it has room for all images."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from raytune_emotion.data.store import Split, Store

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


#: What was placed last, by fingerprint, rows and device: the trials of a process, one after the other, share it.
_placed: dict[tuple[str, str, int, torch.device], Resident] = {}


def cache_on_device(store: Store, device: torch.device) -> tuple[Split | Resident, Split | Resident]:
    """Copy the splits of a store to a device, each if it may take up so much memory there; others stay in their files.

    They stay on the device until another store is placed.

    Returns:
        The training and the validation split.
    """
    # The larger part first, as long as there is the most room.
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
        del here  # before the next is judged, what does not stay is gone
    train, val = (_placed.get(key, split) for key, split in splits.items())
    return train, val


def clear_cache() -> None:
    """Free the splits that were placed last."""
    _placed.clear()


def lives_on_device(size: float, room: float) -> bool:
    """Tell whether images of so many bytes are to live on a device that has so many for this process."""
    return size <= _SHARE * room


def size_of(split: Split) -> int:
    """Return the bytes of its images."""
    return len(split) * math.prod(split.shards[0].shape[1:])


def _copy_to_device(split: Split, device: torch.device) -> Resident:
    x_NHWC = torch.empty((len(split), *split.shards[0].shape[1:]), dtype=torch.uint8, device=device)
    for start in range(0, len(split), _COPIED_AT_ONCE):
        part = x_NHWC[start : start + _COPIED_AT_ONCE]
        part.copy_(torch.from_numpy(split.gather(np.arange(start, start + len(part)))))
    return Resident(x_NHWC, torch.from_numpy(np.array(split.prob_NK)).to(device))


def _room(device: torch.device) -> float:
    """Return the GPU memory that this process may still take, bytes; 0 for a CPU, which has the files in its memory."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - used  # freed, but by torch and not to the device
    return min(free + kept, torch.cuda.get_per_process_memory_fraction(device.index) * total - used)


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return a permutation of n rows, [n], that is a function of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batches(
    source: Split | Resident, batches_of_rows: Iterable[npt.NDArray[np.int64]], device: torch.device
) -> Iterator[Batch]:
    """Yield a batch for every array of row numbers, in their order.

    From files, a background thread gathers the next batch while the caller works on this one. It ends with the
    iterator, also when that is closed early, and what it raises is raised here. Every batch has memory of its own, so
    the caller may keep it. On CUDA the caller's current stream waits for the copy; the host does not.
    """
    if isinstance(source, Resident):
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
    # One for all: torch keeps the memory that was freed on a stream for that stream alone.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _batch_of(source: Resident, rows_B: npt.NDArray[np.int64]) -> Batch:
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


def _after_copy(batch: Batch, copied: torch.Event | None) -> Batch:
    """Order the caller's stream after the copy, and the memory's reuse by the side stream after the caller's."""
    if copied is not None:
        stream = torch.cuda.current_stream(batch.x_BHWC.device)
        stream.wait_event(copied)
        batch.x_BHWC.record_stream(stream)
        batch.prob_BK.record_stream(stream)
    return batch
