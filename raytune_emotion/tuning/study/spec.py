"""Hold the complete resolved configuration of a study, and keep it in `study.yaml`."""

import dataclasses
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from typing_extensions import Self

from raytune_emotion import __version__
from raytune_emotion.data.store import Store, is_store, open_if_here, open_store
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Location
from raytune_emotion.storage.nearest import suggest_folder
from raytune_emotion.storage.yaml_text import load_yaml
from raytune_emotion.tuning.policy.decisions import SAMPLERS, SCHEDULERS
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.study.database import split_address

SPEC = "study.yaml"

#: Settings that may change when a study goes on: a trial's proposal does not tell what it was trained with.
CHANGEABLE = ("train.epochs", "model.weights_dir")

#: Number of studies that an error message lists.
_LISTED = 10
#: Environment variable with the commit of the code, for jobs that have the code without its repository.
_COMMIT = "RAYTUNE_EMOTION_COMMIT"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class StudySpec:
    """Hold the complete resolved configuration of a study, as in `study.yaml`. Values are validated."""

    name: str
    seed: int = Field(ge=0)
    objective: str  # of `OBJECTIVES`
    sampler: str  # of `SAMPLERS`
    scheduler: str  # of `SCHEDULERS`
    trials: int = Field(ge=0)
    epochs: int = Field(ge=1)
    concurrency: int | None = Field(ge=1)  # trials at once; None: as many as fit
    workers_per_trial: int = Field(ge=1)
    gpus_per_worker: float | None = Field(ge=0)  # None: one where there are GPUs
    max_failures: int = Field(ge=0)  # of a trial's processes, between two reports, before it is given up
    data: str  # what was given: a folder or a store
    stores: dict[int, str] = Field(min_length=1)  # image size, px: packed store
    fingerprints: dict[int, str]  # image size, px: hash of the store's content
    classes: tuple[str, ...] = Field(min_length=2)
    weights_dir: str | None
    space: dict[str, Any]  # the YAML space, whole
    baseline: dict[str, float]  # metrics of predicting the training mean
    confirms: dict[str, float] | None = None  # of a confirmation: trials of the study above it, and their best JS, bits
    storage: str | None = None  # address of the study in a database; None: its trials are in the journal

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for what, value, names in (
            ("objective", self.objective, OBJECTIVES),
            ("sampler", self.sampler, SAMPLERS),
            ("scheduler", self.scheduler, SCHEDULERS),
        ):
            if value not in names:
                raise ValueError(f"{what} is one of {', '.join(names)}, got {value!r}")
        if self.storage is not None:
            split_address(self.storage)
        if self.stores.keys() != self.fingerprints.keys():
            raise ValueError("stores and fingerprints are of other image sizes")
        return self

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the complete settings of a trial, given those that the space chose."""
        own = {
            "data.image_size": chosen.get("data.image_size", min(self.stores)),
            "data.classes": list(self.classes),
            "train.epochs": self.epochs,
            "train.seed": self.seed if self.confirms is None else chosen["train.seed"],
        }
        return {**chosen, **own, **({"model.weights_dir": self.weights_dir} if self.weights_dir else {})}

    def settings_now(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the space chose for a trial, with the values that it is trained with now."""
        complete = self.settings(chosen)
        return {name: complete[name] for name in chosen}


def write_spec(folder: Path, spec: StudySpec) -> None:
    """Write `study.yaml`, with the versions of what runs and the time of its beginning."""
    text = io.StringIO()
    before = (folder / SPEC).read_bytes() if (folder / SPEC).exists() else None
    created = created_at(before) or datetime.now(timezone.utc).isoformat(timespec="seconds")
    YAML().dump({**_plain_values(dataclasses.asdict(spec)), "created": created, **_environment()}, text)
    write_text(folder / SPEC, text.getvalue())


def spec_of(study: Location) -> StudySpec:
    """Read the spec of a study that somebody names.

    Raises:
        UserError: there is no study, and the sentence names the nearest; or its spec is damaged.
    """
    if study.read(SPEC) is None:
        what = f"no {SPEC} in it, so it is no study" if study.exists() else "there is no such folder"
        if inside := studies_in(study):
            raise UserError(f"{study}: {what}; there are studies in it: {', '.join(inside)}")
        near = suggest_folder(study, SPEC) or "; name a folder that a search has made"
        raise UserError(f"{study}: {what}{near}")
    with study.copy_here(SPEC) as folder:
        return read_spec(folder)


