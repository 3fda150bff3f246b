"""Choose the nodes of a trial's workers, and find the cores that a worker may use on its node.

The process of a trial imports this module, so it imports little itself.
"""

from collections.abc import Mapping
from typing import Any

import ray

from raytune_emotion.tuning.execution.resources import Resources

#: Ray's label of every node.
_NODE_ID = "ray.io/node-id"


def live_nodes() -> dict[str, dict[str, float]]:
    """Return the resources of the live nodes by their ids."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def label_selector(nodes: Mapping[str, Mapping[str, float]], *, off_gpus: bool) -> dict[str, str]:
    """Return Ray's selector of the nodes on which a worker may run: all, or all but those that have GPUs now.

    Without it, Ray chooses the node with the largest part of its cores free, which may have GPUs.

    Args:
        nodes: resources of the present nodes by their ids.
        off_gpus: whether the worker keeps off nodes with GPUs.
    """
    gpus = [number for number, node in nodes.items() if node.get("GPU")]
    return {_NODE_ID: f"!in({','.join(gpus)})"} if off_gpus and gpus else {}


def resources_here(resources: Resources) -> Resources:
    """Return the resources that a worker uses in this process; see `Resources.on_node`."""
    if not resources.gpus_per_worker:
        return resources
    return resources.on_node(live_nodes()[ray.get_runtime_context().get_node_id()])
