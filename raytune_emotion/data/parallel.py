"""Work on all cores with processes that start fast, end when their parent dies, and leave Ctrl-C to it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from raytune_emotion.data.cores import usable_cores

#: Type of `map`, and of parallel functions that keep the order.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

#: Smallest number of tasks for which processes are started. A task takes about 50 ms, a start a quarter of a second.
_TASKS_WORTH_A_POOL = 16


@contextlib.contextmanager
def process_map(workers: int | None) -> Iterator[Map]:
    """Yield a `map` that keeps the order. It starts processes when there are enough tasks for them.

    Args:
        workers: number of processes; 1: only this process. Default: one per core, or only this one for few tasks.
    """
    cores = usable_cores()
    executor = ProcessPoolExecutor(
        workers or cores, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent
    )

    def pmap(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = list(tasks)
        if workers == 1 or (workers is None and (cores == 1 or len(tasks) < _TASKS_WORTH_A_POOL)):
            return map(function, tasks)
        with _spawn_lightly():
            return executor.map(function, tasks)

    try:
        yield pmap
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _spawn_lightly() -> Iterator[None]:
    # A spawned process first imports the main module of its parent. These processes do not need it. It may import ray,
    # torch and optuna, or be a script that packs without the check `__name__ == "__main__"`.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    # The processes inherit blocked signals. Ctrl-C reaches them too, but the parent ends the work in order.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a killed parent cannot end its processes itself

    threading.Thread(target=follow, daemon=True).start()
