"""Measure the throughput of trials that share a device, with processes that train on it at the same time.

Each process trains as a trial does, but does not evaluate while it is timed. It reads orders as lines of JSON from its
standard input, and writes answers as lines to its standard output.
"""

import contextlib
import dataclasses
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from raytune_emotion.config import FlatConfig, RunConfig
from raytune_emotion.data.loader import DeviceSplit, clear_cache, lives_on_device, size_of
from raytune_emotion.data.store import Split, Store, open_store
from raytune_emotion.errors import Breakdown
from raytune_emotion.learn import malloc
from raytune_emotion.learn.device import allowance, is_out_of_memory, limit_memory, reduce_fragmentation
from raytune_emotion.learn.evaluation import evaluate
from raytune_emotion.learn.loop import Run, make_plan, rows_to_evaluate, start, train_segment

#: Numbers of parallel trials that are measured.
COUNTS = (1, 2, 4, 8)

#: Share of the best throughput. The smallest count that reaches this share is used.
_NEAR = 0.95
#: Number of rows of a split that are used for a measurement.
_ROWS = 4096
#: Length of training between two reports in a measurement, seconds.
_SEGMENT_S = 0.25


def best_count(rates: Sequence[Mapping[int, float]]) -> int:
    """Return the number of parallel trials that trains equally many images of each backbone in almost the least time.

    Args:
        rates: for each backbone, total images per second by the number of trials; numbers that do not fit are missing.

    Returns:
        A number that fits for all backbones; 1 if there is none.
    """
    fitting = sorted(set(rates[0]).intersection(*rates))
    seconds = {count: sum(1 / of_one[count] for of_one in rates) for count in fitting}
    return next((count for count in fitting if seconds[count] * _NEAR <= min(seconds.values())), 1)


def fitting_counts(counts: Sequence[int], *, peak: float, images: float, total: float) -> list[int]:
    """Return the numbers of parallel trials for which a device has enough memory.

    Args:
        counts: candidate numbers.
        peak: largest memory of a trial without its images, bytes.
        images: memory of all images, bytes; they are kept on the device if there is room.
        total: memory of the device, bytes.
    """
    room = {count: allowance(total, 1 / count) for count in counts}
    return [count for count in counts if peak + images * lives_on_device(images, room[count]) <= room[count]]


