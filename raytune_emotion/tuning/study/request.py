"""Hold what the command line asks of a search or a confirmation. None stands for what it leaves open."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from raytune_emotion.errors import UserError, collect_errors, suggest
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from raytune_emotion.tuning.space.library import DEFAULT, find_space
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.database import check_database
from raytune_emotion.tuning.study.remote_copy import DRIVER
from raytune_emotion.tuning.study.spec import SPEC, studies_in

#: Said in place of a number of GPUs: what is fastest is tried out.
AUTO = "auto"
#: Said in place of earlier studies: not even the portfolio guides the search.
NONE = "none"
DEFAULT_TRIALS = 32
DEFAULT_EPOCHS = 20
#: Characters of a space's name in that of a study: names of folders have at most 255 bytes, also in other scripts.
_LONGEST = 50


@dataclass(frozen=True)
class SearchRequest:
    """What a search is to do; the names are those of the options."""

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
    storage: str | None = None  # URL of the database that drivers of the study share
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
        """Return the GPUs of a worker; None if none are named, or if they are to be found out."""
        return self.gpus_per_worker if isinstance(self.gpus_per_worker, float) else None

    @property
    def space_file(self) -> Path:
        return self.space or find_space(DEFAULT)

    def load_space(self) -> Space:
        """Read the space of a new study, with what the command line says of its settings.

        Raises:
            UserError: with every error of the file.
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
        """Return the studies that are to guide the search."""
        return [each for each in self.warm_start or [] if isinstance(each, Location)]

    def check_warm_start(self) -> None:
        """Check that studies are to guide the search, or nothing is.

        Raises:
            UserError: both are asked for.
        """
        if 0 < len(self.earlier_studies) < len(self.warm_start or []):
            raise UserError(f"--warm-start: {NONE!r} stands alone; leave it out, or the studies (a folder: ./{NONE})")

    def check_until_gain(self, objective: str) -> None:
        """Check that a gain can be expected of a study with this objective, if the search ends by one.

        Raises:
            UserError: it cannot.
        """
        if self.until_gain is not None and OBJECTIVES[objective].front:
            raise UserError(
                f"--until-gain: is a gain in JS alone, and {objective!r} asks for a front; leave the option out, or "
                f"search for {DEFAULT_OBJECTIVE!r}"
            )

    def joins(self, place: Location) -> bool:
        """Tell whether another driver has made the study, which this one is to work on with it."""
        return self.storage is not None and place.read(SPEC) is not None

    def check_storage(self) -> None:
        """Check that drivers on several machines find the study, and reach the database that they share, if any.

        Raises:
            UserError: with every error.
        """
        if self.storage is None:
            return
        faults: list[str] = []
        with collect_errors(faults):
            self.results.require_folder("with --storage, name a folder that every driver sees")
        if self.name is None:
            faults.append("--storage: drivers find their study by its name; give one with --name")
        if self.finish:
            faults.append(
                "--finish: is the work of one process; leave it out, and in the end type --resume --finish without "
                "--storage"
            )
        with collect_errors(faults):
            check_database(self.storage)
        if faults:
            raise UserError(faults)

    def find_study(self) -> Location:
        """Return where the study lies: a new one's place, or that of one that goes on.

        Raises:
            UserError: there is no such study to go on with; the place cannot be read.
        """
        if not self.resume:
            return self.results / (self.name or name_study(self.space_file))
        self.results.check(write=True)
        name = self.name or self.results.newest(SPEC)
        if name is None:
            raise UserError(f"{self.results}: there is no study in it to resume; name its folder with --results")
        study = self.results / name
        if study.read(SPEC) is None:
            if study.exists():
                if study.can_be_built(DRIVER, SPEC):
                    raise UserError(f"{study}: its search broke off before there was a study; leave --resume out")
                raise UserError(f"{study}: no {SPEC} in it, so it is no study; name its folder with --results")
            others = studies_in(self.results)
            advice = f"; there are {', '.join(others)}" if others else "; name its folder with --results"
            raise UserError(f"{study}: there is no study of this name to resume{suggest(name, others) or advice}")
        return study


@dataclass(frozen=True)
class ConfirmRequest:
    """What a confirmation is to do. None stands for what the search had."""

    study: Location
    top: int = 3
    seeds: int = 5
    concurrency: int | None = None
    workers_per_trial: int | None = None
    gpus_per_worker: float | None = None
    address: str | None = None


def name_study(space: Path) -> str:
    """Name a new study by the file of its space and the time; `--name` takes it whatever the file is called."""
    stem = re.sub(r"[^\w.=,+-]", "_", space.stem).lstrip(".=,+-")[:_LONGEST]
    return f"{stem or 'study'}_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def absolute_path(path: Path | None) -> str | None:
    return str(path.expanduser().absolute()) if path is not None else None
