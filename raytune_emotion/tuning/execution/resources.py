"""Define the resources of a trial."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """Resources of one trial."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    off_gpus: bool = False  # whether the workers keep off nodes with GPUs

    @property
    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    @property
    def need(self) -> str:
        """Return the resources of each worker as text."""
        return " and ".join(f"{amount:g} {kind}" for kind, amount in self.per_worker.items())

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus_per_worker))

    def on_node(self, node: Mapping[str, float]) -> "Resources":
        """Return the resources that a worker uses on a node: with a GPU, also cores that it has not reserved.

        They are the cores of the node, multiplied by the worker's share of the node's GPUs. Without a GPU, the worker
        uses what it has reserved, so its results do not depend on the node.
        """
        if not self.gpus_per_worker or not node.get("GPU"):
            return self
        cores = node.get("CPU", 0.0) / node["GPU"] * self.gpus_per_worker
        return dataclasses.replace(self, cpus_per_worker=max(self.cpus_per_worker, cores))
