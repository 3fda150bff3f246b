"""Searches on a real cluster whose nodes differ, and are lost, drained and added: every trial is counted once.

Not part of `make test`; run it by `.venv/bin/python -m pytest tests/machines/test_nodes.py`.
"""

import contextlib
import subprocess
import time

import pandas as pd
import psutil
import pytest
import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.cluster_map import cluster_map
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.placement import Demand
from raytune_emotion.tuning.execution.runner import place_of
from raytune_emotion.tuning.execution.worker_nodes import live_nodes, resources_here
from tests.machines.nodes import RAY, head_of, nodes_of, reports_of, search, start_ray, wait_until

pytestmark = pytest.mark.timeout(700)


@pytest.fixture
def address(start_head):
    """The address of a cluster of three nodes, with a core each."""
    address = start_head(cpus=1)
    for _ in range(2):
        start_ray(f"--address={address}", "--num-cpus=1")
    return address


@pytest.fixture
def uneven(no_cluster, start_head):
    """The address of a cluster of two nodes with two cores each, and of one with four cores and two GPUs."""
    address = start_head(cpus=0)
    for node in (["--num-cpus=2"], ["--num-cpus=2"], ["--num-cpus=4", "--num-gpus=2"]):
        start_ray(f"--address={address}", *node)
    return address


