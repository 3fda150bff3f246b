"""Room on a cluster whose nodes come and go, without Ray."""

import pytest

from raytune_emotion.tuning.execution.job import Resources
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.room import Room


class Cluster:
    """A cluster with a clock, which writes down what its autoscaler is asked for."""

    def __init__(self, *nodes):
        self.nodes, self.now, self.asked = [*nodes], 0.0, []

    def room(self, *, limit=None, grows=False, workers=1, wanted=lambda: 100):
        return Room(
            Placement(Resources(workers, 2.0, 0.0), 0, limit, grows),
            wanted,
            nodes=lambda: self.nodes,
            request=lambda bundles: self.asked.append(bundles),
            clock=lambda: self.now,
        )

    def after(self, seconds, room):
        self.now += seconds
        return room()


@pytest.mark.parametrize(("limit", "expected"), [(None, [2, 4, 1]), (3, [2, 3, 1])])
def test_the_number_of_trials_follows_the_nodes(limit, expected):
    cluster = Cluster({"CPU": 4.0})
    room = cluster.room(limit=limit)
    seen = [room()]
    cluster.nodes.append({"CPU": 5.0})
    seen.append(cluster.after(60, room))
    cluster.nodes[:] = [{"CPU": 2.0}]
    seen.append(cluster.after(60, room))
    assert seen == expected
    room.close()
    assert cluster.asked == [], "it has no autoscaler"


def test_workers_of_a_trial_may_be_on_several_nodes():
    assert Cluster({"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 3.0}).room(workers=2)() == 1


def test_an_autoscaler_is_asked_for_what_the_study_can_use_until_it_ends():
    cluster, left = Cluster(), [5]
    room = cluster.room(limit=4, grows=True, workers=2, wanted=lambda: left[0])
    assert room() == 0
    assert room.waiting() == (
        "waiting for room on the cluster: a trial needs 2 CPU 2 times; its autoscaler was asked for room for 4 trials"
    )
    for left[0] in (4, 3, 3, 1):
        cluster.after(60, room)
    room.close()
    need = {"CPU": 2.0}
    assert cluster.asked == [[need] * 8, [need] * 6, [need] * 2, []]
