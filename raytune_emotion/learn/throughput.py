"""Measure the throughput of trials that share a device, with processes that train on it at the same time.

Each process trains as a trial does, but does not evaluate while it is timed. It reads orders as lines of JSON from its
standard input, and writes answers as lines to its standard output.
"""

import contextlib
import dataclasses
import gc
import json
import math
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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
#: Number of steps that choose kernels and capture a step as a graph.
_WARM_UP = 4
#: Length of training between two reports in a measurement, seconds.
_SEGMENT_S = 0.25
#: Longest wait for an answer, seconds. A process may compile its model beside seven others on few cores.
_ANSWER_S = 1800.0
#: Longest wait for the end of a process, seconds. One that hangs in the driver of a GPU cannot be ended.
_END_S = 5.0


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


#: Times of one clock of this machine, seconds, each with the number of images that a process has trained by then.
Course = list[tuple[float, int]]


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
        """Train for some seconds with a share of the device. The answer: a `Course`, None if out of memory.

        `resident` says whether images that are on the device are read from there.
        """
        self._tell({"seconds": seconds, "threads": threads, "share": share, "resident": resident})

    def rest(self) -> None:
        """Free the device memory of the process. The answer comes afterwards."""
        self._tell({})

    def answer(self) -> Any:
        """Wait for the next answer. The caller waits for each before it gives another order.

        Raises:
            Breakdown: the process has ended, or it hangs.
        """
        assert self._popen.stdout is not None
        if not select.select([self._popen.stdout], [], [], _ANSWER_S)[0]:
            raise Breakdown(f"a process that measured the device's throughput gave no answer for {_ANSWER_S:g} s")
        line = self._popen.stdout.readline()
        if not line:
            raise Breakdown(f"a process that measured the device's throughput ended with code {self._popen.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.communicate(timeout=_END_S)

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
        Their total images per second while all of them train; None if one of them is out of memory, or too late.
    """
    for process in some:
        threads = max(1, int(cores / len(some)))
        process.train(seconds=seconds, threads=threads, share=1 / len(some), resident=resident)
    courses = [process.answer() for process in some]
    return None if None in courses else common_rate(courses)


def common_rate(courses: Sequence[Course]) -> float | None:
    """Return the total images per second from the latest start to the earliest end; None if there is no such time.

    A process whose rivals have not begun or have ended has more of the device, and would seem too fast.
    """
    start = max(course[0][0] for course in courses)
    end = min(course[-1][0] for course in courses)
    if end <= start:
        return None
    images = 0.0
    for course in courses:
        times, counts = zip(*course, strict=True)
        before, after = np.interp([start, end], times, counts)
        images += float(after - before)
    return images / (end - start)


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
    """Begin a run on a few rows, and warm it up."""
    few = dataclasses.replace(store, train=_first_rows(store.train, _ROWS), val=_first_rows(store.val, _ROWS))
    run = start(config, few, device, make_plan(config, few, device), fresh=False)
    evaluate(run.model, run.val, classes=store.classes, device=device, rows=rows_to_evaluate(run))
    tried = _with_first_report_after(run, _WARM_UP)
    for _ in range(math.ceil(_WARM_UP / tried.plan.stops[0])):
        train_segment(tried, [])
    return tried


def _train(run: Run, *, seconds: float, threads: int, share: float, resident: bool) -> Course:
    """Train for some seconds. Each number of images comes about a quarter of a second after the one before."""
    torch.set_num_threads(threads)
    limit_memory(run.device, share)
    if not resident:
        run = dataclasses.replace(run, train=run.store.train)
    course = [(time.monotonic(), 0)]
    while (began := course[-1][0]) < course[0][0] + seconds:
        train_segment(run, [])
        ended, steps = time.monotonic(), run.plan.stops[0]
        course.append((ended, course[-1][1] + steps * run.plan.batch_rows))
        run = _with_first_report_after(run, int(steps * _SEGMENT_S / (ended - began)))
    return course


def _images_on_device(run: Run) -> int:
    """Return the size of the images on the device, bytes."""
    return sum(part.x_NHWC.nbytes for part in (run.train, run.val) if isinstance(part, DeviceSplit))


def _with_first_report_after(run: Run, steps: int) -> Run:
    """Return the run with its first report after this number of steps, at least one and at most those of an epoch."""
    stops = (max(1, min(steps, run.plan.steps_per_epoch)),)
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, stops=stops))


def _first_rows(split: Split, rows: int) -> Split:
    return dataclasses.replace(split, ids=split.ids[:rows], prob_NK=split.prob_NK[:rows])


if __name__ == "__main__":
    _serve(torch.device(sys.argv[1]))