class Process:
    """A process that trains on a device. It answers each order once, in order."""

    def __init__(self, device: torch.device) -> None:
        command = [sys.executable, "-m", __name__, str(device)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, settings: FlatConfig, store: str) -> None:
        """Prepare to train. The answer: its device memory, the size of all images, and the device's memory, in bytes.

        The answer is None if the device has too little memory.
        """
        self._tell({"settings": dict(settings), "store": store})

    def train(self, *, seconds: float, threads: int, share: float, resident: bool) -> None:
        """Train for some seconds with a share of the device. The answer: images per second, None if out of memory.

        `resident` says whether images that are on the device are read from there.
        """
        self._tell({"seconds": seconds, "threads": threads, "share": share, "resident": resident})

    def rest(self) -> None:
        """Free the device memory of the process. The answer comes afterwards."""
        self._tell({})

    def answer(self) -> Any:
        """Wait for the next answer.

        Raises:
            Breakdown: the process has ended.
        """
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise Breakdown(f"a process that measured the device's throughput ended with code {self._popen.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._popen.kill()
        self._popen.communicate()

    def _tell(self, order: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `answer` will report it
            print(json.dumps(order), file=self._popen.stdin, flush=True)


@contextlib.contextmanager
def timing_processes(count: int, device: torch.device) -> Iterator[list[Process]]:
    """Start this number of processes, and end them with the block."""
    with contextlib.ExitStack() as stack:
        started = [Process(device) for _ in range(count)]
        for process in started:
            stack.callback(process.end)
        yield started


def train_side_by_side(some: Sequence[Process], *, seconds: float, cores: float, resident: bool = True) -> float | None:
    """Train in processes at the same time, each with its share of the device and of the cores.

    Returns:
        Their total images per second; None if one of them is out of memory.
    """
    for process in some:
        threads = max(1, int(cores / len(some)))
        process.train(seconds=seconds, threads=threads, share=1 / len(some), resident=resident)
    rates = [process.answer() for process in some]
    return None if None in rates else float(sum(rates))


def measure(
    backbones: Mapping[str, FlatConfig],
    stores: Mapping[int, str],
    device: torch.device,
    *,
    cores: float,
    counts: Sequence[int] = COUNTS,
    seconds: float = 2.0,
) -> dict[str, dict[int, float]]:
    """Measure the total images per second of parallel trials on a device, by backbone and number of trials.

    Numbers for which the device has too little memory are left out.

    Args:
        backbones: settings of each backbone.
        stores: packed data by image size, px.
        device: device to share.
        cores: cores of all trials together.
        counts: numbers of trials.
        seconds: length of each measurement, seconds.

    Raises:
        Breakdown: a process has ended.
    """
    found: dict[str, dict[int, float]] = {}
    with timing_processes(max(counts), device) as every:
        for backbone, settings in backbones.items():
            store = stores[RunConfig.from_flat(settings).data.image_size]
            found[backbone] = _measure_one(every, settings, store, cores=cores, counts=counts, seconds=seconds)
            for process in every:
                process.rest()
                process.answer()
    return found


def _measure_one(
    every: Sequence[Process],
    settings: FlatConfig,
    store: str,
    *,
    cores: float,
    counts: Sequence[int],
    seconds: float,
) -> dict[int, float]:
    """Return the total images per second by number of trials. Numbers that do not fit are left out."""
    every[0].begin(settings, store)
    if (answer := every[0].answer()) is None:
        return {}
    peak, images, total = answer
    fitting = fitting_counts(counts, peak=peak, images=images, total=total)
    others = every[1 : max(fitting, default=1)]
    for process in others:
        process.begin(settings, store)
    # The device may have less free memory than the first process has found.
    able = [every[0], *[process for process in others if process.answer() is not None]]
    found: dict[int, float] = {}
    for count in fitting:
        resident = lives_on_device(images, allowance(total, 1 / count))
        if count <= len(able):
            rate = train_side_by_side(able[:count], seconds=seconds, cores=cores, resident=resident)
            found |= {} if rate is None else {count: rate}
    return found


# ---- within a process


def _serve(device: torch.device) -> None:
    malloc.keep_freed_memory()
    reduce_fragmentation()
    torch.set_num_threads(1)  # until an order sets the number
    run: Run | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any = None
        try:
            if "seconds" in order:
                answer = _train(run, **order) if run is not None else None
            else:
                run = None
            if "settings" in order:
                _release(device)
                run, answer = _prepare(order["settings"], order["store"], device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run = None
        if run is None:
            _release(device)
        print(json.dumps(answer), flush=True)


def _release(device: torch.device) -> None:
    clear_cache()
    gc.collect()
    # A process that has not trained has no context on the GPU, and gets none here: it would take memory from others.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        limit_memory(device, 1)
        torch.cuda.empty_cache()


def _prepare(settings: FlatConfig, place: str, device: torch.device) -> tuple[Run, tuple[float, int, float]]:
    store, cuda = open_store(place), device.type == "cuda"
    if cuda:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
    # The learning rate is so small that nothing diverges. A few rows may have fewer steps than evaluations. While only
    # the head learns, a step takes less time and memory.
    own = {"optim.lr": 1e-9, "train.evals_per_epoch": 1, "model.freeze_epochs": 0}
    run = _begin(RunConfig.from_flat({**settings, **own}), store, device)
    peak = torch.cuda.max_memory_reserved(device) - _images_on_device(run) if cuda else 0
    total = torch.cuda.get_device_properties(device).total_memory if cuda else math.inf
    return run, (peak, size_of(store.train) + size_of(store.val), total)


def _begin(config: RunConfig, store: Store, device: torch.device) -> Run:
    """Begin a run on a few rows, and warm it up. Its reports are about a quarter of a second apart."""
    few = dataclasses.replace(store, train=_first_rows(store.train, _ROWS), val=_first_rows(store.val, _ROWS))
    run = start(config, few, device, make_plan(config, few, device), fresh=False)
    evaluate(run.model, run.val, classes=store.classes, device=device, rows=rows_to_evaluate(run))
    tried = _with_first_report_after(run, min(4, run.plan.steps_per_epoch))
    train_segment(tried, [])  # chooses kernels
    began = time.perf_counter()
    train_segment(tried, [])
    steps = tried.plan.stops[0] * _SEGMENT_S / (time.perf_counter() - began)
    return _with_first_report_after(run, min(max(1, int(steps)), run.plan.steps_per_epoch))


def _train(run: Run, *, seconds: float, threads: int, share: float, resident: bool) -> float:
    """Train for some seconds, and return the images per second."""
    torch.set_num_threads(threads)
    limit_memory(run.device, share)
    if not resident:
        run = dataclasses.replace(run, train=run.store.train)
    began, steps = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        train_segment(run, [])
        steps += run.plan.stops[0]
    return steps * run.plan.batch_rows / took


def _images_on_device(run: Run) -> int:
    """Return the size of the images on the device, bytes."""
    return sum(part.x_NHWC.nbytes for part in (run.train, run.val) if isinstance(part, DeviceSplit))


def _with_first_report_after(run: Run, steps: int) -> Run:
    """Return the run with its first report after this number of steps."""
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, stops=(steps,)))


def _first_rows(split: Split, rows: int) -> Split:
    return dataclasses.replace(split, ids=split.ids[:rows], prob_NK=split.prob_NK[:rows])


if __name__ == "__main__":
    _serve(torch.device(sys.argv[1]))
