"""Work on all cores: processes start fast, end when their parent dies, and leave Ctrl-C to it."""

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

#: `map`, or a parallel one that keeps the order.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

_TASKS_WORTH_A_POOL = 16  # some 50 ms each, and a quarter of a second to start a process


@contextlib.contextmanager
def process_map(workers: int | None) -> Iterator[Map]:
    """Yield a `map` that keeps the order, over processes that are started when there is enough to do for them.

    Args:
        workers: how many; 1: this process. By default one a core, or this one where there is little to do.
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
    # A spawned process first imports the main module of its parent. These need nothing of it, and it may be one
    # that imports ray, torch and optuna, or a script that packs without asking whether it is the main one.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    # They inherit what is blocked: Ctrl-C, which reaches them too, is for the parent, who ends the work in order.
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
        os._exit(1)  # a parent that was killed tells nobody

    threading.Thread(target=follow, daemon=True).start()
