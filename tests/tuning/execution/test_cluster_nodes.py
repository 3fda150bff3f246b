"""The nodes of a cluster that is joined."""

import json

import pytest

from raytune_emotion.tuning.execution import ray_patches
from raytune_emotion.tuning.execution.cluster_nodes import cluster_nodes, fit_to_cluster
from raytune_emotion.tuning.execution.placement import Demand
from raytune_emotion.tuning.execution.ray_patches import has_autoscaler, own_processes, raylet_pid
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.worker_nodes import label_selector, live_nodes, resources_here


def test_a_joined_cluster_tells_the_process_of_its_node_here(cluster):
    assert raylet_pid() == own_processes()["raylet"].pid


def test_a_cluster_of_this_machine_does_not_grow(cluster):
    assert not has_autoscaler()
    assert [node["CPU"] for node in cluster_nodes()] == [2.0]
    assert str(fit_to_cluster(Demand(workers=1, gpus_per_worker=None, concurrency=None))) == "2 at once"


def test_work_for_cores_keeps_off_the_nodes_that_have_gpus(cluster):
    nodes = {"a": {"CPU": 8.0, "GPU": 1.0}, "b": {"CPU": 2.0}, "c": {"GPU": 2.0}}
    assert label_selector(nodes, off_gpus=True) == {"ray.io/node-id": "!in(a,c)"}
    assert label_selector(nodes, off_gpus=False) == {}
    assert label_selector(live_nodes(), off_gpus=True) == {}
    # On cores, results depend on the number of threads, so it does not depend on the node.
    on_cores = Resources(1, 1.0, 0.0)
    assert on_cores.on_node(nodes["a"]) == resources_here(on_cores) == on_cores


@pytest.mark.parametrize(
    ("status", "grows"),
    [
        (None, False),
        ({"load_metrics_report": {}, "time": 1.0}, False),  # in the first seconds of a cluster
        ({"autoscaler_report": None}, False),
        ({"autoscaler_report": {"node_type_mapping": {"10.0.0.1": "node_10.0.0.1"}}}, False),
        ({"autoscaler_report": {"node_type_mapping": {"10.0.0.1": "node_10.0.0.1", "10.0.0.2": "gpu"}}}, True),
    ],
)
def test_autoscaler_is_known_by_its_node_types(monkeypatch, status, grows):
    said = None if status is None else json.dumps(status).encode()
    monkeypatch.setattr(ray_patches, "internal_kv_get", lambda key, namespace=None: None if namespace else said)
    assert has_autoscaler() == grows
