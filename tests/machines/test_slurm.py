"""jobs/slurm.sh with real Ray on two nodes of this machine; Slurm's own commands are stand-ins."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.machines.nodes import free_ports

ROOT = Path(__file__).parents[2]
#: Runs a command, as the second node. On a machine of its own, its agent could have the port of the first node's.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
command=()
for word in "$@"; do
  case $word in
    --dashboard-agent-listen-port=*) word=--dashboard-agent-listen-port={port} ;;
  esac
  command+=("$word")
done
exec "${{command[@]}}"
"""


@pytest.fixture
def job(tmp_path):
    """The number of a job, whose folder and processes are gone after the test."""
    number = os.getpid()
    yield number
    for process in processes_of(number):
        process.kill()
    shutil.rmtree(f"/tmp/ray-{number}", ignore_errors=True)


def processes_of(job: int) -> list[psutil.Process]:
    """Return the processes of Ray that belong to a job."""
    words = f"/tmp/ray-{job}/"
    return [each for each in psutil.process_iter(["cmdline"]) if words in " ".join(each.info["cmdline"] or ())]


def test_a_search_runs_on_the_nodes_of_a_job_and_leaves_no_process_and_no_folder(job, folder, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(port=free_ports(1)[0]))
    (programs / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'node1\\nnode2\\n'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    asked = {
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    options = ["--data", folder / "tiny", "--space", folder / "tiny.yaml", "--results", tmp_path / "results"]
    options += ["--name", "first", "--trials", 4, "--epochs", 1, "--gpus-per-worker", 0]
    running = subprocess.Popen(
        ["bash", ROOT / "jobs" / "slurm.sh", *map(str, options)],
        env=os.environ | asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = running.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        pytest.fail(running.communicate()[0])
    assert running.returncode == 0, out
    assert "2 at once" in out, "a core of each node"
    assert [*pd.read_csv(tmp_path / "results" / "first" / "trials.csv").status] == ["complete"] * 4
    deadline = time.monotonic() + 60
    while (left := processes_of(job)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert not Path(f"/tmp/ray-{job}").exists()
