"""Searches whose machine does its worst: whatever dies or freezes, a search ends within a minute, or goes on.

Each case starts Ray, and takes up to two minutes. Not part of `make test`; run it by
`.venv/bin/python -m pytest tests/machines`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from raytune_emotion.data.synthetic import write_sample

pytestmark = pytest.mark.timeout(500)

LIMIT_S = 60
SPACE = "model.backbone: test_resnet\ndata.image_size: 32\noptim.lr: {log_uniform: [1e-3, 1e-2]}\n"
ENDLESS = 100_000


class Running:
    """A command in a process group of its own, as a shell or `timeout` starts it."""

    def __init__(self, folder: Path, verb: str, *options: object, python: str = sys.executable) -> None:
        self.folder = folder
        command = [python, "-m", f"raytune_emotion.{verb}", *map(str, options)]
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def wait_for_reports(self, study: Path, number: int = 2) -> None:
        """Wait until a trial has reported so often."""
        while not any(file.read_text().count("\n") >= number for file in study.rglob("history.jsonl")):
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.1)

    def part(self, name: str) -> psutil.Process:
        """Find one of Ray's processes by its name or its first words."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name() == name or name in " ".join(process.cmdline())[:300]:
                    return process
        raise AssertionError(f"no process {name}")

    def signal_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def ended(self, limit: float = LIMIT_S) -> tuple[int, str]:
        """Wait for the end; return the exit code, and what was printed."""
        try:
            out, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            out, _ = self.process.communicate()
            pytest.fail(f"still there after {limit} s: {out}")
        return self.process.returncode, out


@pytest.fixture
def folder(tmp_path):
    write_sample(tmp_path / "tiny", train=64, val=16, image_size=32)
    (tmp_path / "tiny.yaml").write_text(SPACE)
    return tmp_path


@pytest.fixture
def search(folder):
    """Starts a search of two trials without end, and waits until one has reported."""
    started = []

    def start(*options, epochs=ENDLESS, python=sys.executable) -> Running:
        asked = ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s", "--trials", 2]
        started.append(Running(folder, "search", *asked, "--epochs", epochs, *options, python=python))
        started[-1].wait_for_reports(folder / "r" / "s")
        return started[-1]

    yield start
    for running in started:
        with contextlib.suppress(ProcessLookupError):
            running.signal_group(signal.SIGKILL)


def assert_whole(study: Path, out: str) -> None:
    """What was reached is exported, tables and page are written, and how to go on is said."""
    assert (study / "best" / "model.safetensors").exists()
    assert (study / "report.html").exists()
    assert len(pd.read_csv(study / "trials.csv")) == 2
    assert len(pd.read_parquet(study / "curves.parquet")) >= 2
    assert "python -m raytune_emotion.search --resume --results r --name s" in out
    assert "Traceback" not in out
    assert "state-dump" not in out


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_process_group_ends_a_search_in_order(folder, search, name):
    running = search()
    running.signal_group(getattr(signal, name))
    code, out = running.ended()
    assert code == 130
    assert out.rstrip().endswith("interrupted")
    assert_whole(folder / "r" / "s", out)


def test_further_signals_do_not_break_the_ending_off(folder, search):
    running = search()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        running.signal_group(number)
        time.sleep(0.7)
    code, out = running.ended()
    assert code == 130
    assert_whole(folder / "r" / "s", out)


@pytest.mark.parametrize(
    ("part", "name", "told"),
    [
        ("raylet", "SIGKILL", "Ray's node process (raylet) has ended"),
        ("gcs_server", "SIGKILL", "Ray's head process (gcs_server) has ended"),
        ("raylet", "SIGSTOP", "Ray's node process (raylet) was stopped for 20 s"),
        ("gcs_server", "SIGSTOP", "Ray's head process (gcs_server) was stopped for 20 s"),
        ("agent.py", "SIGKILL", "Ray's node process (raylet) has ended"),
    ],
)
def test_a_part_of_ray_that_dies_or_freezes_ends_the_search(folder, search, part, name, told):
    running = search()
    running.part(part).send_signal(getattr(signal, name))
    code, out = running.ended()
    assert code == 1
    assert f"error: {told}" in out
    assert "the study can be resumed: " in out
    assert_whole(folder / "r" / "s", out)


