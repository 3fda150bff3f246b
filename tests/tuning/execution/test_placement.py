"""Trials on nodes."""

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.execution import placement
from raytune_emotion.tuning.execution.placement import Demand, cores_per_gpu, fit, fit_here, places_on, trials_on
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.request import AUTO


def refusal(nodes, *, grows=False, **needs) -> str:
    with pytest.raises(UserError) as caught:
        fit(nodes, "the cluster", Demand(**needs), grows=grows)
    (told,) = caught.value.faults
    return told


def test_what_can_never_fit_is_refused_with_the_arithmetic():
    two = [{"CPU": 2.0}]
    assert refusal(two, workers=3) == (
        "a trial of 3 workers with 1 CPU each does not fit: the cluster has 2 CPU on 1 node, room for 2 such workers; "
        "ask for fewer workers per trial"
    )
    gpus = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert refusal(gpus, workers=3, gpus_per_worker=1.0) == (
        "a trial of 3 workers with 1 CPU and 1 GPU each does not fit: the cluster has 8 CPU and 2 GPU on 2 nodes, room "
        "for 2 such workers; ask for fewer workers per trial, or a smaller --gpus-per-worker"
    )
    assert refusal([*gpus, {"CPU": 2.0}], workers=3, gpus_per_worker=0.0) == (
        "a trial of 3 workers with 1 CPU each does not fit: the cluster has 2 CPU on 1 node without GPUs, room for 2 "
        "such workers; ask for fewer workers per trial"
    )
    assert "NCCL cannot join two workers" in refusal(gpus, workers=2, gpus_per_worker=0.5)


@pytest.mark.parametrize(
    ("nodes", "workers", "concurrency", "cpu", "at_once"),
    [
        ([2, 2, 2], 1, 1, 2, 1),
        ([4, 4, 4], 2, 1, 4, 1),
        ([4, 2], 1, 2, 2, 2),
        ([8], 1, 2, 4, 2),
        ([5], 1, 2, 2, 2),
        ([1], 1, 2, 0.5, 2),
        ([3, 3], 1, 4, 1, 4),
    ],
)
def test_a_worker_has_the_cores_that_one_node_can_give(nodes, workers, concurrency, cpu, at_once):
    cluster = [{"CPU": float(cores)} for cores in nodes]
    place = fit(cluster, "the cluster", Demand(workers=workers, concurrency=concurrency))
    assert (place.resources.cpus_per_worker, place.concurrency) == (cpu, at_once)


def test_a_gpu_where_there_is_none_is_refused_before_ray_starts(monkeypatch):
    monkeypatch.setattr(placement, "local_node", lambda: {"CPU": 2.0, "GPU": 0.0})
    with pytest.raises(UserError) as caught:
        fit_here(Demand(workers=1, gpus_per_worker=1.0))
    assert str(caught.value) == (
        "--gpus-per-worker 1: this machine has no GPU that PyTorch can use; use --gpus-per-worker 0 to train on cores"
    )
    assert fit_here(Demand(workers=1, gpus_per_worker=0.0)).resources.gpus_per_worker == 0


def test_a_gpu_that_pytorch_cannot_use_is_refused_and_does_not_count_for_training_on_cores(broken_gpu, recwarn):
    for share in (None, 0.5, 1.0, AUTO):
        with pytest.raises(UserError) as caught:
            fit_here(Demand(gpus_per_worker=share))
        assert caught.value.faults == (broken_gpu,)
    assert placement.local_node()["GPU"] == 0
    assert fit_here(Demand(gpus_per_worker=0.0)).resources.gpus_per_worker == 0
    assert [*recwarn] == []


def test_a_cluster_whose_workers_are_still_to_come_is_refused_unless_it_grows():
    head = [{"memory": 1e9}, {"CPU": 0.0}]
    assert refusal(head) == (
        "the cluster has no core to work on: 2 nodes with 0 CPU, and no autoscaler; start its worker nodes"
    )
    assert refusal(head, grows=True) == (
        "the cluster has no node to train on yet; say what its autoscaler should start: --gpus-per-worker 1, or "
        "--gpus-per-worker 0 to train on cores"
    )
    # On the cores of the head nobody would ask for a GPU any more.
    assert refusal([{"CPU": 8.0}], grows=True).startswith("the cluster has no node with a GPU yet; say what its ")


