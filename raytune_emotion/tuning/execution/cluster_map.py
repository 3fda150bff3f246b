"""Map a function over the nodes of a Ray cluster."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raytune_emotion.data.parallel import Map
from raytune_emotion.errors import Breakdown
from raytune_emotion.tuning.execution.capacity import tell_shortage
from raytune_emotion.tuning.execution.cluster_nodes import check_cluster_cores, list_nodes
from raytune_emotion.tuning.execution.cluster_watch import ClusterWatch, iterate_watched
from raytune_emotion.tuning.execution.placement import without_gpus
from raytune_emotion.tuning.execution.ray_patches import has_autoscaler
from raytune_emotion.tuning.execution.worker_nodes import label_selector, live_nodes

#: Number of submitted tasks per core that takes them, so that no core waits for the driver.
_AHEAD = 2
#: Number of attempts per task.
_TRIES = 4
#: Longest wait for running tasks after an interruption, seconds.
_END_S = 30.0
#: Seconds between two checks whether the nodes of a task are still there.
_LOOK_S = 5.0


@contextlib.contextmanager
def cluster_map(watch: ClusterWatch) -> Iterator[Map]:
    """Provide a `map` over the cores of the cluster that this process has joined. It keeps the order.

    While a GPU is in use, tasks keep off nodes with GPUs, if there are others, so that no trial waits for its core. On
    a cluster with an autoscaler they do not, because it would count the cores of these nodes as room for them. A
    task whose process or node dies is run again elsewhere. If the work is interrupted, submitted tasks end by
    themselves within half a minute, or with the session.

    Args:
        watch: of the cluster.

    Raises:
        UserError: the cluster has no core.
        Breakdown: all attempts of a task died.
        ClusterLost: the cluster has died.
    """
    check_cluster_cores()
    with contextlib.ExitStack() as stack:

        def pmap(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
            # Before it waits for the tasks, the thread finishes the one whose result it is waiting for.
            results = iterate_watched(_results(function, tasks), watch, 4 * _END_S, tell_shortage(watch, "CPU"))
            return stack.enter_context(contextlib.closing(results))

        yield pmap


@dataclasses.dataclass(frozen=True)
class _Task:
    """A task that was given to the cluster."""

    result: Any  # reference to it
    argument: Any  # of the function
    off: frozenset[str]  # ids of the nodes that it keeps off


def _results(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Generator[Any, None, None]:
    grows = has_autoscaler()
    ahead: deque[_Task] = deque()
    try:
        for task in tasks:
            # Nodes join and leave meanwhile, and searches begin and end.
            nodes = {number: node.resources for number, node in list_nodes().items() if not node.draining}
            others = without_gpus([*nodes.values()]) if not grows and _is_gpu_in_use(nodes) else []
            off = frozenset(number for number, node in nodes.items() if others and node.get("GPU"))
            selector = label_selector(nodes, off_gpus=bool(others))
            ahead.append(_Task(_run.options(label_selector=selector).remote(function, task), task, off))
            cores = sum(node.get("CPU", 0.0) for node in others or nodes.values())
            if len(ahead) >= _AHEAD * max(1.0, cores):
                yield _result(function, ahead)
        while ahead:
            yield _result(function, ahead)
    finally:
        # Tasks are not cancelled: Ray aborts the whole process if a task ends at that moment.
        if ahead:
            ray.wait([each.result for each in ahead], num_returns=len(ahead), timeout=_END_S)


def _is_gpu_in_use(nodes: Mapping[str, Mapping[str, float]]) -> bool:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free.get("GPU", 0.0) < sum(node.get("GPU", 0.0) for node in nodes.values())


def _result(function: Callable[[Any], Any], ahead: deque[_Task]) -> Any:
    """Remove the first task, and return its result."""
    while ahead[0].off and not ray.wait([ahead[0].result], timeout=_LOOK_S)[0]:
        cores = {number for number, node in live_nodes().items() if node.get("CPU")}
        if cores <= ahead[0].off:
            # Ray would wait for another node for ever. Tasks that have ended are not run again.
            _, waiting = ray.wait([each.result for each in ahead], num_returns=len(ahead), timeout=0)
            for place, each in enumerate(ahead):
                if each.off and each.result in waiting:
                    ahead[place] = _Task(_run.remote(function, each.argument), each.argument, frozenset())
    try:
        return ray.get(ahead.popleft().result)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        why = str(error).strip().partition("\n")[0]
        raise Breakdown(f"a task on the cluster died {_TRIES} times, the last time with: {why}") from error


@ray.remote(num_cpus=1, max_retries=_TRIES - 1)
def _run(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)
