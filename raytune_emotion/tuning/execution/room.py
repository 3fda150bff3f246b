"""Know how many trials a cluster has room for at each moment, and have its autoscaler add nodes."""

import sys
import time
from collections.abc import Callable
from typing import Any

from ray.autoscaler.sdk import request_resources

from raytune_emotion.terminal import count
from raytune_emotion.tuning.execution.placement import Nodes, Placement, cluster_nodes, trials_on

#: Between two looks at the nodes, and between two requests to the autoscaler.
_LOOK_S, _REQUEST_S = 2.0, 10.0


class Room:
    """Count the trials that may run at once. Nodes that join are used; those that leave or drain are not."""

    def __init__(
        self,
        placement: Placement,
        wanted: Callable[[], int],
        *,
        nodes: Callable[[], Nodes] = cluster_nodes,
        request: Callable[..., Any] = request_resources,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Know a cluster's room for the trials of a study.

        Args:
            placement: of the trials.
            wanted: returns how many trials the study could run at once.
            nodes: returns what each node has that takes work.
            request: asks the autoscaler for room for `bundles`, beside no earlier request.
            clock: in seconds.
        """
        self._placement, self._wanted = placement, wanted
        self._nodes, self._request, self._clock = nodes, request, clock
        self._room = self._asked = 0
        self._look_at = self._request_at = clock()

    def __call__(self) -> int:
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            limit = self._placement.limit or sys.maxsize
            self._room = min(trials_on(self._nodes(), self._placement.resources), limit)
        if self._placement.grows and now >= self._request_at:
            self._request_at = now + _REQUEST_S
            self._ask(self._wanted())
        return self._room

    def waiting(self) -> str:
        """Say what a trial waits for."""
        resources = self._placement.resources
        times = f" {resources.workers} times" if resources.workers > 1 else ""
        asked = f"; its autoscaler was asked for room for {count(self._asked, 'trial')}" if self._asked else ""
        return f"waiting for room on the cluster: a trial needs {resources.need}{times}{asked}"

    def close(self) -> None:
        """Let the autoscaler remove the nodes that it added."""
        self._ask(0)

    def _ask(self, trials: int) -> None:
        trials = min(trials, self._placement.limit or sys.maxsize)
        if trials != self._asked:
            self._asked = trials
            resources = self._placement.resources
            self._request(bundles=[dict(resources.per_worker)] * (resources.workers * trials))