@pytest.mark.parametrize(
    ("nodes", "gpus", "need", "at_once"),
    [
        ([], 0.0, {"CPU": 1.0}, 0),
        ([{"CPU": 1.0}], 0.0, {"CPU": 1.0}, 0),
        ([{"CPU": 3.0}], 0.0, {"CPU": 1.0}, 1),
        ([{"CPU": 3.0}], 1.0, {"CPU": 1.0, "GPU": 1.0}, 0),
        ([], 1.0, {"CPU": 1.0, "GPU": 1.0}, 0),
        ([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 4.0}], None, {"CPU": 1.0, "GPU": 1.0}, 2),
        ([{"CPU": 64.0, "GPU": 1.0}, {"CPU": 4.0}], 0.0, {"CPU": 1.0}, 8),  # it counts the cores beside GPUs, too
    ],
)
def test_what_does_not_fit_yet_may_fit_later_where_an_autoscaler_adds_nodes(nodes, gpus, need, at_once):
    found = fit(nodes, "the cluster", Demand(workers=2, gpus_per_worker=gpus, concurrency=8), grows=True)
    assert (found.resources.per_worker, found.concurrency, found.limit) == (need, at_once, 8)
    assert ", more as its autoscaler adds nodes with " in str(found)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpu"), [([8, 4], 1, 8), ([8, 8], 2, 8), ([1], 4, 1), ([], 1, 1), ([0], 1, 1)]
)
def test_what_runs_alone_takes_the_cores_that_are_there_also_where_an_autoscaler_adds_nodes(nodes, workers, cpu):
    cluster = [{"CPU": float(cores)} for cores in nodes]
    place = fit(cluster, "the cluster", Demand(workers=workers, gpus_per_worker=0.0, concurrency=1), grows=True)
    assert place.resources.cpus_per_worker == cpu


@pytest.mark.parametrize(
    ("concurrency", "cpus", "said"),
    [
        (None, 1.0, "2 at once"),
        (1, 2.0, "1 at once"),
        (2, 1.0, "2 at once"),
        (8, 0.2, "8 at once, each on 0.2 core"),
    ],
)
def test_trials_share_the_cores(concurrency, cpus, said):
    found = fit([{"CPU": 2.0}], "here", Demand(workers=1, concurrency=concurrency))
    assert (found.resources.cpus_per_worker, str(found)) == (cpus, said)


@pytest.mark.parametrize(
    ("node", "share", "reserved", "threads"),
    [
        ({"CPU": 16.0, "GPU": 4.0}, None, 1.0, 4),
        ({"CPU": 8.0, "GPU": 1.0}, 1 / 4, 0.2, 2),
        ({"CPU": 12.0, "GPU": 1.0}, 1 / 3, 0.3, 4),
        ({"CPU": 4.0, "GPU": 8.0}, None, 0.5, 1),
        ({"CPU": 4.0, "GPU": 1.0}, 0.0, 1.0, 1),
    ],
)
def test_a_worker_on_a_gpu_reserves_a_core_and_uses_those_of_its_node(node, share, reserved, threads):
    place = fit([node], "the cluster", Demand(workers=1, gpus_per_worker=share))
    assert place.resources.cpus_per_worker == reserved
    assert place.resources.on_node(node).threads == threads
    # What a node that joins later has beside its GPU does not matter.
    assert trials_on([{"CPU": 1.0, "GPU": 1.0}], place.resources) == int(1 / (share or 1))


def test_cores_are_those_of_the_nodes_with_gpus():
    nodes = [{"CPU": 64.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 12.0, "GPU": 1.0}]
    assert cores_per_gpu(nodes) == 8
    assert cores_per_gpu(nodes[:1]) == 0


def test_trials_on_cores_keep_off_nodes_with_gpus_if_there_are_others():
    nodes = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 4.0}, {"CPU": 0.0}]
    found = fit(nodes, "the cluster", Demand(workers=1, gpus_per_worker=0.0, concurrency=2))
    assert (found.resources, found.concurrency) == (Resources(1, 2.0, 0.0, off_gpus=True), 2)
    assert str(found) == "2 at once, keeping off 1 node with GPUs"
    # An autoscaler would count the cores beside the GPUs as room, and start no other node.
    grown = fit(nodes, "the cluster", Demand(workers=1, gpus_per_worker=0.0), grows=True)
    assert (grown.resources, grown.concurrency) == (Resources(1, 1.0, 0.0), 68)
    alone = fit(nodes[::2], "the cluster", Demand(workers=1, gpus_per_worker=0.0, concurrency=2))
    assert (alone.resources, alone.concurrency) == (Resources(1, 32.0, 0.0), 2)


@pytest.mark.parametrize(
    ("gpus", "share", "places"),
    [(1, 1.0, 1), (1, 1 / 3, 3), (1, 0.3, 3), (2, 0.6, 2), (2, 0.25, 8), (4, 1.0, 4), (0, 0.5, 0)],
)
def test_parts_of_a_gpu_come_from_one(gpus, share, places):
    assert places_on({"CPU": 16.0, "GPU": gpus}, {"CPU": 1.0, "GPU": share}) == places
    assert places_on({"CPU": 16.0, "GPU": gpus}, {"CPU": 10.0, "GPU": share}) == min(1, places)


def test_a_share_that_is_to_be_measured_counts_as_a_whole_gpu():
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    place = fit(nodes, "the cluster", Demand(gpus_per_worker=AUTO))
    assert (place.resources.gpus_per_worker, place.concurrency) == (1, 2)
    assert "cannot share a GPU" in refusal(nodes, workers=2, gpus_per_worker=AUTO)