def test_the_search_goes_on_after_its_death_as_if_nothing_had_been(folder, search):
    running = search(epochs=30)
    running.part("raylet").send_signal(signal.SIGKILL)
    assert running.ended()[0] == 1
    again = Running(folder, "search", "--resume", "--results", "r", "--name", "s")
    code, _ = again.ended(limit=180)
    assert code == 0
    histories = [file.read_text().count("\n") for file in (folder / "r" / "s").rglob("history.jsonl")]
    assert max(histories) == 30


def test_a_dashboard_that_dies_is_no_end(search):
    running = search(epochs=30)
    running.part("dashboard/dashboard.py").send_signal(signal.SIGKILL)
    code, out = running.ended(limit=180)
    assert code == 0, out


def test_a_trial_that_freezes_is_ended_and_goes_on(folder, search):
    running = search(epochs=40)
    running.part("ray::TrialActor").send_signal(signal.SIGSTOP)
    code, out = running.ended(limit=240)
    assert code == 0, out
    assert "was stopped for 20 s: it is ended, and its trial goes on" in out
    assert set(pd.read_csv(folder / "r" / "s" / "trials.csv").status) <= {"complete", "pruned"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("workers", [1, 2])
def test_train_ends_in_order_and_says_how_to_go_on(folder, name, workers):
    asked = ["--data", "tiny", "--set", "model.backbone=test_resnet", "--results", "r", "--name", "t"]
    running = Running(folder, "train", *asked, "--epochs", ENDLESS, "--workers", workers)
    running.wait_for_reports(folder / "r" / "t")
    running.signal_group(getattr(signal, name))
    code, out = running.ended()
    assert code == 130
    assert (folder / "r" / "t" / "best" / "model.safetensors").exists()
    resume = "python -m raytune_emotion.train --resume --results r --name t"
    assert f"to go on: {resume}" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_train_on_several_workers_ends_when_ray_dies(folder, name):
    asked = ["--data", "tiny", "--set", "model.backbone=test_resnet", "--results", "r", "--name", "t"]
    running = Running(folder, "train", *asked, "--epochs", ENDLESS, "--workers", 2)
    running.wait_for_reports(folder / "r" / "t")
    running.part("raylet").send_signal(getattr(signal, name))
    code, out = running.ended()
    assert code == 1
    assert "error: Ray's node process (raylet)" in out
    assert "to go on: python -m raytune_emotion.train --resume --results r --name t --workers 2" in out


@pytest.mark.parametrize("seconds", [0.5, 1.5, 4.0, 8.0])
@pytest.mark.parametrize("verb", ["search", "train", "confirm"])
def test_an_interruption_in_the_first_seconds_is_no_traceback(folder, verb, seconds):
    options = {
        "search": ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s"],
        "train": ["--data", "tiny", "--results", "r", "--name", "t", "--epochs", ENDLESS],
        "confirm": ["nowhere"],
    }
    running = Running(folder, verb, *options[verb])
    time.sleep(seconds)
    running.signal_group(signal.SIGINT)
    code, out = running.ended()
    assert code in (130, 2 if verb == "confirm" else 130)
    assert "Traceback" not in out


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


def test_an_environment_in_a_folder_with_a_space(folder, tmp_path_factory):
    """As a virtual environment: Ray starts each worker through a shell."""
    place = tmp_path_factory.mktemp("my project") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (next(place.glob("lib/python*/site-packages")) / "shared.pth").write_text(f"{here}\n")
    asked = ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s", "--trials", 2, "--epochs", 1]
    code, out = Running(folder, "search", *asked, python=str(place / "bin" / "python")).ended(limit=180)
    assert code == 0, out
    assert len(pd.read_csv(folder / "r" / "s" / "trials.csv")) == 2


def test_no_process_and_no_folder_of_ray_is_left(folder, search):
    before = {path for base in ("/tmp", os.environ.get("TMPDIR", "/tmp")) for path in Path(base).glob("rte-*")}
    running = search()
    processes = psutil.Process(running.process.pid).children(recursive=True)
    running.signal_group(signal.SIGTERM)
    running.ended()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process.name() for process in alive] == []
    after = {path for base in ("/tmp", os.environ.get("TMPDIR", "/tmp")) for path in Path(base).glob("rte-*")}
    assert after <= before
