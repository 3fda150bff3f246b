"""Run a command in a process group of its own, and find the processes that it has started."""

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

#: So many seconds after anything has died, a command has ended.
LIMIT_S = 60
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


def assert_whole(study: Path, out: str) -> None:
    """What was reached is exported, tables and page are written, and how to go on is said."""
    assert (study / "best" / "model.safetensors").exists()
    assert (study / "report.html").exists()
    assert len(pd.read_csv(study / "trials.csv")) == 2
    assert len(pd.read_parquet(study / "curves.parquet")) >= 2
    assert "python -m raytune_emotion.search --resume --results r --name s" in out
    assert "Traceback" not in out
    assert "state-dump" not in out
