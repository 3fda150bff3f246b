"""jobs/submit.sh on a cluster as people start it: by `ray start`, with a dashboard that asks for a token.

Not part of `make test`: run it by `make machines ONLY=submitted`.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
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

from tests.machines.nodes import free_ports

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN = secrets.token_hex(32)
#: Without it, Ray offers no token to a cluster that is named by its address.
TOLD = {"RAY_AUTH_MODE": "token"}
#: Ports of the agents that every node has, and further ones of the head.
OF_A_NODE = "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port"
OF_THE_HEAD = "port", "dashboard-port", "ray-client-server-port"


class Cluster:
    """Three nodes of one core each with ports and a folder of their own, beside whatever other clusters there are."""

    def __init__(self) -> None:
        # Ray's sockets lie in it, and their names may not be long.
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        self.nodes: list[subprocess.Popen] = []
        ports = dict(zip(OF_THE_HEAD, free_ports(len(OF_THE_HEAD)), strict=True))
        self.url = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.address = f"127.0.0.1:{ports['port']}"
        # The project's environment is not the one of the shell that starts the cluster.
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != RAY.parent)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_", "VIRTUAL_ENV"))
        } | {"PATH": path, "RAY_AUTH_TOKEN": TOKEN}
        try:
            self.start("--head", f"--temp-dir={self.folder}", "--dashboard-host=127.0.0.1", **ports)
            self.wait_for_nodes(1)
            for number in (2, 3):
                # Nodes with one folder would unpack the code of a job into it one after the other, while the job runs.
                self.start(f"--address={self.address}", f"--temp-dir={self.folder}/{number}")
                self.wait_for_nodes(number)
        except BaseException:
            self.close()
            raise

    def start(self, *options: str, **ports: int) -> None:
        """Start a node. The head takes the token that it finds; other nodes offer theirs only when they are told to."""
        ports |= dict(zip(OF_A_NODE, free_ports(len(OF_A_NODE)), strict=True))
        command = [str(RAY), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", *options, *(f"--{name}={port}" for name, port in ports.items())]
        with self.log_of(len(self.nodes)).open("w") as log:
            node = subprocess.Popen(
                command, env=self.environment | ({} if "--head" in options else TOLD),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)

    def log_of(self, number: int) -> Path:
        return Path(self.folder, f"start{number}.log")

    def wait_for_nodes(self, number: int) -> None:
        """Wait until so many nodes are alive, and jobs can be submitted. The last of them was started just now."""
        deadline = time.monotonic() + 100
        while True:
            with contextlib.suppress(OSError, TypeError):  # at first, there is no answer, or no data in it
                self.get("/api/jobs/")
                if [node["state"] for node in self.state_of("nodes")] == ["ALIVE"] * number:
                    return
            if self.nodes[-1].poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Ray does not start: {self.log_of(number - 1).read_text()}")
            time.sleep(0.2)

    def state_of(self, kind: str) -> list[dict]:
        """Return what Ray's dashboard knows of nodes or actors."""
        return self.get(f"/api/v0/{kind}?detail=1")["data"]["result"]["result"]

    def get(self, path: str, token: str = TOKEN):
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def submit(self, *arguments) -> subprocess.CompletedProcess:
        return self.run("bash", ROOT / "jobs" / "submit.sh", *arguments)

    def run(self, *command) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*map(str, command)], cwd="/", capture_output=True, text=True, check=False, timeout=500,
            env=self.environment | TOLD | {"RAY_API_SERVER_ADDRESS": self.url},
        )  # fmt: skip

    def close(self) -> None:
        # Its own processes: `ray stop` would end those of all clusters of this machine.
        for node in reversed(self.nodes):
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(node.pid)
                for process in [*family.children(recursive=True), family]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            node.wait()
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

    actors = ray_cluster.state_of("actors")
    assert {a["repr_name"] for a in actors if a["class_name"] != "JobSupervisor"} == {f"trials of {name}"}

    with pytest.raises(urllib.error.HTTPError) as refused:
        ray_cluster.get("/api/jobs/", token="another")
    assert refused.value.code in (401, 403)


def test_a_search_that_is_stopped_ends_in_order_and_goes_on_when_it_is_submitted_again(ray_cluster, faces, tmp_path):
    space = "model.backbone: test_vit\noptim.lr: {log_uniform: [1e-3, 1e-2]}\n"
    (tmp_path / "space.yaml").write_text(space)
    study, trials, epochs = tmp_path / "stopped", 4, 120
    # With as many trials as there are cores, one is still to begin.
    options = ["--data", faces, "--space", tmp_path / "space.yaml", "--results", tmp_path, "--name", study.name]
    options += ["--trials", trials, "--epochs", epochs, "--scheduler", "none"]
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(ray_cluster.submit, *options)
        while sum(len(reports) >= 2 for reports in histories(study).values()) < 3:
            assert not followed.done(), followed.result()
            time.sleep(0.1)
        actors = [actor for actor in ray_cluster.state_of("actors") if actor["repr_name"] == f"trials of {study.name}"]
        (job,) = jobs_of(ray_cluster, study.name)
        stopped = ray_cluster.run(RAY, "job", "stop", job["submission_id"])
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        out = followed.result().stdout
    assert len({actor["node_id"] for actor in actors}) == 3, "each node runs trials"
    assert "interrupted" in out
    assert "Traceback" not in out
    assert (study / "best" / "model.safetensors").exists()
    assert (study / "report.html").exists()
    before = histories(study)
    assert min(map(len, before.values())) < epochs, "it was stopped too late"

    again = ray_cluster.submit(*options, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Traceback" not in again.stdout
    after = histories(study)
    assert sorted(after) == [f"{number:04d}" for number in range(trials)]
    for reports in after.values():
        assert [json.loads(line)["report"] for line in reports] == [*range(1, epochs + 1)]
    assert {trial: after[trial][: len(reports)] for trial, reports in before.items()} == before, "none began anew"
    table = pd.read_csv(study / "trials.csv")
    assert [*table.status] == ["complete"] * trials
    assert [job["status"] for job in jobs_of(ray_cluster, study.name)] == ["STOPPED", "SUCCEEDED"]


def histories(study: Path) -> dict[str, list[str]]:
    """Return the whole lines of the history of each trial that has begun."""
    files = study.glob("trials/*/history.jsonl")
    return {file.parent.name: file.read_text().rpartition("\n")[0].splitlines() for file in files}


def jobs_of(cluster: Cluster, name: str) -> list[dict]:
    """Return the jobs of this name, in the order of their submission."""
    jobs = [job for job in cluster.get("/api/jobs/") if job["metadata"] == {"job_name": name}]
    return sorted(jobs, key=lambda job: job["start_time"])


def test_a_search_that_joins_the_cluster_is_named_in_its_dashboard(ray_cluster):
    code = (
        "import sys\n"
        "from raytune_emotion.tuning.execution.cluster import ray_session\n"
        "with ray_session(sys.argv[1], job='second'): pass"
    )
    environment = ray_cluster.environment | TOLD
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
