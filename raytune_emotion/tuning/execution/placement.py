"""Fit trials to the cores and GPUs of machines, without Ray, to refuse at once what does not fit."""

import math
import sys
from dataclasses import dataclass

from raytune_emotion.data.cores import usable_cores
from raytune_emotion.errors import UserError
from raytune_emotion.terminal import count
from raytune_emotion.tuning.execution.gpu_presence import gpu_fault, may_have_gpu, no_gpu, refuse_broken_gpu
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.request import AUTO

#: Amounts of "CPU", "GPU" and other resources of each node.
Nodes = list[dict[str, float]]


@dataclass(frozen=True)
class Demand:
    """What a study needs of the nodes on which its trials run."""

    workers: int = 1  # of a trial
    gpus_per_worker: float | str | None = None  # up to 1; None: one, if there are GPUs; `AUTO`: to be measured
    concurrency: int | None = None  # trials at once; None: as many as fit
    fp16: bool = False  # whether a trial may train in fp16, which needs a GPU


@dataclass(frozen=True)
class Placement:
    """The use of a cluster by a study."""

    resources: Resources
    concurrency: int  # trials at once on the nodes at the time of the fit
    limit: int | None = None  # largest number of trials at once, even if nodes join
    grows: bool = False  # whether the cluster has an autoscaler
    nodes_off: int = 0  # nodes that trials keep off, because they have GPUs

    def __str__(self) -> str:
        cpus = self.resources.cpus_per_worker
        share = f", each on {cpus:g} core" if cpus < 1 and not self.resources.gpus_per_worker else ""
        off = f", keeping off {count(self.nodes_off, 'node')} with GPUs" if self.nodes_off else ""
        more = f", more as its autoscaler adds nodes with {self.resources.need} for each worker" if self.grows else ""
        return f"{self.concurrency} at once{share}{off}{more}"


def fit_here(demand: Demand) -> Placement:
    """Fit trials to this machine, whether or not Ray runs; see `fit`.

    Raises:
        UserError: not even one trial fits, or PyTorch cannot use the GPU of this machine.
    """
    refuse_broken_gpu(demand.gpus_per_worker)
    return fit([local_node()], "this machine", demand)


def fit(nodes: Nodes, where: str, demand: Demand, *, grows: bool = False) -> Placement:
    """Fit trials to nodes.

    With a GPU, a trial's worker reserves one core for each GPU; it uses more of its node, see `Resources.on_node`.
    Without GPUs, it gets one core, or more if fewer trials run at once than there are cores. It keeps off nodes with
    GPUs, if there are others and no autoscaler, which would count their cores as room for it.

    Args:
        nodes: resources of the nodes.
        where: name of the nodes for messages.
        demand: needs of the study. With `AUTO`, a trial gets a whole GPU.
        grows: whether an autoscaler adds nodes, so that more may fit later.

    Raises:
        UserError: not even one trial fits, or the resources of a trial are unknown before there are nodes; or with
            `AUTO`, there is no GPU, or the workers of a trial need one each.
    """
    workers, concurrency = demand.workers, demand.concurrency
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    if demand.gpus_per_worker == AUTO:
        check_sharing(nodes, where, workers)
    gpu = float(gpus > 0) if demand.gpus_per_worker in (None, AUTO) else float(demand.gpus_per_worker)
    if grows and not gpus and demand.gpus_per_worker is None:
        raise UserError(
            f"{where} has no node {'with a GPU' if cpus else 'to train on'} yet; say what its autoscaler should start: "
            f"--gpus-per-worker 1, or --gpus-per-worker 0 to train on cores"
        )
    if gpu and not gpus and not grows:
        raise UserError(no_gpu(where, gpu))
    if demand.fp16 and not gpu:
        raise UserError(
            f"train.precision: fp16 needs a GPU, but trials on {where} get none; use --gpus-per-worker 1 if there are "
            f"GPUs, or search with bf16 or fp32"
        )
    if workers > 1 and 0 < gpu < 1:
        raise UserError(
            f"--gpus-per-worker {gpu:g}: NCCL cannot join two workers of a trial on one GPU; ask for a whole GPU each, "
            f"or for one worker per trial"
        )
    check_cores(nodes, where, grows=grows)
    free = [] if gpu or grows else without_gpus(nodes)
    cpu = _cores_per_worker(free or nodes, gpu, workers=workers, concurrency=concurrency, grows=grows)
    resources = Resources(workers, cpu, gpu, off_gpus=bool(free))
    fitting = trials_on(nodes, resources)
    if not fitting and not grows:
        advice = "ask for fewer workers per trial" + (", or a smaller --gpus-per-worker" if gpu else "")
        raise UserError(
            f"a trial of {count(workers, 'worker')} with {resources.need} each does not fit: {where} has "
            f"{_describe(free or nodes)}{' without GPUs' if free and gpus else ''}, room for "
            f"{count(workers_on(nodes, resources), 'such worker')}; {advice}"
        )
    nodes_off = sum(bool(node.get("GPU")) for node in nodes) if free else 0
    return Placement(resources, min(fitting, concurrency or sys.maxsize), concurrency, grows, nodes_off)


