import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from raytune_emotion.data.prepare import prepare
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.tuning.study.spec import write_spec
from tests.machines.nodes import autoscaler_of, start_ray
from tests.machines.running import ENDLESS, Running
from tests.support.studies import write_study

# Studies on real machines note the commit that git tells them.
os.environ.pop("RAYTUNE_EMOTION_COMMIT", None)

SPACE = "model.backbone: test_resnet\ndata.image_size: 32\noptim.lr: {log_uniform: [1e-3, 1e-2]}\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with images `tiny` and a space `tiny.yaml`."""
    write_sample(tmp_path / "tiny", train=64, val=16, image_size=32)
    (tmp_path / "tiny.yaml").write_text(SPACE)
    return tmp_path


@pytest.fixture
def start(folder):
    """Starts commands; what is left of them ends with the test."""
    started = []

    def begin(verb, *options, python=sys.executable) -> Running:
        started.append(Running(folder, verb, *options, python=python))
        return started[-1]

    yield begin
    for running in started:
        with contextlib.suppress(ProcessLookupError):
            running.signal_group(signal.SIGKILL)


@pytest.fixture
def search(folder, start):
    """Starts a search of two trials without end, and waits until one has reported."""

    def begin(*options, epochs=ENDLESS) -> Running:
        asked = ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s", "--trials", 2]
        running = start("search", *asked, "--epochs", epochs, *options)
        running.wait_for_reports(folder / "r" / "s")
        return running

    return begin


@pytest.fixture
def train(folder, start):
    """Starts the training of a model without end, and waits until it has reported."""

    def begin(*options, epochs=ENDLESS) -> Running:
        asked = ["--data", "tiny", "--set", "model.backbone=test_resnet", "--results", "r", "--name", "t"]
        running = start("train", *asked, "--epochs", epochs, *options)
        running.wait_for_reports(folder / "r" / "t")
        return running

    return begin


@pytest.fixture
def confirm(folder, start):
    """Starts the confirmation of a study, of runs without end, and waits until one has reported."""

    def begin(*options, epochs=ENDLESS) -> Running:
        study = folder / "r" / "s"
        spec = write_study(study, prepare(folder / "tiny", image_size=32), trials=2, epochs=1)
        write_spec(study, dataclasses.replace(spec, epochs=epochs))
        running = start("confirm", "r/s", "--top", 1, "--seeds", 2, *options)
        running.wait_for_reports(study / "confirmed")
        return running

    return begin


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
