"""What becomes of a command when a part of Ray or a trial dies or freezes: it ends within a minute, or goes on.

Each case starts Ray, and takes up to two minutes. Not part of `make test`: run them by `make machines`.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest

import raytune_emotion
from tests.machines.nodes import nodes_of
from tests.machines.running import assert_whole

pytestmark = pytest.mark.timeout(500)


@pytest.mark.parametrize(
    ("part", "name", "told"),
    [
        ("raylet", "SIGKILL", "Ray's node process (raylet) has ended"),
        ("gcs_server", "SIGKILL", "Ray's head process (gcs_server) has ended"),
        ("raylet", "SIGSTOP", "Ray's node process (raylet) was stopped for 20 s"),
        ("gcs_server", "SIGSTOP", "Ray's head process (gcs_server) was stopped for 20 s"),
        # The raylet ends with its agents.
        ("ray::DashboardAgent", "SIGKILL", "Ray's node process (raylet) has ended"),
        ("ray::RuntimeEnvAgent", "SIGKILL", "Ray's node process (raylet) has ended"),
    ],
)
def test_a_search_ends_when_a_part_of_ray_dies_or_freezes(folder, search, part, name, told):
    running = search()
    running.part(part).send_signal(getattr(signal, name))
    code, out = running.ended()
    assert code == 1
    assert f"error: {told}" in out
    assert "the study can be resumed: " in out
    assert_whole(folder / "r" / "s", out)


def test_a_search_ends_when_the_raylet_of_a_joined_cluster_freezes(folder, search, start_head):
    """Ray itself takes more than a minute to notice."""
    address = start_head(cpus=2)
    running = search("--address", address)
    raylet, *_ = nodes_of(address).values()
    raylet.send_signal(signal.SIGSTOP)
    code, out = running.ended()
    assert code == 1
    assert "error: Ray's node process (raylet) was stopped for 20 s" in out
    assert_whole(folder / "r" / "s", out)


def test_a_search_resumes_after_the_death_of_its_raylet(folder, search, start):
    running = search(epochs=300)
    running.part("raylet").send_signal(signal.SIGKILL)
    assert running.ended()[0] == 1
    code, _ = start("search", "--resume", "--results", "r", "--name", "s").ended(limit=180)
    assert code == 0
    histories = [file.read_text().count("\n") for file in (folder / "r" / "s").rglob("history.jsonl")]
    assert max(histories) == 300


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_search_goes_on_without_the_dashboard_and_the_monitors(search, name):
    running = search(epochs=300)
    for part in ("dashboard/dashboard.py", "_private/log_monitor.py", "_private/monitor.py"):
        running.part(part).send_signal(getattr(signal, name))
    code, out = running.ended(limit=180)
    assert code == 0, out


def test_a_search_goes_on_with_frozen_agents(search):
    running = search(epochs=300)
    for part in ("ray::DashboardAgent", "ray::RuntimeEnvAgent"):
        running.part(part).send_signal(signal.SIGSTOP)
    code, out = running.ended(limit=180)
    assert code == 0, out


def test_a_trial_that_freezes_is_ended_and_goes_on(folder, search):
    running = search(epochs=300)
    running.part("ray::TrialActor").send_signal(signal.SIGSTOP)
    code, out = running.ended(limit=240)
    assert code == 0, out
    assert "was stopped for 20 s: it is killed, the trial continues" in out
    assert set(pd.read_csv(folder / "r" / "s" / "trials.csv").status) <= {"complete", "pruned"}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_train_on_several_workers_ends_when_ray_dies(train, name):
    running = train("--workers", 2)
    running.part("raylet").send_signal(getattr(signal, name))
    code, out = running.ended()
    assert code == 1
    assert "error: Ray's node process (raylet)" in out
    assert "to continue: python -m raytune_emotion.train --resume --results r --name t --workers 2" in out


#: Has the second worker fail once, in its third epoch, as after an illegal access to the memory of a GPU.
_FAILS_ONCE = """
import importlib.abc, importlib.util, pathlib, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "raytune_emotion.learn.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module))
        return spec

def patch(loop):
    real = loop.train_segment
    def train_segment(run, history):
        if run.plan.rank == 1 and len(history) == 2:
            try:
                pathlib.Path("{flag}").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(run, history)
    loop.train_segment = train_segment

sys.meta_path.insert(0, Finder())
"""


def test_an_error_of_one_worker_ends_the_others_and_training_goes_on(folder, train, tmp_path, monkeypatch):
    """The others wait for it in a collective operation meanwhile."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_FAILS_ONCE.replace("{flag}", str(tmp_path / "failed")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    code, out = train("--workers", 2, epochs=5).ended(limit=180)
    assert (tmp_path / "failed").exists()
    assert code == 0, out
    assert (folder / "r" / "t" / "history.jsonl").read_text().count("\n") == 5


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_confirm_ends_when_ray_dies(confirm, part):
    running = confirm()
    running.part(part).send_signal(signal.SIGKILL)
    code, out = running.ended()
    assert code == 1
    assert f"({part}) has ended (code -9); the study can be resumed: r/s/confirmed" in out
    assert "the same command continues: python -m raytune_emotion.confirm r/s --top 1 --seeds 2" in out


def test_a_search_runs_in_a_thread(folder):
    script = (
        "import threading\n"
        "from raytune_emotion.__main__ import main\n"
        "argv = 'search --data tiny --space tiny.yaml --results r --name s --trials 2 --epochs 1'.split()\n"
        "thread = threading.Thread(target=lambda: print('code', main(argv)))\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "code 0" in done.stdout
    assert len(pd.read_csv(folder / "r" / "s" / "trials.csv")) == 2


def test_an_environment_in_a_folder_with_a_space(folder, start, tmp_path_factory):
    """As a virtual environment: Ray starts each worker through a shell."""
    place = tmp_path_factory.mktemp("my project") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    # The package itself may be installed as a link, which is not followed from there.
    package = Path(raytune_emotion.__file__).parents[1]
    (next(place.glob("lib/python*/site-packages")) / "shared.pth").write_text(f"{here}\n{package}\n")
    asked = ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s", "--trials", 2, "--epochs", 1]
    code, out = start("search", *asked, python=str(place / "bin" / "python")).ended(limit=180)
    assert code == 0, out
    assert len(pd.read_csv(folder / "r" / "s" / "trials.csv")) == 2


def test_no_process_and_no_folder_of_ray_is_left(search, tmp_path, monkeypatch):
    place = tmp_path / "t"
    place.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    running = search()
    processes = psutil.Process(running.process.pid).children(recursive=True)
    running.signal_group(signal.SIGTERM)
    running.ended()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process.name() for process in alive] == []
    assert list(place.iterdir()) == []