def check_cores(nodes: Nodes, where: str, *, grows: bool) -> None:
    """Check that nodes have a core, or may get one.

    Raises:
        UserError: they have none, and there is no autoscaler.
    """
    if not grows and not any(node.get("CPU") for node in nodes):
        raise UserError(
            f"{where} has no core to work on: {count(len(nodes), 'node')} with 0 CPU, and no autoscaler; start its "
            f"worker nodes"
        )


def check_sharing(nodes: Nodes, where: str, workers: int) -> None:
    """Check that trials can share a GPU.

    Raises:
        UserError: there is no GPU, or the workers of a trial need one each.
    """
    faults = []
    if not any(node.get("GPU") for node in nodes):
        faults.append(no_gpu(where, AUTO))
    if workers > 1:
        faults.append(f"--gpus-per-worker {AUTO}: the workers of a trial cannot share a GPU; leave it out")
    if faults:
        raise UserError(faults)


def _describe(nodes: Nodes) -> str:
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPU{f' and {gpus:g} GPU' if gpus else ''} on {count(len(nodes), 'node')}"


def _cores_per_worker(nodes: Nodes, gpu: float, *, workers: int, concurrency: int | None, grows: bool) -> float:
    """Return the number of cores that each worker reserves."""
    if gpu:
        cores = min(1.0, cores_per_gpu(nodes) or 1.0) * gpu
    elif concurrency and not grows:
        cores = _cores_for(nodes, concurrency * workers)
    else:
        # Nodes of the future may have few cores. A single trial uses the cores that exist.
        cores = max(1.0, _cores_for(nodes, workers)) if concurrency == 1 else 1.0
    # Use whole cores, except where workers share a core.
    return float(math.floor(cores)) if cores >= 1 else max(0.1, math.floor(cores * 10) / 10)


def _cores_for(nodes: Nodes, workers: int) -> float:
    """Return the largest number of cores per worker, each worker on one node; at most 1 if they do not fit."""
    share = sum(node.get("CPU", 0.0) for node in nodes) / workers
    for cores in range(math.floor(share), 1, -1):
        if sum(places_on(node, {"CPU": cores}) for node in nodes) >= workers:
            return float(cores)
    return min(share, 1.0)


def trials_on(nodes: Nodes, resources: Resources) -> int:
    """Return how many trials fit on nodes. The workers of a trial may be on several nodes."""
    return workers_on(nodes, resources) // resources.workers


def workers_on(nodes: Nodes, resources: Resources) -> int:
    """Return how many workers fit on nodes."""
    taking = without_gpus(nodes) if resources.off_gpus else nodes
    return sum(places_on(node, resources.per_worker) for node in taking)


def without_gpus(nodes: Nodes) -> Nodes:
    """Return the nodes with cores and without GPUs."""
    return [node for node in nodes if node.get("CPU") and not node.get("GPU")]


def local_node() -> dict[str, float]:
    """Return the resources of this machine that this process may use. A GPU that PyTorch cannot use does not count."""
    gpus = 0
    if may_have_gpu() and not gpu_fault():
        import torch  # it takes seconds

        gpus = torch.cuda.device_count()
    return {"CPU": float(usable_cores()), "GPU": float(gpus)}


def cores_per_gpu(nodes: Nodes) -> float:
    """Return the smallest number of cores per GPU over all nodes with GPUs; 0 if there are no GPUs."""
    return min((node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")), default=0.0)


def places_on(node: dict[str, float], need: dict[str, float]) -> int:
    """Return how many workers fit on a node. A fraction of a GPU comes from a single GPU."""
    rooms = {kind: node.get(kind, 0.0) / amount for kind, amount in need.items()}
    if 0 < need.get("GPU", 0.0) < 1:
        rooms["GPU"] = node.get("GPU", 0.0) * int(1 / need["GPU"] + 1e-9)
    return int(min(rooms.values()) + 1e-9)
