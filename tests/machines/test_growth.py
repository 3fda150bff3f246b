"""Searches on a real cluster that grows: nodes join by hand, or an autoscaler starts them.

Not part of `make test`; run it by `.venv/bin/python -m pytest tests/machines/test_growth.py`.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.machines.nodes import search, start_ray, status_of, trials_begun, wait_until

pytestmark = pytest.mark.timeout(700)

DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"


def test_a_node_that_joins_is_used_within_a_minute(start_head, tmp_path):
    address = start_head(cpus=1)
    with search(tmp_path, address, "--trials", 3, "--epochs", 100_000, "--scheduler", "none") as process:
        wait_until(lambda: trials_begun(tmp_path))
        time.sleep(5)
        assert trials_begun(tmp_path) == 1
        start_ray(f"--address={address}", "--num-cpus=1")
        wait_until(lambda: trials_begun(tmp_path) == 2, seconds=60)
        process.terminate()
        assert process.wait(60) == 130, (tmp_path / "out").read_text()


def test_an_autoscaler_is_asked_for_what_a_study_needs_and_then_for_nothing(start_head, tmp_path):
    address = start_head(cpus=0, grows=True)
    options = ("--trials", 3, "--epochs", 2, "--concurrency", 2, "--gpus-per-worker", 0)
    with search(tmp_path, address, *options) as process:
        asked = "its autoscaler was asked for room for 2 trials"
        wait_until(lambda: asked in (tmp_path / "out").read_text(), seconds=240)
        assert "{'CPU': 1.0}: 2 from request_resources()" in status_of(address)
        assert trials_begun(tmp_path) == 0
        start_ray(f"--address={address}", "--num-cpus=1")
        assert process.wait(200) == 0, (tmp_path / "out").read_text()
        assert (
            "0 at once, more as its autoscaler adds nodes with 1 CPU for each worker" in (tmp_path / "out").read_text()
        )
        assert trials_begun(tmp_path) == 3
    wait_until(lambda: "from request_resources()" not in status_of(address), seconds=30)


def test_request_of_a_search_that_was_killed_is_taken_back_by_the_command_of_the_docs(
    start_head, tmp_path, monkeypatch
):
    address = start_head(cpus=0, grows=True)
    with search(tmp_path, address, "--trials", 2, "--epochs", 2, "--gpus-per-worker", 0) as process:
        wait_until(lambda: "from request_resources()" in status_of(address), seconds=240)
        process.kill()
        process.wait()
    time.sleep(5)
    assert "from request_resources()" in status_of(address)
    (script,) = re.findall(r'^python -c "(.*request_resources.*)"$', DOCS.read_text(), re.MULTILINE)
    monkeypatch.setenv("RAY_ADDRESS", address)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=90)
    wait_until(lambda: "from request_resources()" not in status_of(address), seconds=30)


def test_a_cluster_without_a_node_to_train_on_is_refused(start_head, tmp_path):
    address = start_head(cpus=0)
    with search(tmp_path, address, "--trials", 1, "--epochs", 1) as process:
        assert process.wait(90) == 2
        assert "with 0 CPU, and no autoscaler; start its worker nodes" in (tmp_path / "out").read_text()


def test_growing_cluster_without_a_gpu_yet_asks_what_it_is_to_start(start_head, tmp_path):
    address = start_head(cpus=1, grows=True)
    wait_until(lambda: "Demands" in status_of(address), seconds=60)
    with search(tmp_path, address, "--trials", 1, "--epochs", 1) as process:
        assert process.wait(90) == 2
    assert "error: the cluster has no node with a GPU yet" in (tmp_path / "out").read_text()
    assert not (tmp_path / "r").exists()
