"""Define the resources of a trial."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """Resources of one trial."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

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