def read_spec(folder: Path) -> StudySpec:
    """Read `study.yaml` in the folder of a study.

    Raises:
        UserError: it is missing, or damaged: with a sentence for every value that is wrong.
    """
    file = folder / SPEC
    try:
        values = load_yaml(file.read_bytes(), pure=False)
        if not isinstance(values, dict):
            raise TypeError("no names with values")
        fields = dataclasses.fields(StudySpec)
        names = [field.name for field in fields if field.name in values or field.default is not None]
        known: dict[str, Any] = {name: tuple(v) if isinstance(v := values[name], list) else v for name in names}
        return StudySpec(**known)
    except FileNotFoundError:
        raise UserError(f"{folder}: no {SPEC} in it, so it is no study; name a folder that a search has made") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; name a folder of your own studies") from None
    except ValidationError as error:
        raise UserError(
            f"{file}: damaged ({'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}, got {_excerpt(e['input'])}); "
            f"restore it from a copy"
            for e in error.errors()
        ) from None
    except KeyError as error:
        raise UserError(f"{file}: damaged (it names no {error.args[0]}); restore it from a copy") from None
    except (YAMLError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())  # of YAML it has several lines
        raise UserError(f"{file}: damaged ({why}); restore it from a copy") from None


def studies_in(results: Location) -> list[str]:
    """List the names of the studies in a folder or at a URI; of many, the first."""
    names = sorted(results.list_folders())
    found = zip(names, results.sizes(f"{name}/{SPEC}" for name in names), strict=True)
    return [name for name, size in found if size is not None][:_LISTED]


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def created_at(text: bytes | None) -> object:
    """Return when the study of a `study.yaml` began, which tells it from another one of its name; None if unknown."""
    try:
        return load_yaml(text or b"", pure=False)["created"]
    except (YAMLError, KeyError, TypeError, ValueError):
        return None


def open_stores(spec: StudySpec, advice: str) -> dict[int, Store]:
    """Open the packed data of a study, which are still there, and unchanged.

    Raises:
        UserError: they are not; each sentence ends with the advice.
    """
    faults: list[str] = []
    stores: dict[int, Store] = {}
    for size, path in spec.stores.items():
        if not is_store(path):
            faults.append(f"{path}: the packed data of the study are gone; {advice}")
            continue
        stores[size] = open_store(path, verify=True)
        if stores[size].fingerprint != spec.fingerprints[size]:
            faults.append(f"{path}: has changed since the study began; {advice}")
    if faults:
        raise UserError(faults)
    return stores


def find_store(spec: StudySpec, fingerprint: str, *, fetch: bool) -> Store | None:
    """Open the packed data of a study that have a fingerprint; None where it has none such, or they are away.

    Args:
        spec: of the study.
        fingerprint: of the data, as a checkpoint names it.
        fetch: whether data at a URI are fetched if the cache of this machine has them not.
    """
    size = next((size for size, known in spec.fingerprints.items() if known == fingerprint), None)
    if size is None:
        return None
    address = spec.stores[size]
    if not fetch:
        store = open_if_here(address, size, fingerprint)
    else:
        store = open_store(address) if is_store(address) else None
    return store if store is not None and store.fingerprint == fingerprint else None


def _plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_values(item) for key, item in value.items()}
    return [_plain_values(item) for item in value] if isinstance(value, list | tuple) else value


def _environment() -> dict[str, Any]:
    packages = ("torch", "timm", "ray", "optuna", "numpy", "pyarrow", "pillow")
    # The package itself need not be installed: its folder on the path is enough.
    own = {"raytune_emotion": __version__}
    return {
        "python": platform.python_version(),
        "versions": own | {name: importlib.metadata.version(name) for name in packages},
        "git_commit": os.environ.get(_COMMIT) or _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the code that runs, with `-dirty` if it was edited; None outside a repository of its own."""
    here, git = Path(__file__), shutil.which("git")
    if git is None:
        return None

    def ask_git(*arguments: str) -> str:
        command = [git, "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # The repository around it may be somebody else's, with the package in its environment.
    return (
        ask_git("ls-files", here.name) and ask_git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    ) or None
