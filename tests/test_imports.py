"""What is imported with each part of the package: in one process, from the lightest part to the heaviest."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

_STAGES = """
import json, sys, time

def say(stage, found):
    print(json.dumps([stage, found]), flush=True)

def imported(names):
    return [name for name in names.split() if name in sys.modules]

import raytune_emotion
say("package", imported("torch ray optuna timm numpy pandas matplotlib pydantic"))

raytune_emotion.JSLoss
say("losses", imported("ray optuna timm"))

import raytune_emotion.tuning.execution.trial_actor
say("trial", imported("optuna pandas scipy ray.tune ray.train matplotlib jinja2"))

import raytune_emotion.tuning.execution.cluster
say("cluster", imported("ray.tune ray.train"))
from ray._private import ray_constants
say("uv run", ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)

from raytune_emotion import search
say("search of the package", callable(search) and raytune_emotion.search is search)
del sys.modules["raytune_emotion.search"], raytune_emotion.search
import raytune_emotion.search
from raytune_emotion import search
say("search as a module", callable(search) and raytune_emotion.search is search)
say("documentation of search", search.__doc__)
import raytune_emotion.tuning.report.mlflow_log
say("mlflow", imported("mlflow"))

from raytune_emotion.tuning.execution.worker_group import run_in_background
run_in_background(lambda: time.sleep(600))
say("end", "")
"""


@pytest.fixture(scope="module")
def process():
    """What a process says that imports one part after the other, and its exit code."""
    done = subprocess.run([sys.executable, "-c", _STAGES], capture_output=True, text=True, check=False, timeout=200)
    said = dict(map(json.loads, done.stdout.splitlines()))
    assert "end" in said, done.stderr
    return said, done.returncode


@pytest.mark.parametrize(
    "part",
    [
        "package",
        "losses",
        # Imports take seconds and hundreds of MB in each process of a trial.
        "trial",
        "cluster",
        "mlflow",
    ],
)
def test_what_is_needless_is_not_imported(process, part):
    said, _ = process
    assert said[part] == []


def test_workers_below_uv_run_are_those_of_this_environment(process):
    """The variable is read when Ray is imported, so the package must have set it before."""
    said, _ = process
    assert said["uv run"] is False


@pytest.mark.parametrize("first", ["search of the package", "search as a module"])
def test_search_is_a_function_whatever_was_imported_before(process, first):
    said, _ = process
    assert said[first] is True
    assert said["documentation of search"].startswith("Run a study")


def test_a_process_ends_though_an_action_in_the_background_does_not(process):
    _, code = process
    assert code == 0
