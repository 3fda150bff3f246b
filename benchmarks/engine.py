"""Measure the cost of a trial beyond its training, here and with the recipe of the Ray documentation.

The recipe is a Tuner over a function that starts a TorchTrainer with Ray's TuneReportCallback. All variants train the
same configurations with the same `fit`, one after the other, for one epoch. With more epochs, the scheduler stops all
trials except the first. The placement groups that they leave in the cluster are counted.

Core-seconds are those of a control group of the kernel that contains a variant with its whole cluster. Sums over live
processes miss those that have ended, and the kernel's sums over children miss those of Ray's raylet, which waits for
none. They are read whenever a trial ends, beginning with a first one. Thus they do not contain the start of the cluster
and of the first processes, but everything that runs beside the trials. The core-seconds of one plain process that
trains the same configurations without Ray are subtracted.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from benchmarks import Table
from raytune_emotion.config import RunConfig
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.store import Store, open_store
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.report import OBJECTIVE
from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.job import Job, train_on
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.recorder import Event
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.study import open_study
from raytune_emotion.tuning.study.optuna_study import ENDED
from raytune_emotion.tuning.study.spec import StudySpec


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run trials."""

    workers: int
    warm: int  # number of trials before the measured ones
    trials: int  # number of measured trials in each run
    runs: int


VARIANTS = {
    "plain": Variant(1, 10, 40, 3),
    "engine-1": Variant(1, 10, 40, 3),
    "engine-2": Variant(2, 3, 20, 3),
    "recipe-1": Variant(1, 1, 4, 1),
    "recipe-2": Variant(2, 1, 4, 1),
}
#: Numbers of trials and epochs of the studies whose trials are stopped.
STOPPED_TRIALS, STOPPED_EPOCHS = 5, 3
SETTLED_S = 5.0


def run() -> Table:
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        store = str(tiny_store(Path(scratch)).path)
        folders = (Path(scratch) / str(number) for number in itertools.count())
        costs = {
            name: [
                _run_alone(name, variant.warm + variant.trials, 1, store, next(folders)) for _ in range(variant.runs)
            ]
            for name, variant in VARIANTS.items()
        }
        left = {
            name: _run_alone(name, STOPPED_TRIALS, STOPPED_EPOCHS, store, next(folders))
            for name in ("engine-2", "recipe-2")
        }
    training = statistics.median(cost["core_seconds"] for cost in costs["plain"])
    beyond = {name: [cost["core_seconds"] - training for cost in cost] for name, cost in costs.items()}
    rows = []
    for name, variant in list(VARIANTS.items())[1:]:
        median = statistics.median(beyond[name])
        recipe = statistics.median(beyond[f"recipe-{variant.workers}"])
        seconds = statistics.median(cost["seconds"] for cost in costs[name])
        stopped = [left[name][key] for key in ("stopped", "left", "left_later")] if name in left else ["", "", ""]
        spread = min(beyond[name]), max(beyond[name])
        rows.append((name, variant.workers, median, *spread, recipe / median, seconds, *stopped))
    columns = (
        "variant", "workers", "core-s a trial beyond training", "least", "most", "times less than the recipe",
        "s a trial", "trials stopped", "groups left at the end", f"after {SETTLED_S:g} s",
    )  # fmt: skip
    return Table(columns, rows, [f"The training itself takes {training:.3f} core-seconds a trial."])


def tiny_store(scratch: Path) -> Store:
    write_sample(scratch / "faces", train=96, val=33, image_size=32)
    return pack(scratch / "faces", scratch / "store", image_size=32)


def points(trials: int) -> list[dict[str, Any]]:
    """Return configurations of which a scheduler stops all except the first, the same for any number of trials."""
    return [
        {
            "optim.lr": 1e-6 if number else 3e-3,
            "optim.weight_decay": 0.01,
            "model.dropout": 0.1 + 0.1 * (number % 3),
            "loss.kl": 0.5,
            "loss.js": 0.5,
        }
        for number in range(trials)
    ]


def make_study(folder: Path, store: Store, *, trials: int, epochs: int, start: list[dict[str, Any]]) -> StudySpec:
    """Make a study of the smallest transformer, as a search does."""
    spec = StudySpec(
        name=folder.name,
        seed=0,
        objective="val_js",
        sampler="forecast",
        scheduler="asha",
        trials=trials,
        epochs=epochs,
        concurrency=1,
        workers_per_trial=1,
        gpus_per_worker=0.0,
        max_failures=0,
        data="",
        stores={store.image_size: str(store.path)},
        fingerprints={store.image_size: store.fingerprint},
        classes=EMOTIONS,
        weights_dir=None,
        space={
            "model.backbone": "test_vit",
            "model.dropout": {"uniform": [0.0, 0.4]},
            "optim.lr": {"log_uniform": [1e-6, 1e-2]},
            "optim.weight_decay": {"log_uniform": [1e-4, 0.3]},
            "loss": {"simplex": ["mse", "kl", "js"]},
            "start": start,
        },
        baseline={},
    )
    open_study.make_study(folder, spec)
    return spec


