"""Searches on a real cluster of three nodes that are lost, drained and added: every trial is counted once.

Not part of `make test`; run it by `.venv/bin/python -m pytest tests/machines/test_nodes.py`.
"""

import subprocess

import pandas as pd
import pytest

from tests.machines.nodes import RAY, head_of, nodes_of, reports_of, search, start_ray, wait_until

pytestmark = pytest.mark.timeout(700)


@pytest.fixture
def address(start_head):
    """The address of a cluster of three nodes, with a core each."""
    address = start_head(cpus=1)
    for _ in range(2):
        start_ray(f"--address={address}", "--num-cpus=1")
    return address


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
