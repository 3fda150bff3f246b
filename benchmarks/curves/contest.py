"""Compare real studies of equal time: this project, random search, Optuna alone, and Ray's OptunaSearch as documented.

    python -m benchmarks.curves.contest --data ferplus_small

All choose among the same configurations: those of the quick space without its start points, so that none knows more
than the others. All train them with the same code on the same packed store, on two cores. Each study is a separate
process, whose time begins with its start, and imports only what it needs. In addition, this project runs with the start
points. With `--keep FOLDER`, an interrupted contest continues where it stopped. Kept results are checked for the same
data, but not for the same code: name another folder after a change of the code.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.pruners import HyperbandPruner
from rich.progress import track
from ruamel.yaml import YAML

from benchmarks import Table
from benchmarks.__main__ import write_result
from raytune_emotion.config import RunConfig
from raytune_emotion.data.prepare import prepare
from raytune_emotion.data.store import open_store
from raytune_emotion.learn.loop import Divergence, fit
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space, draw

SPACE = Path("search_spaces/quick.yaml")
PICTURE = Path("docs/contest.png")
EPOCHS = 8
CORES = 2
MANY = 10_000  # number of trials, more than the time allows


@dataclasses.dataclass(frozen=True)
class Contest:
    """The task of a study."""

    store: str
    space: str  # file
    seconds: float
    seed: int
    folder: str  # for its files; each report is a line of a *.jsonl in it, with its `time` and `val_js`


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves.contest", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder or store")
    parser.add_argument("--seconds", type=float, default=150, help="of a study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of studies that ended: they are not run again")
    parser.add_argument("--study", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.study:
        RIVALS[args.study[0]](Contest(**json.loads(args.study[1])))
        return 0
    began = datetime.now(timezone.utc)
    with tempfile.TemporaryDirectory(prefix="contest-") as scratch:
        space = Path(scratch) / "space.yaml"
        mapping = {key: value for key, value in YAML(typ="safe").load(SPACE).items() if key != "start"}
        YAML().dump(mapping, space)
        store = prepare(args.data, image_size=None)
        took = 0.0
        found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in (*RIVALS, *OURS)}
        # Run the studies seed by seed, so that other load of the machine affects all alike.
        for seed, name in track([(seed, name) for seed in range(args.seeds) for name in found], "studies"):
            what = f"{name}, {args.seconds:g} s, seed {seed}, data {store.fingerprint[:12]}"
            file = (args.keep or Path(scratch)) / f"{what}.json"
            if not file.exists():
                folder = Path(scratch) / f"{seed} {name}"
                folder.mkdir()
                asked = Contest(str(store.path), str(space), args.seconds, seed, str(folder))
                file.parent.mkdir(parents=True, exist_ok=True)
                started = time.monotonic()
                points = _study(name, asked)
                write_text(file, json.dumps({"points": points, "took": time.monotonic() - started}))
            kept = json.loads(file.read_text())
            found[name].append(kept["points"])
            took += kept["took"]
    table = _table(found, args.seconds)
    command = ["python", "-m", "benchmarks.curves.contest", "--data", args.data.name]
    command += ["--seconds", f"{args.seconds:g}", "--seeds", str(args.seeds)]
    write_result("curves/contest", table, began, took, shlex.join(command))
    _draw(found, args.seconds)
    return 0


def _study(name: str, asked: Contest) -> list[tuple[float, float]]:
    """Run a study, and return its reports within its time, as seconds since its start and validation JS."""
    began = time.time()
    if name in OURS:
        command = _search(asked, OURS[name] or asked.space)
    else:
        command = [sys.executable, "-m", "benchmarks.curves.contest", "--data", "."]
        command += ["--study", name, json.dumps(dataclasses.asdict(asked))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    said = b""
    try:
        # Nothing after its time counts, not even how it ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=asked.seconds + 120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    lines = [json.loads(line) for file in Path(asked.folder).rglob("*.jsonl") for line in file.open()]
    points = sorted((line["time"] - began, line["val_js"]) for line in lines)
    if not points:
        raise RuntimeError(f"{name}: nothing was reported; it said: {said.decode()[-2000:]}")
    return [(seconds, js) for seconds, js in points if seconds <= asked.seconds]


def _search(asked: Contest, space: str) -> list[str]:
    """Return the command of a search of this project."""
    return [
        sys.executable, "-m", "raytune_emotion.search", "--data", asked.store, "--space", space, "--objective",
        "val_js per hour", "--trials", str(MANY), "--epochs", str(EPOCHS), "--seed", str(asked.seed), "--time-budget",
        f"{asked.seconds:g}s", "--results", asked.folder,
        # The portfolio is not used, because it was recorded on the faces of the contest.
        "--warm-start", "none",
    ]  # fmt: skip


def _random(asked: Contest) -> None:
    """Train random configurations to their end, one per core."""
    # Forked, so that they need not import everything again.
    processes = [get_context("fork").Process(target=_train_every, args=(asked, core)) for core in range(CORES)]
    for process in processes:
        process.start()
    time.sleep(asked.seconds)
    for process in processes:
        process.kill()


def _train_every(asked: Contest, core: int) -> None:
    torch.set_num_threads(1)
    for number, settings in enumerate(draw(_space(asked), MANY, asked.seed)):
        if number % CORES == core:
            for _ in _train(asked, settings):
                pass


def _optuna(asked: Contest) -> None:
    """Run Optuna's own sampler and Hyperband, in one process with both cores."""
    torch.set_num_threads(CORES)
    space = _space(asked)

    def objective(trial: optuna.Trial) -> float:
        best = 1.0
        for epoch, js in enumerate(_train(asked, space.suggest(trial)), start=1):
            best = min(best, js)
            trial.report(js, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return best

    pruner = HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=asked.seed), pruner=pruner)
    study.optimize(objective, timeout=asked.seconds)


