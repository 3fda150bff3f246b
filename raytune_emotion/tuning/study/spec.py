"""Define the complete resolved configuration of a study, and keep it in `study.yaml`."""

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

#: Settings that may change when a study is resumed, so that a trial's proposal may have other values than its training.
CHANGEABLE = ("train.epochs", "model.weights_dir")

#: Largest number of studies that an error message lists.
_LISTED = 10
#: Environment variable with the commit of the code, for jobs that have the code without its repository.
_COMMIT = "RAYTUNE_EMOTION_COMMIT"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class StudySpec:
    """The complete resolved configuration of a study, as in `study.yaml`. Values are validated."""

    name: str
    seed: int = Field(ge=0)
    objective: str  # name in `OBJECTIVES`
    sampler: str  # name in `SAMPLERS`
    scheduler: str  # name in `SCHEDULERS`
    trials: int = Field(ge=0)
    epochs: int = Field(ge=1)
    concurrency: int | None = Field(ge=1)  # trials at once; None: as many as fit
    workers_per_trial: int = Field(ge=1)
    gpus_per_worker: float | None = Field(ge=0)  # None: one if there are GPUs
    max_failures: int = Field(ge=0)  # restarts of a trial's process between two new reports
    data: str  # as given: a folder or a store
    stores: dict[int, str] = Field(min_length=1)  # image size, px: packed store
    fingerprints: dict[int, str]  # image size, px: hash of the store's content
    classes: tuple[str, ...] = Field(min_length=2)
    weights_dir: str | None
    space: dict[str, Any]  # the whole YAML space
    baseline: dict[str, float]  # metrics of predicting the training mean
    confirms: dict[str, float] | None = None  # only of a confirmation: trials of the search with their best JS, bits
    storage: str | None = None  # address of the study in a database; None: its trials are in the journal

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for what, value, names in (
            ("objective", self.objective, OBJECTIVES),
            ("sampler", self.sampler, SAMPLERS),
            ("scheduler", self.scheduler, SCHEDULERS),
        ):
            if value not in names:
                raise ValueError(f"{what}: expected one of {', '.join(names)}, got {value!r}")
        if self.storage is not None:
            split_address(self.storage)
        if self.stores.keys() != self.fingerprints.keys():
            raise ValueError("stores and fingerprints have different image sizes")
        return self

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the complete settings of a trial from those that the space chose."""
        own = {
            "data.image_size": chosen.get("data.image_size", min(self.stores)),
            "data.classes": list(self.classes),
            "train.epochs": self.epochs,
            "train.seed": self.seed if self.confirms is None else chosen["train.seed"],
        }
        return {**chosen, **own, **({"model.weights_dir": self.weights_dir} if self.weights_dir else {})}

    def settings_now(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that the space chose for a trial, with their present values."""
        complete = self.settings(chosen)
        return {name: complete[name] for name in chosen}


def write_spec(folder: Path, spec: StudySpec) -> None:
    """Write `study.yaml`, with the versions of the packages and the time of its creation."""
    text = io.StringIO()
    before = (folder / SPEC).read_bytes() if (folder / SPEC).exists() else None
    created = created_at(before) or datetime.now(timezone.utc).isoformat(timespec="microseconds")
    YAML().dump({**_plain_values(dataclasses.asdict(spec)), "created": created, **_environment()}, text)
    write_text(folder / SPEC, text.getvalue())


def spec_of(study: Location) -> StudySpec:
    """Read the spec of a named study.

    Raises:
        UserError: there is no study, and the error suggests others; or its spec is damaged.
    """
    if study.read(SPEC) is None:
        what = f"not a study, because it has no {SPEC}" if study.exists() else "no such folder"
        if inside := subfolders_with(SPEC, study):
            raise UserError(f"{study}: {what}; choose one of the studies in it: {', '.join(inside)}")
        near = suggest_folder(study, SPEC) or "; name a folder that a search has made"
        raise UserError(f"{study}: {what}{near}")
    with study.copy_here(SPEC) as folder:
        return read_spec(folder)


