import dataclasses
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_emotion.data import loader
from raytune_emotion.data.loader import DeviceSplit, batches, cache_on_device, epoch_order, size_of
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.store import Split, Store
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.learn.device import allowance

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
N = 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder: Path = tmp_path_factory.mktemp("loader")
    write_sample(folder / "faces", train=N, val=2, image_size=16)
    return pack(folder / "faces", folder / "store", image_size=16, workers=1)


@pytest.fixture(scope="module")
def split(store: Store) -> Split:
    return store.train


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("loader")]


def rows(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize("placed", [False, True], ids=["files", "resident"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
@given(asked=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=7), max_size=6))
def test_yields_the_rows_asked_for_in_their_order(
    split: Split, device: torch.device, placed: bool, asked: list[list[int]]
) -> None:
    # All are kept to the end: a batch must not be overwritten by a later one.
    source = loader._copy_to_device(split, device) if placed else split
    got = list(batches(source, (rows(*r) for r in asked), device))
    assert [b.rows_B.tolist() for b in got] == asked
    for batch in got:
        assert batch.x_BHWC.device.type == batch.prob_BK.device.type == device.type
        assert batch.x_BHWC.dtype == torch.uint8
        assert batch.prob_BK.dtype == torch.float32
        np.testing.assert_array_equal(batch.x_BHWC.cpu().numpy(), split.gather(batch.rows_B))
        np.testing.assert_array_equal(batch.prob_BK.cpu().numpy(), split.prob_NK[batch.rows_B])
    assert threads() == []


class Device:
    """Has so many bytes for this process, less what is placed; it is a CPU all the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float) -> None:
        self.total = total
        self._copies: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        copied = loader._copy_to_device

        def watched(split: Split, device: torch.device) -> DeviceSplit:
            resident = copied(split, device)
            self._copies.add(resident.x_NHWC)
            return resident

        monkeypatch.setattr(loader, "_placed", {})
        monkeypatch.setattr(loader, "_copy_to_device", watched)
        monkeypatch.setattr(loader, "_room", lambda device: self.total - self.taken())

    def taken(self) -> int:
        return sum(x_NHWC.numel() for x_NHWC in self._copies)


@pytest.mark.parametrize(("more", "kind"), [(-1, Split), (1, DeviceSplit)])
def test_a_split_is_placed_where_it_may_take_up_so_much(
    store: Store, monkeypatch: pytest.MonkeyPatch, more: int, kind: type
) -> None:
    assert cache_on_device(store, CPU) == (store.train, store.val)
    monkeypatch.setattr(loader, "_COPIED_AT_ONCE", 7)
    Device(monkeypatch, size_of(store.train) / loader._SHARE + more)
    placed, _ = cache_on_device(store, CPU)
    assert type(placed) is kind
    if isinstance(placed, DeviceSplit):
        np.testing.assert_array_equal(placed.x_NHWC.numpy(), store.train.gather(np.arange(N)))
        with pytest.raises(IndexError):
            next(batches(placed, [rows(-1)], CPU))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_trials_that_start_together_on_a_gpu_leave_room_for_each_other(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Each sees the whole device free, since none of them has taken its memory yet."""
    total, gpu = 80 * 2**30, torch.device("cuda", 0)
    fraction = allowance(total, 1 / count) / total
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: fraction)
    assert count * loader._room(gpu) <= total
    # Somebody else's process has taken most of the device.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, total))
    assert loader._room(gpu) == 2**30


def test_what_is_placed_stays_until_another_store_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, size_of(store.train) / loader._SHARE + 1)
    placed, again = cache_on_device(store, CPU), cache_on_device(dataclasses.replace(store), CPU)
    assert all(one is other and isinstance(one, DeviceSplit) for one, other in zip(placed, again, strict=True))
    del placed, again
    assert device.taken() == size_of(store.train) + size_of(store.val)
    # There is room for both parts of another only where these are gone.
    other = dataclasses.replace(store, fingerprint="other")
    assert all(isinstance(part, DeviceSplit) for part in cache_on_device(other, CPU))
    # When the process may take less than before, they go back to their files.
    device.total = size_of(store.train)
    assert cache_on_device(other, CPU)[0] is store.train
    assert device.taken() <= size_of(store.val)


@pytest.mark.parametrize("placed", [False, True], ids=["files", "resident"])
def test_the_caller_may_write_into_a_batch(split: Split, placed: bool) -> None:
    first, second = batches(loader._copy_to_device(split, CPU) if placed else split, [rows(3), rows(3)], CPU)
    first.x_BHWC.zero_()
    first.prob_BK.zero_()
    np.testing.assert_array_equal(second.x_BHWC.numpy(), split.gather(rows(3)))
    assert split.prob_NK[3].sum() == pytest.approx(1, abs=1e-5)


def test_works_one_batch_ahead_and_no_further(split: Split) -> None:
    taken = []

    def asked() -> Iterator[npt.NDArray[np.int64]]:
        for i in range(5):
            taken.append(i)
            yield rows(i)

    ahead = [len(taken) - int(batch.rows_B[0]) - 1 for batch in batches(split, asked(), CPU)]
    assert ahead == [1, 1, 1, 1, 0]


def test_closing_early_ends_the_thread(split: Split) -> None:
    iterator = batches(split, (rows(i % N) for i in range(1000)), CPU)
    next(iterator)
    assert threads() != []
    iterator.close()  # type: ignore[attr-defined]
    assert threads() == []


def test_leaving_the_loop_ends_the_thread(split: Split) -> None:
    for _ in batches(split, (rows(i % N) for i in range(1000)), CPU):
        break
    assert threads() == []


def test_an_exception_in_the_loop_ends_the_thread(split: Split) -> None:
    def train() -> None:
        for _ in batches(split, (rows(i % N) for i in range(1000)), CPU):
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        train()
    assert threads() == []


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_the_thread_raises_is_raised_in_its_turn(split: Split, device: torch.device) -> None:
    got = []
    with pytest.raises(IndexError):
        got.extend(b.rows_B.tolist() for b in batches(split, [rows(0), rows(1), rows(N), rows(2)], device))
    assert threads() == []
    iterator = batches(split, [rows(0), rows(1), rows(N)], device)
    assert [next(iterator).rows_B.tolist() for _ in range(2)] == [[0], [1]]
    with pytest.raises(IndexError):
        next(iterator)


def test_what_the_rows_raise_is_raised(split: Split) -> None:
    def asked() -> Iterator[npt.NDArray[np.int64]]:
        yield rows(0)
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError, match="no more rows"):
        list(batches(split, asked(), CPU))
    assert threads() == []


def test_leaves_the_global_generators_alone(split: Split) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(batches(split, [epoch_order(N, 0, 0)], CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002


@given(n=st.integers(1, 300), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_decided_by_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == epoch_order(n, seed, epoch).tolist()


def test_epochs_and_seeds_are_ordered_differently() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
