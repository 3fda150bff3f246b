"""Measure the time from the command to the first training, compared with Ray Tune alone; and the time of `status`.

Ray Tune alone runs a function that only imports PyTorch and timm. Any search on Ray must wait for this.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import Table
from raytune_emotion.tuning.study.trials import PARAMS

TURNS = 5
#: Longest time of a single start.
_LIMIT_S = 300.0

_RAY_ALONE = """
import sys, time
import ray
from ray import tune

def trainable(config):
    import timm, torch
    open(config["file"], "w").write(str(time.time()))
    tune.report({"val_js": 0.0})

ray.init(log_to_driver=False)
config = tune.RunConfig(storage_path=sys.argv[2], verbose=0)
tune.Tuner(tune.with_resources(trainable, {"cpu": 1}), param_space={"file": sys.argv[1]}, run_config=config).fit()
"""


def run() -> Table:
    starts = {
        "Ray Tune alone, with PyTorch and timm": _ray_alone,
        "search, a new study": _search,
        "search --resume": _resume,
        "status": _status,
    }
    took: dict[str, list[float]] = {name: [] for name in starts}
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        _search(Path(scratch) / "unmeasured")  # packs the sample
        # The commands take turns, so that other load of the machine affects all alike.
        for turn in range(TURNS):
            for name, start in starts.items():
                took[name].append(start(Path(scratch) / str(turn)))
    alone = median(took["Ray Tune alone, with PyTorch and timm"])
    rows = [(name, median(s), min(s), max(s), median(s) - alone) for name, s in took.items()]
    columns = ("command", "s until it trains", "least", "most", "more than Ray alone")
    return Table(columns, rows, [f"{TURNS} turns, medians. `status` trains nothing: its time is that of all of it."])


def _ray_alone(folder: Path) -> float:
    folder.mkdir()
    began, file = time.time(), folder / "trains"
    subprocess.run(
        [sys.executable, "-c", _RAY_ALONE, file, folder / "ray"], check=True, capture_output=True, timeout=_LIMIT_S
    )
    return float(file.read_text()) - began


def _search(folder: Path) -> float:
    return _begin(folder, "--space", "demo", "--trials", "2", "--epochs", "2", "--name", "study")


def _resume(folder: Path) -> float:
    return _begin(folder, "--resume", "--trials", "4")


def _begin(folder: Path, *options: str) -> float:
    """Run a search to its end; return the seconds until the first of its new trials began to train."""
    trials, began = folder / "study" / "trials", time.time()
    before = {*trials.glob("*")}
    command = [sys.executable, "-m", "raytune_emotion.search", "--results", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S)
    # This file is written when a trial begins, with its settings.
    return min((trial / PARAMS).stat().st_mtime for trial in {*trials.glob("*")} - before) - began


def _status(folder: Path) -> float:
    began = time.time()
    command = [sys.executable, "-m", "raytune_emotion.status", "--json", str(folder / "study")]
    said = subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S).stdout
    took = time.time() - began
    assert json.loads(said)["trials"]["complete"], "the study has not run"
    return took
