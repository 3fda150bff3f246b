"""Optuna's dashboard shows a study while it runs."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from raytune_emotion.storage.atomic import exclusive_lock
from raytune_emotion.tuning.policy.trial_attributes import PAUSED
from raytune_emotion.tuning.study.open_study import load
from tests.support.studies import write_study

DASHBOARD = shutil.which("optuna-dashboard", path=Path(sys.executable).parent)


@pytest.fixture
def ask(tmp_path, store):
    """Ask the dashboard of a study in which a trial runs, one is paused and one has failed."""
    folder = tmp_path / "study"
    write_study(folder, store)
    study = load(folder).optuna
    study.ask({"optim.warmup_epochs": FloatDistribution(0.0, 1.0)})  # a setting that the others lack
    study.ask().set_user_attr(PAUSED, True)
    study.add_trial(create_trial(state=TrialState.FAIL))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "log").open("w") as log, exclusive_lock(folder):  # as the process that works on it
        command = [DASHBOARD, str(folder / "optuna.journal"), "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)

        def get(path):
            deadline = time.monotonic() + 100
            while True:
                url = f"http://127.0.0.1:{port}{path}"
                with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=20) as answer:
                    return json.load(answer)
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)

        yield get
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(DASHBOARD is None, reason="the extra dashboard is not installed")
def test_the_dashboard_opens_the_journal_of_a_running_study(ask):
    (study,) = ask("/api/studies")["study_summaries"]
    shown = ask(f"/api/studies/{study['study_id']}")
    states = [trial["state"] for trial in shown["trials"]]
    assert states == ["Complete"] * 3 + ["Running", "Running", "Fail"]
    assert [param["name"] for param in shown["trials"][3]["params"]] == ["optim.warmup_epochs"]
    assert [attr["key"] for attr in shown["trials"][4]["user_attrs"]] == [PAUSED]
    assert shown["objective_names"] == ["best validation JS, bits"]
    weights = {attr["key"] for attr in shown["trials"][0]["user_attrs"]} & {"loss.kl", "loss.js"}
    assert weights == {"loss.kl", "loss.js"}  # the parameters of a mixture are others
    assert {item["name"] for item in shown["union_search_space"]} >= {"optim.warmup_epochs"}
