"""Trials that need more memory than their machine has, as Ray's memory monitor ends them.

Not part of `make test`: run them by `make machines ONLY=memory`.
"""

import subprocess
import sys

import pytest

from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.runner import run_study
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.studies import spec_of

SPACE = {"model.backbone": "test_vit", "optim.lr": {"log_uniform": [1e-4, 1e-2]}, "train.batch_size": 32, "loss": "kl"}


@pytest.fixture
def study(tmp_path, store):
    folder = tmp_path / "study"
    make_study(folder, spec_of(store, name="study", space=SPACE, trials=1, epochs=2, max_failures=1))
    return folder


def test_a_study_outlives_what_the_memory_monitor_kills(study):
    # In a cluster of its own, whose memory is said to be full.
    done = subprocess.run(
        [sys.executable, "-m", "tests.machines.test_memory", str(study)],
        capture_output=True,
        text=True,
        check=True,
    )
    status, _, reason = done.stdout.strip().partition(": ")
    assert status == "failed"
    assert reason.startswith("its process ended 2 times, the last time with: ")
    assert "killed due to the node running low on memory" in reason
    assert "\n" not in reason


def _run_without_memory(folder):
    settings = {"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100}
    with ray_session(None, dashboard=False, num_cpus=1, _system_config=settings):
        (record,) = run_study(load(folder), Placement(Resources(1, 1.0, 0.0), 1, limit=1))
    print(f"{record.status}: {record.reason}")


if __name__ == "__main__":
    from pathlib import Path

    _run_without_memory(Path(sys.argv[1]))