def _define(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    return {"settings": space.suggest(trial)}


def _ray(asked: Contest) -> None:
    """Run a function trainable that reports every epoch, with `OptunaSearch`, `ASHAScheduler` and no other options."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    space = _space(asked)

    def trainable(config: dict[str, Any]) -> None:
        for js in _train(asked, config["settings"]):
            tune.report({"val_js": js})

    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    search = OptunaSearch(functools.partial(_define, space), metric="val_js", mode="min", seed=asked.seed)
    scheduler = ASHAScheduler(metric="val_js", mode="min", max_t=EPOCHS)
    config = tune.TuneConfig(
        search_alg=search,
        scheduler=scheduler,
        num_samples=MANY,
        time_budget_s=asked.seconds,
        max_concurrent_trials=CORES,
    )
    results = tune.RunConfig(storage_path=asked.folder, verbose=0)
    tune.Tuner(trainable, tune_config=config, run_config=results).fit()


RIVALS: dict[str, Callable[[Contest], None]] = {
    "random search": _random,
    "Optuna with Hyperband": _optuna,
    "OptunaSearch + ASHAScheduler": _ray,
}
#: Searches of this project, each with its space; None: that of the rivals.
OURS = {"raytune_emotion": None, "raytune_emotion with start points": str(SPACE)}


def _space(asked: Contest) -> Space:
    fixed = {"train.epochs": EPOCHS, "data.image_size": open_store(Path(asked.store)).image_size}
    return load_space(Path(asked.space), overrides={**fixed, "train.seed": asked.seed})


def _train(asked: Contest, settings: dict[str, Any]) -> Iterator[float]:
    """Yield the validation JS of every epoch, and log it. A diverging configuration ends."""
    file = Path(asked.folder) / f"{os.getpid()}.jsonl"
    with contextlib.suppress(Divergence):
        for report in fit(RunConfig.from_flat(settings), open_store(Path(asked.store)), device=torch.device("cpu")):
            with file.open("a") as lines:
                print(json.dumps({"time": report["time"], "val_js": report["val_js"]}), file=lines)
            yield report["val_js"]


def _best(points: list[tuple[float, float]], seconds: float) -> float:
    return min((js for at, js in points if at <= seconds), default=1.0)


def _table(found: dict[str, list[list[tuple[float, float]]]], seconds: float) -> Table:
    parts = (1 / 4, 1 / 2, 1)
    rows = []
    for name, studies in found.items():
        bests = np.array([[_best(points, part * seconds) for part in parts] for points in studies])
        first = float(np.mean([min((at for at, _ in points), default=seconds) for points in studies]))
        rows.append((name, first, *map(float, bests.mean(axis=0)), *map(float, bests[:, -1])))
    seeds = [f"seed {seed}" for seed in range(min(map(len, found.values())))]
    columns = ("study", "first report, s", "mean JS at 1/4 of the time", "at 1/2", "at the end", *seeds)
    notes = [
        f"Best validation JS, bits, of studies of {seconds:g} s on {CORES} cores, their start included.",
        "The first report is the mean time, since the start of a study, of its first validation.",
        "The start points were chosen on these faces.",
    ]
    return Table(columns, rows, notes)


def _draw(found: dict[str, list[list[tuple[float, float]]]], seconds: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    times = np.linspace(0, seconds, 300)
    colours = ("#c9b79c", "#7fb069", "#1f6f8b", "#d1495b", "#8d5a97")
    for (name, studies), colour in zip(found.items(), colours, strict=True):
        bests = np.array([[_best(points, at) for at in times] for points in studies])
        axes.plot(times, bests.mean(axis=0), color=colour, label=name, linewidth=2)
        axes.fill_between(times, bests.min(axis=0), bests.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    every = [points for studies in found.values() for points in studies]
    axes.set_ylim(min(_best(points, seconds) for points in every) - 0.005, 0.33)
    seeds = len(every) // len(found)
    axes.set(xlabel="seconds", ylabel="best validation JS, bits", title=f"Mean and range of {seeds} seeds")
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
