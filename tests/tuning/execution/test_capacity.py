"""Capacity on a cluster whose nodes come and go, without Ray."""

from types import SimpleNamespace

import pytest

from raytune_emotion.tuning.execution import capacity
from raytune_emotion.tuning.execution.capacity import Capacity, tell_shortage
from raytune_emotion.tuning.execution.cluster_nodes import ClusterNode
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.resources import Resources


class Cluster:
    """A cluster with a clock, which writes down what its autoscaler is asked for."""

    def __init__(self, *nodes):
        self.nodes, self.now, self.asked, self.said = [*nodes], 0.0, [], []

    def room(self, *, limit=None, grows=False, workers=1, off_gpus=False, wanted=lambda: 100):
        return Capacity(
            Placement(Resources(workers, 2.0, 0.0, off_gpus), 0, limit, grows),
            wanted,
            self.said.append,
            nodes=lambda: {node.name: node for node in self.nodes},
            request=self.request,
            clock=lambda: self.now,
        )

    def request(self, bundles):
        self.asked.append(bundles)

    def after(self, seconds, room):
        self.now += seconds
        return room()


@pytest.mark.parametrize(("limit", "expected"), [(None, [2, 4, 1]), (3, [2, 3, 1])])
def test_the_number_of_trials_follows_the_nodes(limit, expected):
    cluster = Cluster(ClusterNode("a", {"CPU": 4.0}))
    room = cluster.room(limit=limit)
    seen = [room()]
    cluster.nodes.append(ClusterNode("b", {"CPU": 5.0}))
    seen.append(cluster.after(60, room))
    cluster.nodes[:] = [ClusterNode("a", {"CPU": 2.0})]
    seen.append(cluster.after(60, room))
    assert seen == expected
    room.close()
    assert cluster.asked == [], "it has no autoscaler"


def test_workers_of_a_trial_may_be_on_several_nodes():
    assert Cluster(*(ClusterNode(name, {"CPU": 3.0}) for name in "abc")).room(workers=2)() == 1


def test_trials_that_keep_off_gpus_do_not_count_nodes_with_gpus():
    cluster = Cluster(ClusterNode("a", {"CPU": 4.0}))
    room = cluster.room(off_gpus=True)
    seen = [room()]
    cluster.nodes.append(ClusterNode("b", {"CPU": 8.0, "GPU": 1.0}))
    seen.append(cluster.after(60, room))
    del cluster.nodes[0]
    assert [*seen, cluster.after(60, room)] == [2, 2, 0]
    assert room.shortage() == "waiting for room on the cluster for 2 CPU on a node without GPUs"


def test_a_drained_node_takes_nothing_and_what_comes_and_goes_is_said_once():
    a, b, c = (ClusterNode(name, {"CPU": 2.0}) for name in "abc")
    cluster = Cluster(a, b)
    room = cluster.room()
    assert (room(), cluster.said) == (2, [])
    cluster.nodes[:] = [a, ClusterNode("b", {"CPU": 2.0}, draining=True), c]
    assert cluster.after(60, room) == 2
    assert [room.is_leaving(name) for name in ("a", "b", "c", "unknown")] == [False, True, False, False]
    cluster.after(60, room)
    cluster.nodes[:] = [a, c]
    cluster.after(60, room)
    cluster.nodes[:] = [c]
    assert cluster.after(60, room) == 1
    assert cluster.said == [
        "node b is draining; its trials continue elsewhere from their checkpoints",
        "node c has joined the cluster",
        "node b has left the cluster",
        "node a has left the cluster; its trials continue elsewhere from their checkpoints",
    ]


def test_an_autoscaler_is_asked_for_what_the_study_can_use_until_it_ends():
    cluster, left = Cluster(), [5]
    room = cluster.room(limit=4, grows=True, workers=2, wanted=lambda: left[0])
    assert room() == 0
    assert room.shortage() == (
        "waiting for room on the cluster for 2 workers with 2 CPU each; its autoscaler was asked for room for 4 trials"
    )
    for left[0] in (3, 1, 0, 0):
        cluster.after(60, room)
    need = {"CPU": 2.0}
    assert cluster.asked == [[need] * 8, [need] * 6, [need] * 2, []]
    room.close()
    assert cluster.asked[4:] == [], "nothing was asked for that would have to be taken back"


def test_what_an_autoscaler_is_asked_for_is_said_again():
    """The request of another search has taken its place."""
    cluster = Cluster()
    room = cluster.room(limit=1, grows=True)
    for _ in range(3):
        cluster.after(10, room)
        room()  # no sooner
    room.close()
    assert cluster.asked == [[{"CPU": 2.0}]] * 3 + [[]]


def test_results_that_wait_for_what_is_in_use_are_said_to_wait_once(monkeypatch, capsys):
    now, none_free = [0.0], {"CPU"}
    monkeypatch.setattr(capacity.time, "monotonic", lambda: now[0])
    look = tell_shortage(SimpleNamespace(none_free=lambda: none_free), "CPU", "GPU")

    def after(seconds, *, came=False):
        now[0] += seconds
        look(came)
        return capsys.readouterr().err

    assert [after(29), after(2), after(60)] == [
        "",
        "no result from the cluster for 30 s; all of its cores are in use\n",
        "",
    ]
    none_free.clear()  # a slow task may take as long as it likes
    assert [after(60), after(60)] == ["", ""]
    none_free |= {"CPU", "GPU"}
    assert [after(29), after(1, came=True), after(29)] == ["", "", ""]
    assert after(2) == "no result from the cluster for 30 s; all of its cores and GPUs are in use\n"
