"""List the nodes of the joined cluster with their resources, and fit trials to them."""

from dataclasses import dataclass
from typing import Any

import ray

from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.placement import Demand, Nodes, Placement, check_cores, fit
from raytune_emotion.tuning.execution.ray_patches import draining_nodes, has_autoscaler


@dataclass(frozen=True)
class ClusterNode:
    """A live node."""

    name: str  # for people
    resources: dict[str, float]
    draining: bool = False  # whether it ends soon, as after `ray drain-node`, and accepts no new work


def fit_to_cluster(demand: Demand) -> Placement:
    """Fit trials to the cluster that this process has joined; see `fit`."""
    return fit(cluster_nodes(), "the cluster", demand, grows=has_autoscaler())


def check_cluster_cores() -> None:
    """Check that the joined cluster has a core, or may get one; see `check_cores`."""
    check_cores(cluster_nodes(), "the cluster", grows=has_autoscaler())


def check_fit(address: str, demand: Demand) -> None:
    """Join a cluster for a moment, and check that trials fit it. Asked before data are packed, which may take hours.

    Raises:
        UserError: it cannot be joined, or trials do not fit; see `fit`.
    """
    with ray_session(address):
        fit_to_cluster(demand)


def cluster_nodes() -> Nodes:
    """Return the resources of each node of the cluster that accepts work. Draining nodes do not."""
    return [node.resources for node in list_nodes().values() if not node.draining]


def list_nodes() -> dict[str, ClusterNode]:
    """Return the live nodes of the cluster by their ids."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    draining = draining_nodes()
    return {
        node["NodeID"]: ClusterNode(
            f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})", node["Resources"], node["NodeID"] in draining
        )
        for node in nodes
        if node["Alive"]
    }
