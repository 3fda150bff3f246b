"""Detect a dead or frozen cluster, for which Ray itself waits for ever (ray 9044, 23857, 46548)."""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import ray

from raytune_emotion.errors import Breakdown
from raytune_emotion.interruption import run_in_thread
from raytune_emotion.terminal import warn
from raytune_emotion.tuning.execution.ray_patches import own_processes, raylet_pid

#: Seconds between two questions to the head, and between two checks of the processes.
_EVERY_S = 3.0
#: Pause between two calls of `failure`, seconds, after which this process counts as having been suspended.
_SUSPENDED_S = 10.0
#: Seconds without an answer after which Ray's head counts as dead. A machine under load takes seconds to answer.
_SILENCE_S = 40.0
#: Seconds after which a stopped process (SIGSTOP) counts as frozen. Suspended machines and debuggers take less.
_FROZEN_S = 20.0
#: Seconds for which a raylet may still run after the head has declared its node dead, because it announces its end.
_LAST_S = 5.0
#: Seconds without a worker process after which a local cluster counts as broken. It normally keeps one per core.
_NO_WORKER_S = 50.0
#: Seconds between two checks whether the cluster is alive.
_LOOK_S = 0.5
#: Seconds that work on the cluster gets to end in order, and on a dead one. Afterwards it ends with the session.
_END_S, _END_OF_DEAD_S = 30.0, 1.0
#: Results that may wait for their use, so that they do not fill the memory.
_AHEAD = 64

T = TypeVar("T")

_NAMES = {"gcs_server": "Ray's head process (gcs_server)", "raylet": "Ray's node process (raylet)"}


class ClusterWatch:
    """Watch whether the joined cluster is alive."""

    def __init__(self, *, own: bool) -> None:
        """Begin to watch.

        Args:
            own: whether this process has started the cluster.
        """
        self.is_own = own
        self._processes = own_processes() if own else {}
        self._vital = {name: process for name, process in self._processes.items() if name in _NAMES}
        # Of a joined cluster, only the raylet of this machine is known. Its workers may belong to others.
        self._pids = {process.pid: name for name, process in self._vital.items()}
        if not own and (pid := raylet_pid()) is not None:
            self._pids[pid] = "raylet"
        self._node = ray.get_runtime_context().get_node_id()
        self._answered = time.monotonic()
        self._failure = ""
        self._none_free: set[str] = set()
        self._frozen_since: dict[int, float] = {}
        self._looked = self._asked = self._worker_seen = time.monotonic()
        self._end = threading.Event()
        # Ask in a separate thread, because a question to a frozen head never returns.
        self._ended = run_in_thread("cluster-watch", self._ask)

    def failure(self) -> str:
        """Say what has died or frozen; "" while the cluster is alive. Call it continually.

        Processes of trials that have been stopped for long are killed, so that their trials continue.
        """
        now = time.monotonic()
        if now - self._asked > _SUSPENDED_S:
            # Nobody has called, or this process itself was stopped, as by Ctrl-Z. That time does not count.
            self._answered = self._worker_seen = now
            self._frozen_since.clear()
        self._asked = now
        for name, process in self._vital.items():
            if process.poll() is not None and not self._failure:
                self._failure = f"{_NAMES[name]} has ended (code {process.returncode})"
        if not self._failure and now - self._answered > _SILENCE_S:
            self._failure = f"Ray's head has not answered for {_SILENCE_S:.0f} s"
        if not self._failure and self._pids and now - self._looked > _EVERY_S:
            self._looked = now
            workers = list(filter(_is_worker, _children(self._vital["raylet"].pid))) if self._vital else []
            self._look_for_frozen(workers)
            if self._vital:
                self._look_for_workers(workers)
        return self._failure

    def is_frozen(self) -> bool:
        """Tell whether a process of the cluster is stopped now, so that Ray could not leave the cluster in order."""
        return any(map(_is_stopped, self._pids))

    def none_free(self) -> set[str]:
        """Return the kinds of resources, "CPU" and "GPU", of which less than one was free a moment ago.

        If the cluster has no GPU, they are not among them.
        """
        return self._none_free

    def close(self) -> None:
        """End the watch, and kill the remaining processes of a dead cluster, which cannot be left in order."""
        self._end.set()
        # The thread must not be inside Ray when this process leaves Ray, which would crash.
        while not self._ended.wait(_LOOK_S) and not self.failure():
            pass
        if self.failure() or self.is_frozen():
            for process in self._processes.values():
                process.kill()
            self._ended.wait(_EVERY_S)

    def _ask(self) -> None:
        while not self._end.wait(_EVERY_S):
            with contextlib.suppress(Exception):  # any error counts as no answer
                nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
                if any(node["NodeID"] == self._node and not node["Alive"] for node in nodes):
                    if self._vital:
                        self._end.wait(_LAST_S)  # `failure` notices a raylet that ends, which tells more
                    dead = "this machine's Ray node was declared dead: it did not answer for too long"
                    self._failure = self._failure or dead
                self._answered = time.monotonic()
                has_gpus = any(node["Alive"] and node["Resources"].get("GPU") for node in nodes)
                free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
                kinds = ("CPU", "GPU") if has_gpus else ("CPU",)
                self._none_free = {kind for kind in kinds if free.get(kind, 0.0) < 1}

    def _look_for_workers(self, workers: list[int]) -> None:
        """Give up a cluster that starts no worker processes, for example because the system refuses them."""
        if any(_age_s(pid) > _EVERY_S for pid in workers):
            self._worker_seen = self._looked
        elif not self._failure and self._looked - self._worker_seen > _NO_WORKER_S and _lists_children():
            self._failure = f"Ray has started no worker process for {_NO_WORKER_S:.0f} s; the reason is in its logs"

    def _look_for_frozen(self, workers: list[int]) -> None:
        """Give up a cluster whose own processes were stopped, and kill stopped processes of trials."""
        stopped = [pid for pid in (*self._pids, *workers) if _is_stopped(pid)]
        self._frozen_since = {pid: self._frozen_since.get(pid, self._looked) for pid in stopped}
        for pid, since in self._frozen_since.items():
            if self._looked - since < _FROZEN_S:
                continue
            if pid in self._pids:
                self._failure = f"{_NAMES[self._pids[pid]]} was stopped for {_FROZEN_S:.0f} s"
            else:
                warn(f"process {pid} of a trial was stopped for {_FROZEN_S:.0f} s: it is killed, the trial continues")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class ClusterLost(Breakdown):
    """Report that the cluster has died or frozen. Finished files are complete, and the work can be resumed."""


