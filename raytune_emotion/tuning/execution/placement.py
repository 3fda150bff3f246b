"""Fit trials to the cores and GPUs of machines, without Ray, so that what does not fit is refused at once."""

import math
import sys
from dataclasses import dataclass

from raytune_emotion.data.cores import usable_cores
from raytune_emotion.errors import UserError
from raytune_emotion.terminal import count
from raytune_emotion.tuning.execution.gpu_presence import may_have_gpu, no_gpu
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.request import AUTO, SearchRequest

#: Of each node: how much it has of "CPU", "GPU" and other resources.
Nodes = list[dict[str, float]]


@dataclass(frozen=True)
class Placement:
    """What a study takes of a cluster."""

    resources: Resources
    concurrency: int  # trials at once, on the nodes that there were
    limit: int | None = None  # of trials at once, whatever nodes join
    grows: bool = False  # whether the cluster has an autoscaler

    def __str__(self) -> str:
        cpus = self.resources.cpus_per_worker
        share = f", each on {cpus:g} of a core" if cpus < 1 and not self.resources.gpus_per_worker else ""
        more = f", more as its autoscaler adds nodes with {self.resources.need} for each worker" if self.grows else ""
        return f"{self.concurrency} at once{share}{more}"


def fit_here(*, workers: int, gpus_per_worker: float | None, concurrency: int | None, fp16: bool = False) -> Placement:
    """Fit trials to this machine, whether or not Ray runs; see `fit`."""
    return fit(
        [local_node()],
        "this machine",
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        concurrency=concurrency,
        fp16=fp16,
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
        faults.append(f"--gpus-per-worker {AUTO}: the workers of a trial share no GPU; leave it out")
    if faults:
        raise UserError(faults)


def check_room(request: SearchRequest) -> None:
    """Check that this machine can run what a search without a cluster asks for.

    Raises:
        UserError: not even one trial fits, or there is no GPU.
    """
    workers = request.workers_per_trial or 1
    if request.gpus_per_worker == AUTO:
        check_sharing([local_node()], "this machine", workers)
    else:
        fit_here(workers=workers, gpus_per_worker=request.gpu_share, concurrency=request.concurrency)


def fit(
    nodes: Nodes,
    where: str,
    *,
    workers: int,
    gpus_per_worker: float | None,
    concurrency: int | None,
    fp16: bool = False,
    grows: bool = False,
) -> Placement:
    """Fit trials to nodes.

    Without GPUs a trial's worker takes one core, or more where fewer trials are to run at once than there are cores.

    Args:
        nodes: what there is.
        where: a word for the nodes, for messages.
        workers: of a trial.
        gpus_per_worker: up to 1; None for one, if there are GPUs.
        concurrency: trials at once; None for as many as fit.
        fp16: whether a trial may train in it, which takes a GPU.
        grows: whether an autoscaler adds nodes, so that what does not fit yet may fit later.

    Raises:
        UserError: not even one trial fits, or what a trial takes cannot be known before there are nodes.
    """
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    gpu = float(gpus > 0) if gpus_per_worker is None else gpus_per_worker
    if grows and not gpus and gpus_per_worker is None:
        raise UserError(
            f"{where} has no node {'with a GPU' if cpus else 'to train on'} yet, so say what its autoscaler is to "
            f"start: --gpus-per-worker 1, or --gpus-per-worker 0 to train on cores"
        )
    if gpu and not gpus and not grows:
        raise UserError(no_gpu(where, gpu))
    if fp16 and not gpu:
        raise UserError(
            f"train.precision: fp16 needs a GPU, and trials on {where} get none; ask for --gpus-per-worker 1 where "
            f"there are GPUs, or search with bf16 or fp32"
        )
    if workers > 1 and 0 < gpu < 1:
        raise UserError(
            f"--gpus-per-worker {gpu:g}: NCCL joins no two workers of a trial on one GPU; ask for a whole one each, or "
            f"for one worker a trial"
        )
    if not cpus and not grows:
        raise UserError(
            f"{where} has no core to train on: {count(len(nodes), 'node')} with 0 CPU, and no autoscaler; start its "
            f"worker nodes"
        )
    if gpu:
        cpu = (cores_per_gpu(nodes) or 1.0) * gpu
    elif concurrency and not grows:
        cpu = _cores_for(nodes, concurrency * workers)
    else:
        # Nodes that are still to come may have few cores. What runs alone takes those that are there.
        cpu = max(1.0, _cores_for(nodes, workers)) if concurrency == 1 else 1.0
    # Whole cores, but for a fraction of a GPU that has less than a core beside it.
    cpu = float(math.floor(cpu)) if cpu >= 1 else max(0.1, math.floor(cpu * 10) / 10)
    resources = Resources(workers, cpu, gpu)
    fitting = trials_on(nodes, resources)
    if not fitting and not grows:
        there = f"{cpus:g} CPU and {gpus:g} GPU" if gpus else f"{cpus:g} CPU"
        advice = "ask for fewer workers a trial" + (", or a smaller --gpus-per-worker" if gpu else "")
        raise UserError(
            f"a trial of {count(workers, 'worker')} with {resources.need} each does not fit: {where} has {there} on "
            f"{count(len(nodes), 'node')}, room for {count(workers_on(nodes, resources), 'such worker')}; {advice}"
        )
    return Placement(resources, min(fitting, concurrency or sys.maxsize), concurrency, grows)


def _cores_for(nodes: Nodes, workers: int) -> float:
    """Return the most cores that each of so many workers can have, each on one node; at most one if they do not fit."""
    share = sum(node.get("CPU", 0.0) for node in nodes) / workers
    for cores in range(math.floor(share), 1, -1):
        if sum(places_on(node, {"CPU": cores}) for node in nodes) >= workers:
            return float(cores)
    return min(share, 1.0)


def trials_on(nodes: Nodes, resources: Resources) -> int:
    """Return how many trials fit on nodes; the workers of one may be on several."""
    return workers_on(nodes, resources) // resources.workers


def workers_on(nodes: Nodes, resources: Resources) -> int:
    """Return how many workers fit on nodes."""
    return sum(places_on(node, resources.per_worker) for node in nodes)


def local_node() -> dict[str, float]:
    """Return what this process may use of this machine."""
    gpus = 0
    if may_have_gpu():
        import torch  # it takes seconds

        gpus = torch.cuda.device_count()
    return {"CPU": float(usable_cores()), "GPU": float(gpus)}


def cores_per_gpu(nodes: Nodes) -> float:
    """Return the cores for each GPU, on the node with GPUs that has the fewest; 0 if there are no GPUs."""
    return min((node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")), default=0.0)


def places_on(node: dict[str, float], need: dict[str, float]) -> int:
    """Return how many workers fit on a node with such resources; part of a GPU comes from one GPU."""
    rooms = {kind: node.get(kind, 0.0) / amount for kind, amount in need.items()}
    if 0 < need.get("GPU", 0.0) < 1:
        rooms["GPU"] = node.get("GPU", 0.0) * int(1 / need["GPU"] + 1e-9)
    return int(min(rooms.values()) + 1e-9)