def _run_alone(name: str, trials: int, epochs: int, store: str, folder: Path) -> dict[str, float]:
    """Measure a variant in its own process and control group."""
    command = [sys.executable, "-m", "benchmarks.engine", name, str(trials), str(epochs), store, str(folder)]
    with _control_group() as group:
        inside = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
        done = subprocess.run(inside, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


@contextlib.contextmanager
def _control_group() -> Iterator[Path]:
    """Make a control group below this process's own."""
    group = _own_group() / f"raytune_emotion-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(
            f"{error}: core-seconds are read from a control group; run this as root, or by "
            "`systemd-run --user --scope --property Delegate=yes`"
        ) from None
    try:
        yield group
    finally:
        deadline = time.monotonic() + 60
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def _own_group() -> Path:
    """Return this process's control group, of version 1 or 2."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    controller = next((name for name in own if "cpuacct" in name.split(",")), "")
    return Path("/sys/fs/cgroup") / controller / own[controller].lstrip("/")


def _core_seconds() -> float:
    """Return the core-seconds of all processes that ever ran in this process's control group."""
    nanoseconds = _own_group() / "cpuacct.usage"
    if nanoseconds.exists():
        return int(nanoseconds.read_text()) / 1e9
    return int(dict(line.split() for line in (_own_group() / "cpu.stat").read_text().splitlines())["usage_usec"]) / 1e6


def _measure(name: str, trials: int, epochs: int, store: Store, folder: Path) -> dict[str, float]:
    """Run trials of a variant in this process; return their cost, the number of stopped ones, and leftover groups."""
    variant = VARIANTS[name]
    spec = make_study(folder, store, trials=trials, epochs=epochs, start=points(trials))
    resources = Resources(variant.workers, 1.0, 0.0)
    chosen = [{"model.backbone": spec.space["model.backbone"], **point} for point in spec.space["start"]]
    jobs = [
        Job(str(number), str(folder / str(number)), str(store.path), spec.settings(settings), resources)
        for number, settings in enumerate(chosen)
    ]
    ends: list[tuple[float, float]] = []

    def ended() -> None:
        ends.append((_core_seconds(), time.monotonic()))

    def watch(event: Event) -> None:
        if event.status in ENDED:
            ended()

    left: dict[str, float] = {}
    if name == "plain":
        torch.set_num_threads(resources.threads)
        for job in jobs:
            for _ in fit(RunConfig.from_flat(job.settings), store, device=torch.device("cpu"), folder=Path(job.folder)):
                pass
            ended()
    else:
        # Stopped trials of the recipe keep their cores: with cores for only one trial, it would wait for ever.
        places = trials if epochs > 1 else 1
        with ray_session(None, dashboard=False, num_cpus=variant.workers * places):
            if name.startswith("engine"):
                study = open_study.load(folder)
                run_study(StudyRun(study, Placement(resources, 1, limit=1), watch=watch))
                left["stopped"] = sum(record.status == "pruned" for record in study.records())
            else:
                left["stopped"] = _recipe(jobs, variant.workers, epochs, folder / "ray", ended)
            left["left"] = _placement_groups()
            time.sleep(SETTLED_S)
            left["left_later"] = _placement_groups()
    warm = min(variant.warm, trials - 1)
    (core_seconds, seconds), (core_seconds_then, seconds_then) = ends[-1], ends[warm - 1]
    return {
        "core_seconds": (core_seconds - core_seconds_then) / (trials - warm),
        "seconds": (seconds - seconds_then) / (trials - warm),
        **left,
    }


def _placement_groups() -> int:
    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


def _recipe(jobs: list[Job], workers: int, epochs: int, storage: Path, ended: Callable[[], None]) -> int:
    """Run jobs as in the Ray documentation; return how many the scheduler stopped."""

    def drive(config: dict[str, Any]) -> None:
        TorchTrainer(
            _recipe_worker,
            train_loop_config=config["job"],
            scaling_config=train.ScalingConfig(num_workers=workers),
            run_config=train.RunConfig(
                name=f"train-trial_id={tune.get_context().get_trial_id()}",
                storage_path=str(storage),
                callbacks=[TuneReportCallback()],  # type: ignore[list-item, no-untyped-call]
            ),
        ).fit()

    class Ended(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ended()

    # There is no scheduler if no trial is to be stopped: it would stop each at its last report, during its end.
    asha = ASHAScheduler("report", OBJECTIVE, "min", max_t=epochs, reduction_factor=3) if epochs > 1 else None
    results: Any = tune.Tuner(
        tune.with_resources(drive, {"node:__internal_head__": 0.001}),
        param_space={"job": tune.grid_search([job.to_dict() for job in jobs])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, scheduler=asha),
        run_config=tune.RunConfig(
            name="recipe",
            storage_path=str(storage),
            verbose=0,
            callbacks=[Ended()],
            # If another cluster runs on this machine, Ray Train may free the resources of live workers.
            failure_config=tune.FailureConfig(max_failures=3),
        ),
    ).fit()
    if results.errors:
        raise results.errors[0]
    return sum(not result.metrics["finished"] for result in results)


def _recipe_worker(values: dict[str, Any]) -> None:
    job = Job.from_dict(values)
    for report in train_on(job, torch.device("cpu"), first=train.get_context().get_world_rank() == 0):
        train.report(report)


if __name__ == "__main__":
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, trials, epochs, store, folder = sys.argv[1:]
    print(json.dumps(_measure(name, int(trials), int(epochs), open_store(Path(store)), Path(folder))))
