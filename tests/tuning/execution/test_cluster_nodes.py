"""The nodes of a cluster that is joined."""

import json

import pytest

from raytune_emotion.tuning.execution import ray_patches
from raytune_emotion.tuning.execution.cluster_nodes import cluster_nodes, fit_to_cluster
from raytune_emotion.tuning.execution.ray_patches import has_autoscaler


def test_a_cluster_of_this_machine_does_not_grow(cluster):
    assert not has_autoscaler()
    assert [node["CPU"] for node in cluster_nodes()] == [2.0]
    assert str(fit_to_cluster(workers=1, gpus_per_worker=None, concurrency=None)) == "2 at once"


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
