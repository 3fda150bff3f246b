"""Count the trials for which a cluster has room at present, and ask its autoscaler for nodes."""

import sys
import time
from collections.abc import Callable
from typing import Any

from ray.autoscaler.sdk import request_resources

from raytune_emotion.terminal import count, warn
from raytune_emotion.tuning.execution.cluster_nodes import ClusterNode, list_nodes
from raytune_emotion.tuning.execution.cluster_watch import ClusterWatch
from raytune_emotion.tuning.execution.placement import Placement, trials_on

#: Seconds between two checks of the nodes, and between two requests to the autoscaler.
_LOOK_S, _REQUEST_S = 2.0, 10.0
#: Seconds without a running trial, or without a result, after which the user is told.
_WAIT_S = 30.0


class Capacity:
    """Count the trials that may run at once. New nodes are used; draining nodes are not."""

    def __init__(
        self,
        placement: Placement,
        wanted: Callable[[], int],
        say: Callable[[str], None] = lambda text: None,
        *,
        nodes: Callable[[], dict[str, ClusterNode]] = list_nodes,
        request: Callable[..., Any] = request_resources,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to count a cluster's room for the trials of a study.

        Args:
            placement: placement of the trials.
            wanted: returns the number of trials that the study could run at once.
            say: tells the user about nodes that join or leave.
            nodes: returns the live nodes by their ids.
            request: asks the autoscaler for room for `bundles`; it replaces all earlier requests, also of others.
            clock: returns the time in seconds.
        """
        self._placement, self._wanted, self._say = placement, wanted, say
        self._nodes, self._request, self._clock = nodes, request, clock
        self._known: dict[str, ClusterNode] | None = None  # nodes of the last check
        self._room = self._asked = 0
        self._look_at = self._request_at = clock()

    def __call__(self) -> int:
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._look(self._nodes())
        if self._placement.grows and now >= self._request_at:
            self._request_at = now + _REQUEST_S
            self._ask(self._wanted())
        return self._room

    def is_leaving(self, node: str) -> bool:
        """Tell whether a node will end soon, so that its trials must continue elsewhere."""
        known = (self._known or {}).get(node)
        return known is not None and known.draining

    def _look(self, nodes: dict[str, ClusterNode]) -> None:
        taking = [node.resources for node in nodes.values() if not node.draining]
        limit = self._placement.limit or sys.maxsize
        self._room = min(trials_on(taking, self._placement.resources), limit)
        before, self._known = self._known, nodes
        if before is None:
            return
        elsewhere = "; its trials continue elsewhere from their checkpoints"
        for number, node in before.items():
            if number not in nodes:
                self._say(f"node {node.name} has left the cluster{'' if node.draining else elsewhere}")
        for number, node in nodes.items():
            if number not in before:
                self._say(f"node {node.name} has joined the cluster")
            elif node.draining and not before[number].draining:
                self._say(f"node {node.name} is draining{elsewhere}")

    def shortage(self) -> str:
        """Return a sentence on the resources for which a trial waits."""
        resources = self._placement.resources
        workers = f"{resources.workers} workers with " if resources.workers > 1 else ""
        each = " each" if resources.workers > 1 else ""
        asked = f"; its autoscaler was asked for room for {count(self._asked, 'trial')}" if self._asked else ""
        has_gpus = any(node.resources.get("GPU") for node in (self._known or {}).values())
        where = " on a node without GPUs" if resources.off_gpus and has_gpus else ""
        return f"waiting for room on the cluster for {workers}{resources.need}{each}{where}{asked}"

    def close(self) -> None:
        """Let the autoscaler remove the nodes that it added."""
        self._ask(0)

    def _ask(self, trials: int) -> None:
        trials = min(trials, self._placement.limit or sys.maxsize)
        # Repeat the request while there is one, because the newest replaces all others, also of another search.
        if trials or self._asked:
            self._asked = trials
            resources = self._placement.resources
            self._request(bundles=[dict(resources.per_worker)] * resources.workers * trials)


class Waiting:
    """Tell the user that no trial, or no other work, has room: once, until some runs again."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._since: float | None = time.monotonic()

    def look(self, *, runs: bool) -> None:
        """Note whether a trial, or other work, runs now."""
        if runs:
            self._since = time.monotonic()
        elif self._since is not None and time.monotonic() - self._since > _WAIT_S:
            self._since = None
            self._say()


def tell_shortage(watch: ClusterWatch, *kinds: str) -> Callable[[bool], None]:
    """Return a function that tells the user if no result comes while the cluster has nothing free.

    It is called all the time with whether a result has come: see `iterate_watched`.

    Args:
        watch: of the cluster.
        kinds: kinds of resources that the work needs: "CPU" or "GPU".
    """
    names = {"CPU": "cores", "GPU": "GPUs"}
    lacking: list[str] = []

    def say() -> None:
        warn(f"no result from the cluster for {_WAIT_S:.0f} s; all of its {' and '.join(lacking)} are in use")

    waiting = Waiting(say)

    def look(came: bool) -> None:
        none_free = watch.none_free()
        lacking[:] = [names[kind] for kind in kinds if kind in none_free]
        waiting.look(runs=came or not lacking)

    return look
