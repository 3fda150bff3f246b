"""Represent a request for a search or a confirmation; None stands for options that are not given."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from raytune_emotion.errors import UserError, collect_errors, suggest
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.decisions import FORECAST, FREEZE_THAW, default_scheduler
from raytune_emotion.tuning.policy.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from raytune_emotion.tuning.space.library import DEFAULT, find_space
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.database import check_database
from raytune_emotion.tuning.study.remote_copy import DRIVER
from raytune_emotion.tuning.study.spec import SPEC, subfolders_with

#: Value of `--gpus-per-worker` for a measurement of the fastest share.
AUTO = "auto"
#: Value of `--warm-start` for no guidance, not even by the portfolio.
NONE = "none"
DEFAULT_TRIALS = 32
DEFAULT_EPOCHS = 20
#: Largest number of characters of a space's name in a study's name. Folder names have at most 255 bytes, in any script.
_LONGEST = 50


@dataclass(frozen=True)
class SearchRequest:
    """A request for a search. The names are those of the options."""

    results: Location
    data: Location | None = None
    space: Path | None = None
    objective: str | None = None
    sampler: str | None = None
    scheduler: str | None = None
    trials: int | None = None
    epochs: int | None = None
    concurrency: int | None = None
    workers_per_trial: int | None = None
    gpus_per_worker: float | str | None = None  # a number, or `AUTO`
    warm_start: list[Location | str] | None = None  # earlier studies, or `NONE`
    name: str | None = None
    resume: bool = False
    storage: str | None = None  # URL of the database that the drivers of the study share
    seed: int | None = None
    time_budget: timedelta | None = None
    until_gain: float | None = None  # bits per hour
    max_failures: int | None = None
    mlflow: str | None = None
    weights_dir: Path | None = None
    skip_bad: bool = False
    address: str | None = None
    finish: bool = False
    dry_run: bool = False

    @property
    def gpu_share(self) -> float | None:
        """Return the GPUs per worker; None if no number is given, or if the share will be measured."""
        return self.gpus_per_worker if isinstance(self.gpus_per_worker, float) else None

    @property
    def space_file(self) -> Path:
        return self.space or find_space(DEFAULT)

    def load_space(self) -> Space:
        """Read the space of a new study, with the settings from the command line.

        Raises:
            UserError: all errors of the file.
        """
        given = {
            "train.epochs": self.epochs,
            "train.seed": self.seed,
            "model.weights_dir": absolute_path(self.weights_dir),
        }
        given = {key: value for key, value in given.items() if value is not None}
        fixed = load_space(self.space_file, overrides=given).fixed_settings
        settled: dict[str, Any] = {"train.epochs": fixed.get("train.epochs", DEFAULT_EPOCHS)}
        if "train.seed" in fixed:
            settled["train.seed"] = fixed["train.seed"]
        if fixed.get("model.weights_dir") is not None:
            # Trials run in other folders than this one.
            settled["model.weights_dir"] = absolute_path(Path(fixed["model.weights_dir"]))
        return load_space(self.space_file, overrides=settled)

    @property
    def earlier_studies(self) -> list[Location]:
        """Return the studies that guide the search."""
        return [each for each in self.warm_start or [] if isinstance(each, Location)]

    def check_warm_start(self) -> None:
        """Check that `--warm-start` names either studies or `NONE`, and that something uses the studies.

        Raises:
            UserError: it names both, or neither the sampler nor the scheduler uses earlier studies.
        """
        sampler = self.sampler or FORECAST
        scheduler = self.scheduler or default_scheduler(sampler)
        if self.earlier_studies and sampler != FORECAST and scheduler != FREEZE_THAW:
            raise UserError(
                f"--warm-start: neither the sampler {sampler} nor the scheduler {scheduler} uses earlier studies; "
                f"leave it out, or use --sampler {FORECAST} or --scheduler {FREEZE_THAW}"
            )
        if 0 < len(self.earlier_studies) < len(self.warm_start or []):
            raise UserError(
                f"--warm-start: {NONE!r} cannot be combined with studies; leave one of them out (a folder of this "
                f"name: ./{NONE})"
            )

    def check_until_gain(self, objective: str) -> None:
        """Check that the objective has an expected gain, if the search ends by one.

        Raises:
            UserError: it has none.
        """
        if self.until_gain is not None and OBJECTIVES[objective].front:
            raise UserError(
                f"--until-gain: a gain is only defined for the JS alone, not for a front ({objective!r}); leave the "
                f"option out, or search for {DEFAULT_OBJECTIVE!r}"
            )

    def joins(self, place: Location) -> bool:
        """Tell whether another driver has already made the study, so that this one joins it."""
        return self.storage is not None and place.read(SPEC) is not None

    def check_storage(self) -> None:
        """Check that drivers on several machines find the study and the shared database, if there is one.

        Raises:
            UserError: all errors.
        """
        if self.storage is None:
            return
        faults: list[str] = []
        with collect_errors(faults):
            self.results.require_folder("with --storage, name a folder that every driver can access")
        if self.name is None:
            faults.append("--storage: drivers find their study by its name; give one with --name")
        if self.finish:
            faults.append(
                "--finish: only one process can finish a study; leave it out, and at the end type --resume --finish "
                "without --storage"
            )
        with collect_errors(faults):
            check_database(self.storage)
        if faults:
            raise UserError(faults)

    def find_study(self) -> Location:
        """Return the location of the study, new or to resume.

        Raises:
            UserError: there is no such study to resume; the location cannot be read.
        """
        if not self.resume:
            return self.results / (self.name or name_study(self.space_file))
        self.results.check(write=True)
        name = self.name or self.results.newest(SPEC)
        if name is None:
            raise UserError(f"{self.results}: contains no study to resume; name its folder with --results")
        study = self.results / name
        if study.read(SPEC) is None:
            if study.exists():
                if study.can_be_built(DRIVER, SPEC):
                    raise UserError(f"{study}: its search broke off before there was a study; leave --resume out")
                raise UserError(f"{study}: not a study, because it has no {SPEC}; name its folder with --results")
            others = subfolders_with(SPEC, self.results)
            advice = f"; choose one of {', '.join(others)}" if others else "; name its folder with --results"
            raise UserError(f"{study}: no study of this name to resume{suggest(name, others) or advice}")
        return study


@dataclass(frozen=True)
class ConfirmRequest:
    """A request for a confirmation. None stands for the value of the search."""

    study: Location
    top: int = 3
    seeds: int = 5
    concurrency: int | None = None
    workers_per_trial: int | None = None
    gpus_per_worker: float | None = None
    address: str | None = None


def name_study(space: Path) -> str:
    """Name a new study by the file of its space and the time. The result is always valid for `--name`.

    The time has microseconds, because two searches may start at once.
    """
    stem = re.sub(r"[^\w.=,+-]", "_", space.stem).lstrip(".=,+-")[:_LONGEST]
    return f"{stem or 'study'}_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"


def absolute_path(path: Path | None) -> str | None:
    return str(path.expanduser().absolute()) if path is not None else None