def iterate_watched(
    reports: Generator[T, None, None],
    watch: ClusterWatch,
    end_s: float = _END_S,
    look: Callable[[bool], None] = lambda came: None,
) -> Generator[T, None, None]:
    """Iterate in a separate thread, so that this thread receives signals, and notices the death of the cluster.

    Args:
        reports: to iterate over, at most a few ahead of their use.
        watch: of the cluster.
        end_s: seconds that the thread gets for its end, if the caller stops early.
        look: is told all the time, while a report is waited for, whether one has come.

    Raises:
        ClusterLost: the cluster has died. The thread is abandoned.
    """
    found: queue.Queue[T | BaseException | None] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                found.put(item, timeout=_LOOK_S)
                return

    def iterate() -> None:
        try:
            with contextlib.closing(reports):
                for report in reports:
                    put(report)
                    if stop.is_set():
                        break
            put(None)
        except BaseException as error:
            put(error)

    ended = run_in_thread("reports", iterate)
    try:
        while True:
            # Check also while reports arrive, because workers continue to train below a frozen raylet.
            if (lost := watch.failure()) and not ended.is_set():
                raise ClusterLost(lost)
            try:
                item = found.get(timeout=_LOOK_S)
            except queue.Empty:
                look(False)
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            look(True)
    finally:
        stop.set()
        wait_for_end(ended, watch.failure, end_s)


def wait_for_end(ended: threading.Event, failure: Callable[[], str], end_s: float = _END_S) -> None:
    """Wait until a thread that works on a cluster has ended: some seconds, but a short time once the cluster is dead.

    Args:
        ended: event of the thread.
        failure: says what part of the cluster has died; "" while it is alive. It may die only now: a signal may reach
            Ray's processes, too, as from systemd or Slurm.
        end_s: longest time, seconds.
    """
    deadline = time.monotonic() + end_s
    while not ended.is_set() and (left := deadline - time.monotonic()) > 0:
        if failure():
            ended.wait(min(left, _END_OF_DEAD_S))
            return
        ended.wait(min(left, _LOOK_S))


def _children(pid: int) -> list[int]:
    """List the child processes of a process; return an empty list if the system does not support it."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def _lists_children() -> bool:
    """Tell whether the system lists child processes: some kernels of Linux do not."""
    return Path(f"/proc/self/task/{os.getpid()}/children").exists()


def _is_worker(pid: int) -> bool:
    """Tell whether a process of a raylet is a worker. The others are agents, such as ray::DashboardAgent."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        title = command.partition(b"\0")[0].rstrip()
        return b"default_worker.py" in command or (title.startswith(b"ray::") and not title.endswith(b"Agent"))
    return False


def _age_s(pid: int) -> float:
    """Return the age of a process, seconds; 0 if the system does not tell it."""
    with contextlib.suppress(OSError, IndexError):
        started = int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    return 0.0


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return _stat(pid)[0] == "T"
    return False


def _stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` after the process's name, which may contain anything: proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