def count_on(node: psutil.Process, name: str) -> int:
    """Count the processes of this name on the node of a raylet, which ends by itself once it is drained."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(name in " ".join(child.cmdline()) for child in node.children())
    return 0


def said(folder, *words):
    """List the lines of the log that hold these words."""
    return [line for line in (folder / "out").read_text().splitlines() if all(word in line for word in words)]


def all_have_reported(folder, trials):
    return sum(number >= 2 for number in reports_of(folder).values()) >= trials


def test_trials_of_a_node_that_is_lost_go_on_elsewhere_and_are_counted_once(address, tmp_path):
    options = ("--trials", 5, "--epochs", 600, "--scheduler", "none")
    *_, lost = nodes_of(address).values()
    with search(tmp_path, address, *options) as process:
        wait_until(lambda: all_have_reported(tmp_path, 3))
        lost.kill()
        start_ray(f"--address={address}", "--num-cpus=1")
        assert process.wait(400) == 0, (tmp_path / "out").read_text()
    assert reports_of(tmp_path) == {f"{number:04d}": 600 for number in range(5)}
    table = pd.read_csv(tmp_path / "r/s/trials.csv")
    assert [*table.status] == ["complete"] * 5
    assert len(said(tmp_path, "has left the cluster; its trials continue elsewhere from their checkpoints")) == 1
    assert len(said(tmp_path, "has joined the cluster")) == 1


def test_a_search_whose_head_is_lost_ends_and_goes_on_with_another_head(address, start_head, tmp_path):
    options = ("--trials", 4, "--epochs", 600, "--scheduler", "none")
    head = head_of(address)
    with search(tmp_path, address, *options) as process:
        wait_until(lambda: all_have_reported(tmp_path, 3))
        for part in head:  # as if the machine was gone
            part.kill()
        assert process.wait(120) == 1, (tmp_path / "out").read_text()
    assert len(said(tmp_path, "error: ")) == 1
    assert said(tmp_path, "the study can be resumed: ")
    before = reports_of(tmp_path)
    assert max(before.values()) < 600
    with search(tmp_path, start_head(cpus=2), *options, "--resume") as process:
        assert process.wait(400) == 0, (tmp_path / "out").read_text()
    assert reports_of(tmp_path) == {f"{number:04d}": 600 for number in range(4)}
    assert [*pd.read_csv(tmp_path / "r/s/trials.csv").status] == ["complete"] * 4


def test_a_drained_node_gives_its_trials_back_before_it_dies(address, tmp_path):
    options = ("--trials", 3, "--epochs", 100_000, "--scheduler", "none")
    with search(tmp_path, address, *options) as process:
        wait_until(lambda: all_have_reported(tmp_path, 3))
        *_, (node, raylet) = nodes_of(address).items()
        drain = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        subprocess.run([RAY, "drain-node", "--address", address, "--node-id", node, *drain], check=True, timeout=60)
        wait_until(lambda: not any("TrialActor" in child.name() for child in raylet.children()), seconds=60)
        assert len(said(tmp_path, "is draining; its trials continue elsewhere from their checkpoints")) == 1
        raylet.kill()
        wait_until(lambda: said(tmp_path, "has left the cluster"), seconds=60)
        # The trial that was given back waits for a place, and goes on from where it was.
        before = reports_of(tmp_path)
        start_ray(f"--address={address}", "--num-cpus=1")
        wait_until(lambda: all(number > before[trial] for trial, number in reports_of(tmp_path).items()))
        process.terminate()
        assert process.wait(90) == 130, (tmp_path / "out").read_text()
    assert [*pd.read_csv(tmp_path / "r/s/trials.csv").status] == ["running"] * 3
    for file in (tmp_path / "r/s/trials").glob("*/history.jsonl"):
        lines = file.read_text().splitlines()
        assert [*pd.read_json(file, lines=True).report] == [*range(1, len(lines) + 1)]


def test_places_on_gpus_take_the_cores_of_their_nodes_and_tasks_for_cores_keep_off_them_meanwhile(uneven):
    with ray_session(uneven) as watch:
        place = fit_to_cluster(Demand(workers=1, gpus_per_worker=1.0, concurrency=None))
        assert (place.concurrency, place.resources.per_worker) == (2, {"CPU": 1.0, "GPU": 1.0})

        @ray.remote
        def threads():
            return resources_here(place.resources).threads

        groups = []

        def begin():
            group = place_of(place.resources).to_placement_group()
            groups.append(group)
            ray.get(group.ready(), timeout=60)
            at = PlacementGroupSchedulingStrategy(group)
            return ray.get(threads.options(num_cpus=1, num_gpus=1, scheduling_strategy=at).remote(), timeout=60)

        def node_of(task):
            return ray.get_runtime_context().get_node_id()

        assert [begin(), begin()] == [2, 2]
        start_ray(f"--address={uneven}", "--num-cpus=1", "--num-gpus=1")
        assert begin() == 1
        with cluster_map(watch) as pmap:
            used = {*pmap(node_of, range(16))}
            assert used == {number for number, node in live_nodes().items() if node.get("CPU") == 2}
            for group in groups:
                remove_placement_group(group)
            wait_until(lambda: ray.available_resources().get("GPU") == 3, seconds=30)
            everywhere = {*pmap(node_of, range(64))}
            assert everywhere > used

            def slow_node_of(task):
                time.sleep(2)
                return node_of(task)

            begin()
            raylets = nodes_of(uneven)
            results = pmap(slow_node_of, range(20))
            assert next(results) in used
            for number in used:
                raylets[number].kill()
            *_, last = results
            assert last in everywhere - used, "tasks do not wait for nodes that are gone"


def test_trials_spread_over_nodes_without_gpus_and_the_workers_of_one_trial_stand_together(uneven, tmp_path):
    options = ("--gpus-per-worker", 0, "--epochs", 100_000, "--scheduler", "none")
    _, *nodes, gpus = nodes_of(uneven).values()
    for folder, name, more, expected in (
        (tmp_path / "spread", "ray::TrialActor", ("--trials", 2), [1, 1]),
        (tmp_path / "packed", "RayTrainWorker", ("--trials", 1, "--workers-per-trial", 2), [0, 2]),
    ):
        folder.mkdir()
        with search(folder, uneven, *options, *more) as process:
            wait_until(lambda folder=folder, some=more[1]: all_have_reported(folder, some), seconds=300)
            assert sorted(count_on(node, name) for node in nodes) == expected
            assert count_on(gpus, name) == 0
            process.terminate()
            assert process.wait(90) == 130, (folder / "out").read_text()


def test_a_trial_of_several_workers_leaves_a_drained_node_before_it_dies(address, tmp_path):
    options = ("--trials", 1, "--workers-per-trial", 2, "--epochs", 100_000, "--scheduler", "none")
    with search(tmp_path, address, *options) as process:
        wait_until(lambda: all_have_reported(tmp_path, 1), seconds=300)
        _, *others = nodes_of(address).items()  # the head drives the trials, so it does not drain
        node, raylet = next(item for item in others if count_on(item[1], "RayTrainWorker"))
        drain = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        subprocess.run([RAY, "drain-node", "--address", address, "--node-id", node, *drain], check=True, timeout=60)
        wait_until(lambda: not count_on(raylet, "RayTrainWorker"), seconds=60)
        # Two of three nodes have room for it.
        before = reports_of(tmp_path)["0000"]
        wait_until(lambda: reports_of(tmp_path)["0000"] > before, seconds=300)
        process.terminate()
        assert process.wait(90) == 130, (tmp_path / "out").read_text()


def test_a_training_of_several_workers_says_that_it_waits_for_room(no_cluster, folder, start, start_head):
    address = start_head(cpus=2)
    with ray_session(address):
        held = placement_group([{"CPU": 2.0}])
        ray.get(held.ready(), timeout=60)
        model = ("--set", "model.backbone=test_resnet", "--epochs", 1)
        running = start("train", "--data", "tiny", *model, "--results", "r", "--workers", 2, "--address", address)
        line = next(line for line in running.process.stdout if line.startswith("waiting"))
        assert line == "waiting for room on the cluster for 2 workers with 1 CPU each\n"
        remove_placement_group(held)
        code, out = running.ended(limit=180)
    assert code == 0, out
    assert "epoch  1.00" in out
