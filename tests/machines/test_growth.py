"""Searches on a real cluster that grows: nodes join by hand, or an autoscaler starts them.

Not part of `make test`: run them by `make machines`.
"""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from raytune_emotion.data.synthetic import write_sample

pytestmark = pytest.mark.timeout(700)

SPACE = "model.backbone: test_resnet\ndata.image_size: 32\noptim.lr: {log_uniform: [1e-3, 1e-2]}\n"
RAY = str(Path(sys.executable).with_name("ray"))
#: What a configuration must have, and needs nothing in.
_EMPTY = [
    *(f"{part}setup_commands" for part in ("", "head_", "worker_")),
    *(f"{part}_start_ray_commands" for part in ("head", "worker")),
    *("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
]


def autoscaler_of(port: int) -> dict:
    """Return the configuration of an autoscaler whose cloud is out of machines: the test starts the nodes itself.

    The nodes that Ray's own stand-in for a cloud starts run no process for work.
    """
    return {
        "cluster_name": "growing",
        "max_workers": 0,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}"},
        "auth": {"ssh_user": "nobody"},
        "upscaling_speed": 1,
        "idle_timeout_minutes": 5,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "docker": {},
        "head_node": {},
        "worker_nodes": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        **{name: [] for name in _EMPTY},
    }


@pytest.fixture
def start_head(monkeypatch):
    """Start the head of a cluster, and return its address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    with tempfile.TemporaryDirectory(prefix="rte-g", dir="/tmp", ignore_cleanup_errors=True) as folder:

        def start(*, cpus: int, grows: bool = False) -> str:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            more = []
            if grows:
                config = Path(folder) / "autoscaler.json"
                config.write_text(json.dumps(autoscaler_of(port)))
                more = [f"--autoscaling-config={config}"]
                # The node provider knows the head by this id.
                monkeypatch.setenv("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "f" * 51 + "00000")
                monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
            start_ray(
                "--head",
                "--include-dashboard=false",
                f"--port={port}",
                f"--num-cpus={cpus}",
                f"--temp-dir={folder}/ray",
                *more,
            )
            monkeypatch.delenv("RAY_OVERRIDE_NODE_ID_FOR_TESTING", raising=False)
            return f"127.0.0.1:{port}"

        yield start
        # Not `ray stop`, which ends every cluster of this machine.
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if folder in " ".join(process.info["cmdline"] or ()):
                    process.kill()


def start_ray(*options: str) -> None:
    subprocess.run([RAY, "start", "--disable-usage-stats", *options], check=True, timeout=90)


def status_of(address: str) -> str:
    return subprocess.run([RAY, "status", f"--address={address}"], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def search(folder: Path, address: str, *options: object):
    """Search on a cluster, with all that is printed in a file."""
    write_sample(folder / "x", train=64, val=16, image_size=32)
    (folder / "space.yaml").write_text(SPACE)
    command = f"-m raytune_emotion.search --data x --space space.yaml --results r --name s --address {address}".split()
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command, *map(str, options)], cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def trials_begun(folder: Path) -> int:
    return len([*(folder / "r" / "s" / "trials").glob("*/history.jsonl")])


def wait_until(condition, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


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


def test_a_cluster_without_a_node_to_train_on_is_refused(start_head, tmp_path):
    address = start_head(cpus=0)
    with search(tmp_path, address, "--trials", 1, "--epochs", 1) as process:
        assert process.wait(90) == 2
        assert "with 0 CPU, and no autoscaler; start its worker nodes" in (tmp_path / "out").read_text()