def read_spec(folder: Path) -> StudySpec:
    """Read `study.yaml` in the folder of a study.

    Raises:
        UserError: it is missing or damaged, with a sentence for every wrong value.
    """
    file = folder / SPEC
    try:
        values = load_yaml(file.read_bytes(), pure=False)
        if not isinstance(values, dict):
            raise TypeError("not a mapping")
        fields = dataclasses.fields(StudySpec)
        names = [field.name for field in fields if field.name in values or field.default is not None]
        known: dict[str, Any] = {name: tuple(v) if isinstance(v := values[name], list) else v for name in names}
        return StudySpec(**known)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a study, because it has no {SPEC}; name a folder that a search has made"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; name a folder of your own studies") from None
    except ValidationError as error:
        raise UserError(
            f"{file}: damaged ({'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}, got {_excerpt(e['input'])}); "
            f"restore it from a copy"
            for e in error.errors()
        ) from None
    except KeyError as error:
        raise UserError(f"{file}: damaged (it has no {error.args[0]}); restore it from a copy") from None
    except (YAMLError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())  # errors of YAML have several lines
        raise UserError(f"{file}: damaged ({why}); restore it from a copy") from None


def subfolders_with(file: str, location: Location) -> list[str]:
    """List the names of the first subfolders that have a file of this name, at most `_LISTED`."""
    names = sorted(location.list_folders())
    found = zip(names, location.sizes(f"{name}/{file}" for name in names), strict=True)
    return [name for name, size in found if size is not None][:_LISTED]


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def created_at(text: bytes | None) -> object:
    """Return the creation time in a `study.yaml`, which distinguishes studies of the same name; None if unknown."""
    try:
        return load_yaml(text or b"", pure=False)["created"]
    except (YAMLError, KeyError, TypeError, ValueError):
        return None


def open_stores(spec: StudySpec, advice: str) -> dict[int, Store]:
    """Open the packed data of a study, and check that they are unchanged.

    Raises:
        UserError: they are missing or changed; each sentence ends with the advice.
    """
    faults: list[str] = []
    stores: dict[int, Store] = {}
    for size, path in spec.stores.items():
        if not is_store(path):
            faults.append(f"{path}: the packed data of the study are missing; {advice}")
            continue
        stores[size] = open_store(path, verify=True)
        if stores[size].fingerprint != spec.fingerprints[size]:
            faults.append(f"{path}: the packed data have changed since the study began; {advice}")
    if faults:
        raise UserError(faults)
    return stores


def find_store(spec: StudySpec, fingerprint: str, *, fetch: bool) -> Store | None:
    """Open the packed data of a study with this fingerprint; None if the study has none, or they are not available.

    Args:
        spec: spec of the study.
        fingerprint: fingerprint of the data, from a checkpoint.
        fetch: whether data at a URI are fetched if they are not in the cache of this machine.
    """
    size = next((size for size, known in spec.fingerprints.items() if known == fingerprint), None)
    if size is None:
        return None
    address = spec.stores[size]
    if not fetch:
        return open_if_here(address, size, fingerprint)
    store = open_store(address) if is_store(address) else None
    return store if store is not None and store.fingerprint == fingerprint else None


def _plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_values(item) for key, item in value.items()}
    return [_plain_values(item) for item in value] if isinstance(value, list | tuple) else value


def _environment() -> dict[str, Any]:
    packages = ("torch", "timm", "ray", "optuna", "numpy", "pyarrow", "pillow")
    # The package itself need not be installed; its folder on the path is sufficient.
    own = {"raytune_emotion": __version__}
    return {
        "python": platform.python_version(),
        "versions": own | {name: importlib.metadata.version(name) for name in packages},
        "git_commit": os.environ.get(_COMMIT) or _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the running code, with `-dirty` if it was edited; None outside of its own repository."""
    here, git = Path(__file__), shutil.which("git")
    if git is None:
        return None

    def ask_git(*arguments: str) -> str:
        command = [git, "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # The surrounding repository may be another project whose environment contains this package.
    return (
        ask_git("ls-files", here.name) and ask_git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    ) or None
