"""Run a study as the command `search` does, and load a study, also while it runs."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from raytune_emotion.config import RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.model import load_model
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.library.command import run_command
from raytune_emotion.library.models import EmotionModel
from raytune_emotion.storage.atomic import scratch_folder
from raytune_emotion.storage.locations import Location, location_of
from raytune_emotion.tuning.study.open_study import read_study
from raytune_emotion.tuning.study.records import winner
from raytune_emotion.tuning.study.request import name_study
from raytune_emotion.tuning.study.spec import StudySpec, spec_of
from raytune_emotion.tuning.study.tables import curves_of, trials_of
from raytune_emotion.tuning.study.trial_export import check_kept
from raytune_emotion.tuning.study.trials import trial_file, trial_folder

Place = str | os.PathLike[str] | Location


@dataclass(frozen=True)
class Study:
    """A study at the time of loading. Load it again to see later results."""

    location: Location
    spec: StudySpec = field(repr=False)
    trials: pd.DataFrame = field(repr=False)
    """One row per trial, best first, as in `trials.csv`: `trial_id`, `status`, `epochs`, `best_val_js` (bits), the
    other metrics of that evaluation, `seconds`, `params_millions`, …, and a column for each hyperparameter."""
    curves: pd.DataFrame = field(repr=False)
    """One row per evaluation, as in `curves.parquet`: `trial_id`, `epoch`, `val_js` (bits), `val_kl` (nats), …"""
    _best_id: str | None = field(repr=False)

    @property
    def best(self) -> "pd.Series[Any]":
        """Return the row of the best trial in `trials`.

        Raises:
            UserError: no trial has reported yet.
        """
        if self._best_id is None:
            raise UserError(f"{self.location}: no trial of this study has reported yet; load it again later")
        return self.trials[self.trials["trial_id"] == self._best_id].iloc[0]

    def model(self, trial_id: str | None = None) -> EmotionModel:
        """Load a trial's best weights, in evaluation mode: images [B, 3, H, W] in [0, 1] -> probabilities [B, K].

        Args:
            trial_id: id of the trial; None: the best one. A study keeps only the weights of its best trials.

        Raises:
            UserError: the study has no weights of that trial.
        """
        chosen = self.best["trial_id"] if trial_id is None else trial_id
        check_kept(self.location, chosen)
        with self.location.copy_here(trial_file(chosen, BEST)) as folder:
            best = read_best(trial_folder(folder, chosen) / BEST)
        config = RunConfig.from_flat(best.settings)
        model = EmotionModel(load_model(best), config.data.classes, config.data.image_size)
        return model.eval()


def load_study(path: Place) -> Study:
    """Load a study, also while it runs. It is read without a lock.

    Args:
        path: the study's folder, or its URI.

    Raises:
        UserError: there is no study, or it is damaged.
    """
    location = location_of(path)
    spec_of(location)  # if there is no study, its error names the nearest one
    with read_study(location) as study:
        records = study.records()
    best = winner(records)
    return Study(location, study.spec, trials_of(records), curves_of(records), best.trial_id if best else None)


def search(
    data: Place | None = None,
    space: str | os.PathLike[str] | Mapping[str, Any] = "quick",
    *,
    trials: int | None = None,
    epochs: int | None = None,
    objective: str | None = None,
    sampler: str | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    concurrency: int | None = None,
    workers_per_trial: int | None = None,
    gpus_per_worker: float | str | None = None,
    results: Place = "ray_results",
    name: str | None = None,
    resume: bool = False,
    storage: str | None = None,
    time_budget: str | None = None,
    until_gain: str | None = None,
    warm_start: Place | Sequence[Place] | None = None,
    max_failures: int | None = None,
    mlflow: str | None = None,
    weights_dir: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    address: str | None = None,
    finish: bool = False,
) -> Study:
    """Run a study by the command `python -m raytune_emotion.search` in a child process, and load it.

    Ray may run in this process, and several threads may search at once.

    Args:
        data: a folder in the layout of AffectNetFused, a table of faces, or a packed store; on a disk or at a URI.
            None: the built-in sample, or the data of the study that is resumed.
        space: name of a search space of the package, a YAML file, or the same as a mapping, such as
            `{"model.backbone": "resnet18", "optim.lr": {"log_uniform": [1e-4, 1e-2]}}`. Ignored when resuming.
        trials: total number of trials; None: 32.
        epochs: epochs of a full trial; None: the value of the space, else 20.
        objective: `val_js`, or one of the other objectives of the command.
        sampler: name of the sampler, as in the command.
        scheduler: name of the scheduler, as in the command.
        seed: seed of proposals and trials.
        concurrency: trials at once; None: as many as fit.
        workers_per_trial: processes that train one trial together.
        gpus_per_worker: a number or `auto`; None: one if there are GPUs.
        results: folder or URI in which the study's folder is made.
        name: name of the study; None: the space and the time. Give it to resume a study.
        storage: URL of a PostgreSQL database; all processes that call this with the same arguments share the study.
        resume: whether to continue the study of that name.
        time_budget: such as `90m`, `2h` or `1d`.
        until_gain: such as `0.001/h`: the search ends once further training is expected to gain less, bits per hour.
        warm_start: earlier study, or several, that guide the search; None: the portfolio of the package, if it fits
            the space; empty: nothing.
        max_failures: restarts of a trial whose process died, counted from 0 again after each new report.
        mlflow: address of an MLflow server to which the study is logged.
        weights_dir: folder with pretrained weights, for machines without access to the hub.
        skip_bad: whether faulty rows of a folder are left out; otherwise they are an error.
        address: address of a running Ray cluster, or `auto`: the cluster to which this process is connected, else one
            of this machine; None: start Ray here.
        finish: whether the study is then confirmed, its winner trained longer, and the best model exported.

    Returns:
        The study, as `load_study` loads it.

    Raises:
        UserError: a sentence for every error of the arguments, the data or the space.
        Breakdown: the study broke off; it can be resumed.
        KeyboardInterrupt: it was interrupted; it can be resumed.
    """
    if resume and name is None:
        raise UserError("name: expected the name of the study to resume, got None")
    with _space_file(space) as file:
        name = name_study(file) if name is None else name
        given: dict[str, Any] = {
            "data": data,
            "space": None if resume else file,
            "trials": trials,
            "epochs": epochs,
            "objective": objective,
            "sampler": sampler,
            "scheduler": scheduler,
            "seed": seed,
            "concurrency": concurrency,
            "workers-per-trial": workers_per_trial,
            "gpus-per-worker": gpus_per_worker,
            "results": results,
            "name": name,
            "storage": storage,
            "time-budget": time_budget,
            "until-gain": until_gain,
            "max-failures": max_failures,
            "mlflow": mlflow,
            "weights-dir": weights_dir,
            "address": address,
        }
        argv = [f"--{option}={_text(value)}" for option, value in given.items() if value is not None]
        argv += ["--resume"] if resume else []
        argv += ["--skip-bad"] if skip_bad else []
        argv += ["--finish"] if finish else []
        if isinstance(warm_start, str | os.PathLike | Location):
            warm_start = [warm_start]
        if warm_start is not None:
            argv += ["--warm-start", *(map(_text, warm_start) if warm_start else ["none"])]
        run_command("search", argv)
    return load_study(location_of(results) / name)


def _text(value: Any) -> str:
    return (
        value.address
        if isinstance(value, Location)
        else os.fspath(value)
        if isinstance(value, os.PathLike)
        else str(value)
    )


def _plain(value: Any) -> Any:
    """Return a value of a space as YAML has it."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextlib.contextmanager
def _space_file(space: str | os.PathLike[str] | Mapping[str, Any]) -> Iterator[Path]:
    if not isinstance(space, Mapping):
        yield Path(space)
        return
    with scratch_folder() as scratch:
        file = scratch / "space.yaml"
        try:
            YAML(typ="safe").dump(_plain(space), file)
        except YAMLError as error:
            raise UserError(f"space: {first_line(error)}; give texts, numbers, lists and dicts") from None
        except ValueError:  # Python does not write it
            raise UserError("space: a number has too many digits; give a smaller one") from None
        yield file
