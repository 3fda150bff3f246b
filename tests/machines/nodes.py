"""Start a real cluster of several nodes on this machine, and search on it."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from raytune_emotion.data.synthetic import write_sample

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


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


def start_ray(*options: str) -> None:
    subprocess.run([RAY, "start", "--disable-usage-stats", *options], check=True, timeout=90)


def status_of(address: str) -> str:
    return subprocess.run([RAY, "status", f"--address={address}"], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def search(folder: Path, address: str, *options: object):
    """Search on a cluster, with all that is printed in a file."""
    if not (folder / "x").exists():
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


def reports_of(folder: Path) -> dict[str, int]:
    """Return how often each trial of the search has reported."""
    files = (folder / "r" / "s" / "trials").glob("*/history.jsonl")
    return {file.parent.name: file.read_text().count("\n") for file in files}


def nodes_of(address: str) -> dict[str, psutil.Process]:
    """Return the raylet of each node that lives, by the node's id; the head's comes first."""
    script = f"import json, ray; ray.init({address!r}, logging_level='ERROR'); print(json.dumps(ray.nodes()))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    ports = {node["NodeManagerPort"]: node["NodeID"] for node in json.loads(found) if node["Alive"]}
    raylets = {ports[port]: process for port, process in listeners("raylet").items() if port in ports}
    return dict(sorted(raylets.items(), key=lambda item: item[1].create_time()))


def listeners(name: str) -> dict[int, psutil.Process]:
    """Return the processes of this name by each port that they listen on."""
    processes = [process for process in psutil.process_iter(["name"]) if process.info["name"] == name]
    return {
        connection.laddr.port: process
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def head_of(address: str) -> list[psutil.Process]:
    """Return the process that manages the cluster, and the head's raylet; to find them takes seconds."""
    head, *_ = nodes_of(address).values()
    return [listeners("gcs_server")[int(address.rpartition(":")[2])], head]
