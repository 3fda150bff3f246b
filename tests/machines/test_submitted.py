"""jobs/submit.sh on a cluster as people start it: by `ray start`, with a dashboard that asks for a token.

Not part of `make test`: run it by `make machines ONLY=submitted`.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN = secrets.token_hex(32)


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


class Cluster:
    """One node with ports and folders of its own, beside whatever other clusters this machine has."""

    def __init__(self) -> None:
        # Ray's sockets lie in it, and their names may not be long.
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        options = "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"
        options += "ray-client-server-port", "metrics-export-port", "runtime-env-agent-port"
        ports = dict(zip(options, free_ports(len(options)), strict=True))
        self.url = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.address = f"127.0.0.1:{ports['port']}"
        # The project's environment is not the one of the shell that starts the cluster.
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != RAY.parent)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_", "VIRTUAL_ENV"))
        } | {"PATH": path, "RAY_AUTH_TOKEN": TOKEN}
        command = [
            RAY,
            "start",
            "--head",
            "--block",
            "--temp-dir",
            self.folder,
            "--num-cpus=2",
            "--disable-usage-stats",
        ]
        command += ["--dashboard-host=127.0.0.1", "--object-store-memory=100000000"]
        self.log = Path(self.folder, "start.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*map(str, command), *(f"--{name}={port}" for name, port in ports.items())],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 100
        while True:
            with contextlib.suppress(OSError):
                self.get("/api/jobs/")
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                text = self.log.read_text()
                self.close()
                pytest.fail(f"Ray does not start: {text}")
            time.sleep(0.2)

    def get(self, path: str, token: str = TOKEN):
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def submit(self, *arguments) -> subprocess.CompletedProcess:
        return self.run("bash", ROOT / "jobs" / "submit.sh", *arguments)

    def run(self, *command) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*map(str, command)], cwd="/", capture_output=True, text=True, check=False, timeout=200,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.url, "RAY_AUTH_MODE": "token"},
        )  # fmt: skip

    def close(self) -> None:
        # Its own processes: `ray stop` would end those of all clusters of this machine.
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid)
            for process in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_cluster():
    cluster = Cluster()
    yield cluster
    cluster.close()


def test_a_search_is_submitted_and_followed(ray_cluster, faces, tmp_path):
    space = "model.backbone: test_vit\noptim.lr: {log_uniform: [1e-3, 1e-2]}\n"
    (tmp_path / "space.yaml").write_text(space)
    name = "faces_1"
    options = ["--data", faces, "--space", tmp_path / "space.yaml", "--trials", 2, "--epochs", 1, "--name", name]
    done = ray_cluster.submit(*options, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best JS     0." in done.stdout  # the job's own output

    study = tmp_path / "results" / name
    assert len(pd.read_csv(study / "trials.csv")) == 2
    assert {"study.yaml", "optuna.journal", "curves.parquet", "report.html"} <= {path.name for path in study.iterdir()}
    assert (study / "best" / "model.safetensors").exists()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    told = re.search(r"^git_commit: *(\S*)", (study / "study.yaml").read_text(), re.MULTILINE)[1]
    assert told.removesuffix("-dirty") == commit.strip()  # the code is not where its repository is

    (job,) = ray_cluster.get("/api/jobs/")
    assert job["submission_id"].startswith(f"{name}-20")
    assert job["status"] == "SUCCEEDED"
    assert job["metadata"] == {"job_name": name}
    assert job["entrypoint"].startswith("python -m raytune_emotion.search --address auto --data ")

    actors = ray_cluster.get("/api/v0/actors?detail=1")["data"]["result"]["result"]
    assert {a["repr_name"] for a in actors if a["class_name"] != "JobSupervisor"} == {f"trials of {name}"}

    with pytest.raises(urllib.error.HTTPError) as refused:
        ray_cluster.get("/api/jobs/", token="another")
    assert refused.value.code in (401, 403)


def test_a_search_that_is_stopped_ends_in_order(ray_cluster, faces, tmp_path):
    space = "model.backbone: test_vit\noptim.lr: {log_uniform: [1e-3, 1e-2]}\n"
    (tmp_path / "space.yaml").write_text(space)
    options = ["--data", faces, "--space", tmp_path / "space.yaml", "--epochs", 100_000, "--results", tmp_path]
    study = tmp_path / "endless"
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(ray_cluster.submit, *options, "--name", study.name)
        while not any(study.glob("trials/*/history.jsonl")):
            assert not followed.done(), followed.result()
            time.sleep(0.1)
        (job,) = (job for job in ray_cluster.get("/api/jobs/") if job["metadata"] == {"job_name": study.name})
        stopped = ray_cluster.run(RAY, "job", "stop", job["submission_id"])
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        out = followed.result().stdout
    assert "interrupted" in out
    assert "Traceback" not in out
    assert (study / "best" / "model.safetensors").exists()
    assert (study / "report.html").exists()


def test_a_search_that_joins_the_cluster_is_named_in_its_dashboard(ray_cluster):
    code = (
        "import sys\n"
        "from raytune_emotion.tuning.execution.cluster import ray_session\n"
        "with ray_session(sys.argv[1], job='second'): pass"
    )
    environment = ray_cluster.environment | {"RAY_AUTH_MODE": "token"}
    subprocess.run([sys.executable, "-c", code, ray_cluster.address], env=environment, check=True, timeout=120)
    assert [job["type"] for job in ray_cluster.get("/api/jobs/") if job["metadata"] == {"job_name": "second"}] == [
        "DRIVER"
    ]


def test_what_the_search_refuses_fails_the_job(ray_cluster, tmp_path):
    done = ray_cluster.submit("--trials=0", "--name=mistaken", f"--results={tmp_path / 'results'}")
    assert done.returncode != 0
    assert "error: --trials: expected an integer from 1 to 1000000, got '0'" in done.stdout
    assert not (tmp_path / "results").exists()
    # Drivers that were not submitted are jobs too, without such an id.
    named = [job for job in ray_cluster.get("/api/jobs/") if (job["submission_id"] or "").startswith("mistaken")]
    assert {job["status"] for job in named} == {"FAILED"}
