"""Find out when a cluster dies or freezes: Ray itself then waits for ever (ray 9044, 23857, 46548)."""

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ray

from raytune_emotion.errors import Breakdown
from raytune_emotion.interruption import run_in_thread
from raytune_emotion.terminal import warn
from raytune_emotion.tuning.execution.ray_patches import own_processes

_EVERY_S = 3.0
_SUSPENDED_S = 10.0
#: Without an answer for so long, Ray's head counts as dead. A machine under load takes seconds.
_SILENCE_S = 40.0
#: What was stopped for so long, as by SIGSTOP, counts as frozen: suspended machines and debuggers take less.
_FROZEN_S = 20.0

#: A cluster of this machine without a process for work for so long, while it keeps some for every core, is broken.
_NO_WORKER_S = 50.0
#: Between two looks at whether the cluster lives.
_LOOK_S = 0.5
#: What runs on the cluster gets so long to end in order; what has not ended then ends with the session.
_END_S = 30.0

T = TypeVar("T")

_NAMES = {"gcs_server": "Ray's head process (gcs_server)", "raylet": "Ray's node process (raylet)"}


class ClusterWatch:
    """Know whether the cluster lives that this process has joined."""

    def __init__(self, *, own: bool) -> None:
        """Begin to watch.

        Args:
            own: whether this process has started the cluster, and so sees its processes.
        """
        self._processes = own_processes() if own else {}
        self._vital = {name: process for name, process in self._processes.items() if name in _NAMES}
        self._node = ray.get_runtime_context().get_node_id()
        self._answered = time.monotonic()
        self._failure = ""
        self._frozen_since: dict[int, float] = {}
        self._looked = self._asked = self._worker_seen = time.monotonic()
        self._end = threading.Event()
        # Of its own, since a question to a head that has frozen never comes back.
        self._ended = run_in_thread("cluster-watch", self._ask)

    def failure(self) -> str:
        """Say what has died or frozen; empty while the cluster lives. It is to be asked all the time."""
        now = time.monotonic()
        if now - self._asked > _SUSPENDED_S:
            # Nobody has looked, or this process itself was stopped, as by Ctrl-Z: nothing is known of that time.
            self._answered = self._worker_seen = now
            self._frozen_since.clear()
        self._asked = now
        for name, process in self._vital.items():
            if process.poll() is not None and not self._failure:
                self._failure = f"{_NAMES[name]} has ended (code {process.returncode})"
        if not self._failure and now - self._answered > _SILENCE_S:
            self._failure = f"Ray's head has not answered for {_SILENCE_S:.0f} s"
        if not self._failure and "raylet" in self._vital and now - self._looked > _EVERY_S:
            self._looked = now
            self._look_for_frozen()
            self._look_for_workers()
        return self._failure

    def close(self) -> None:
        """End the watch, and what is left of a cluster that has died: only a live one can be left in order."""
        self._end.set()
        # The thread must not be inside Ray when this process leaves Ray, which would crash.
        while not self._ended.wait(_LOOK_S) and not self.failure():
            pass
        if self.failure():
            for process in self._processes.values():
                process.kill()
            self._ended.wait(_EVERY_S)

    def _ask(self) -> None:
        while not self._end.wait(_EVERY_S):
            with contextlib.suppress(Exception):  # of whatever class: no answer is none
                nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
                if any(node["NodeID"] == self._node and not node["Alive"] for node in nodes):
                    self._failure = "this machine's Ray node was declared dead: it did not answer for too long"
                self._answered = time.monotonic()

    def _look_for_workers(self) -> None:
        """Give up a cluster that starts no process for any work, as where the system refuses it one."""
        if any(_age_s(pid) > _EVERY_S for pid in _children(self._vital["raylet"].pid) if _is_worker(pid)):
            self._worker_seen = self._looked
        elif not self._failure and self._looked - self._worker_seen > _NO_WORKER_S and Path("/proc").is_dir():
            self._failure = f"Ray has started no process for work for {_NO_WORKER_S:.0f} s; its logs say why"

    def _look_for_frozen(self) -> None:
        """Give up a cluster whose own processes were stopped, and end processes of trials that were."""
        vital = {process.pid: name for name, process in self._vital.items()}
        workers = [pid for pid in _children(self._vital["raylet"].pid) if _is_worker(pid)]
        stopped = [pid for pid in (*vital, *workers) if _is_stopped(pid)]
        self._frozen_since = {pid: self._frozen_since.get(pid, self._looked) for pid in stopped}
        for pid, since in self._frozen_since.items():
            if self._looked - since < _FROZEN_S:
                continue
            if pid in vital:
                self._failure = f"{_NAMES[vital[pid]]} was stopped for {_FROZEN_S:.0f} s"
            else:
                warn(f"process {pid} of a trial was stopped for {_FROZEN_S:.0f} s: it is ended, and its trial goes on")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class ClusterLost(Breakdown):
    """The cluster has died or frozen. What was written until then is whole, and the work can be resumed."""


def iterate_watched(reports: Generator[T, None, None], watch: ClusterWatch) -> Generator[T, None, None]:
    """Iterate in a thread of its own, so that this one hears signals, and sees when the cluster has died.

    Raises:
        ClusterLost: it has. The thread is left to itself.
    """
    found: queue.Queue[T | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def iterate() -> None:
        try:
            with contextlib.closing(reports):
                for report in reports:
                    found.put(report)
                    if stop.is_set():
                        break
            found.put(None)
        except BaseException as error:
            found.put(error)

    ended = run_in_thread("reports", iterate)
    try:
        while True:
            # Also while reports come: workers train on below a raylet that is frozen.
            if (lost := watch.failure()) and not ended.is_set():
                raise ClusterLost(lost)
            try:
                item = found.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        ended.wait(0.0 if watch.failure() else _END_S)


@contextlib.contextmanager
def watch_cluster(*, own: bool) -> Iterator[ClusterWatch]:
    """Watch the cluster that this process has joined until the block ends."""
    watch = ClusterWatch(own=own)
    try:
        yield watch
    finally:
        watch.close()


def _children(pid: int) -> list[int]:
    """List the processes that a process has started; none where the system does not tell."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def _is_worker(pid: int) -> bool:
    """Tell whether one of a raylet's processes is for work; the others are its agents, such as ray::DashboardAgent."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        title = command.partition(b"\0")[0].rstrip()
        return b"default_worker.py" in command or (title.startswith(b"ray::") and not title.endswith(b"Agent"))
    return False


def _age_s(pid: int) -> float:
    """Return for how long a process has run; 0 where the system does not tell."""
    with contextlib.suppress(OSError, IndexError):
        started = int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    return 0.0


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return _stat(pid)[0] == "T"
    return False


def _stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` after the process's name, which may hold anything: proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
