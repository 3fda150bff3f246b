"""Measure on one GPU of each type of the cluster how many trials should share a GPU: `--gpus-per-worker auto`."""

import math
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from raytune_emotion.config import RunConfig
from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.throughput import COUNTS, best_count, measure
from raytune_emotion.tuning.execution.cluster_nodes import cluster_nodes
from raytune_emotion.tuning.execution.cluster_watch import ClusterWatch, iterate_watched
from raytune_emotion.tuning.execution.placement import Nodes, check_sharing, cores_per_gpu
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.worker_nodes import resources_here
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import draw
from raytune_emotion.tuning.study.request import AUTO
from raytune_emotion.tuning.study.spec import SPEC, StudySpec

#: Prefix of Ray's resource that names the type of a node's GPUs.
_TYPE = "accelerator_type:"
#: Number of configurations among which the one with the largest memory need is chosen.
_DRAWN = 256


def fastest_share(spec: StudySpec, watch: ClusterWatch, say: Callable[[str], None]) -> float:
    """Find the share of a GPU per trial with which all trials of a study together are fastest.

    It is measured with every backbone of the space, on a free GPU of each type with its share of its node's cores. The
    share fits all types: it is the largest one, so that no type has more trials than it can hold.

    Args:
        spec: spec of the study.
        watch: watch of the cluster.
        say: tells the user about the wait and the results.

    Raises:
        UserError: the cluster has no GPU, or the workers of a trial need one each.
        Breakdown: the measurement failed, or the cluster has died.
    """
    nodes = cluster_nodes()
    check_sharing(nodes, "the cluster", spec.workers_per_trial)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    # More trials than this will never be on one GPU.
    most = math.ceil(spec.concurrency / gpus) if spec.concurrency else max(COUNTS)
    counts = [count for count in COUNTS if count <= most]
    types = gpu_types(nodes)
    on_one_gpu: Any = ray.remote(num_cpus=min(1.0, cores_per_gpu(nodes)), num_gpus=1, max_retries=0)(_measure_here)
    heaviest = heaviest_configurations(spec)
    tried = [on_one_gpu.options(accelerator_type=each).remote(heaviest, spec.stores, counts) for each in types]
    say("measuring how many trials should share a GPU, as soon as one is free" + " of each type" * (len(types) > 1))
    try:
        found: list[dict[str, dict[int, float]]] = [*iterate_watched((ray.get(each) for each in tried), watch)]
    except RayTaskError as error:
        raise Breakdown(f"--gpus-per-worker {AUTO}: {error.cause}; give a number instead") from error
    count = min(best_count([*rates.values()]) for rates in found)
    of = ", ".join(map(str, counts))
    say(
        f"trials per GPU: {count}; total images per second with {of} trials, as far as they fit, without the time for "
        f"evaluations and checkpoints: {'; '.join(map(_describe, types, found))}"
    )
    return 1 / count


def gpu_types(nodes: Nodes) -> list[str | None]:
    """List the types of GPUs by Ray's names; [None] if Ray knows no type."""
    names = {name for node in nodes if node.get("GPU") for name in node if name.startswith(_TYPE)}
    return [*sorted(name.removeprefix(_TYPE) for name in names)] or [None]


def _measure_here(
    heaviest: dict[str, dict[str, Any]], stores: dict[int, str], counts: list[int]
) -> dict[str, dict[int, float]]:
    """Measure on the GPU of this task."""
    cores = resources_here(Resources(1, 1.0, 1.0)).threads
    return measure(heaviest, stores, torch.device("cuda"), cores=cores, counts=counts)


def _describe(gpu: str | None, found: dict[str, dict[int, float]]) -> str:
    """Describe the measurements on one type of GPU."""
    rates = "; ".join(
        f"{name} {', '.join(f'{rate:.0f}' for rate in of_one.values()) or 'does not fit even alone'}"
        for name, of_one in found.items()
    )
    return f"on {gpu}: {rates}" if gpu else rates


def heaviest_configurations(spec: StudySpec) -> dict[str, dict[str, Any]]:
    """Choose for each backbone of a study's space settings that need about the most memory."""
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for chosen in draw(parse_space(spec.space, SPEC), _DRAWN, seed=0):
        settings = spec.settings(chosen)
        config = RunConfig.from_flat(settings)
        rows = config.train.batch_size / config.train.accumulate
        weight = rows * config.data.image_size**2 * (2 if config.train.precision == "fp32" else 1)
        if weight > found.get(config.model.backbone, (0, {}))[0]:
            found[config.model.backbone] = weight, settings
    return {name: settings for name, (_, settings) in found.items()}
