"""A study's folder: what it was asked, what came of it, and the tables that people read.

The record is the Optuna journal (which trials there are, and how they ended) with the trials' own histories (what they
reported). The tables are made from it and may be made again at any time.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from raytune_emotion.data.store import is_store, open_store
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST, HISTORY, LAST, read_history
from raytune_emotion.learn.report import OBJECTIVE, Report
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import whole, write_text
from raytune_emotion.tuning.objective import OBJECTIVES, Objective, pareto_front
from raytune_emotion.tuning.searcher import Status, asked

SPEC = "study.yaml"
TRIALS = "trials.csv"
CURVES = "curves.parquet"
#: Tells a job, to which the code has come without its repository, the commit that it is of.
_COMMIT = "RAYTUNE_EMOTION_COMMIT"
#: Trials whose weights are kept when they have ended.
KEPT = 3

#: Settings that a study may change when it goes on, so that those which a trial was proposed with tell nothing of it.
_MAY_CHANGE = {"train.epochs", "model.weights_dir"}
_FIRST_COLUMNS = (
    "trial_id", "status", "epochs", "best_val_js", "val_js", "val_kl", "val_tvd", "val_mse", "val_emd", "seconds",
    "params_millions",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """The complete resolved configuration of a study, as `study.yaml` holds it."""

    name: str
    seed: int
    objective: str  # of `OBJECTIVES`
    trials: int
    epochs: int
    concurrency: int | None  # trials at once; None: as many as fit
    workers_per_trial: int
    gpus_per_worker: float | None  # None: one where there are GPUs
    max_failures: int  # of a trial's processes, before it is given up
    data: str  # what was given: a folder or a store
    stores: dict[int, str]  # image size, px: packed store
    fingerprints: dict[int, str]  # image size, px: hash of the store's content
    classes: tuple[str, ...]
    weights_dir: str | None
    space: dict[str, Any]  # the YAML space, whole
    baseline: dict[str, float]  # metrics of predicting the training mean
    confirms: dict[str, float] | None = None  # of a confirmation: trials of the study above it, and their best JS, bits

    def settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The complete settings of a trial, of which the space chose some."""
        own = {
            "data.image_size": chosen.get("data.image_size", min(self.stores)),
            "data.classes": list(self.classes),
            "train.epochs": self.epochs,
            "train.seed": self.seed if self.confirms is None else chosen["train.seed"],
        }
        return {**chosen, **own, **({"model.weights_dir": self.weights_dir} if self.weights_dir else {})}


def write_spec(folder: Path, spec: StudySpec) -> None:
    """Writes `study.yaml`, with the versions of what runs and the time of its beginning."""
    text = io.StringIO()
    before = YAML(typ="safe").load(folder / SPEC)["created"] if (folder / SPEC).exists() else None
    created = before or datetime.now(timezone.utc).isoformat(timespec="seconds")
    YAML().dump({**_plain(dataclasses.asdict(spec)), "created": created, **_surroundings()}, text)
    write_text(folder / SPEC, text.getvalue())


def read_spec(folder: Path) -> StudySpec:
    """Reads `study.yaml`.

    Raises:
        UserError: where it is missing or was damaged.
    """
    try:
        values = YAML(typ="safe").load(folder / SPEC)
        known = {field.name: values[field.name] for field in dataclasses.fields(StudySpec)}
        if known["objective"] not in OBJECTIVES:
            raise KeyError(known["objective"])
    except FileNotFoundError:
        raise UserError(f"{folder}: no {SPEC} in it, so it is no study; name a folder that a search has made") from None
    except OSError as error:
        raise UserError(
            f"{folder / SPEC}: cannot be read: {error.strerror}; name a folder of your own studies"
        ) from None
    except (YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SPEC}: damaged ({error}); restore it from a copy") from None
    known["classes"] = tuple(known["classes"])
    return StudySpec(**known)


def check_stores(spec: StudySpec, advice: str) -> None:
    """Whether the packed data of a study are where they were, and what they were.

    Raises:
        UserError: they are not; each fault ends with the advice.
    """
    faults: list[str] = []
    for size, path in spec.stores.items():
        if not is_store(path):
            faults.append(f"{path}: the packed data of the study are gone; {advice}")
        elif open_store(path).fingerprint != spec.fingerprints[size]:
            faults.append(f"{path}: has changed since the study began; {advice}")
    if faults:
        raise UserError(faults)


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One trial of a study, as recorded."""

    trial_id: str
    status: Status
    settings: dict[str, Any]  # those that the space chose
    reason: str
    reports: tuple[Report, ...]
    continues: str | None = None  # the trial that it went on from, whose reports are its own first
    confirms: str | None = None  # the trial of another study whose configuration it repeats

    @property
    def best(self) -> Report | None:
        """The report with the least validation JS."""
        return min(self.reports, key=lambda report: report["val_js"], default=None)


def trial_folder(study: Path, trial_id: str) -> Path:
    return study / "trials" / trial_id


@contextlib.contextmanager
def opened(study: Path | str, *patterns: str) -> Iterator[Path]:
    """The folder of a study; of one at a URI, a copy with the files of these patterns, gone when the block ends.

    Raises:
        UserError: there is no study at the URI; and what the block raises, in words of the URI.
    """
    if isinstance(study, Path):
        yield study
        return
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch:
        remote.check(study, write=False)
        folder = Path(scratch) / remote.name_of(study)
        remote.pull(study, folder, remote.names(study, SPEC, *patterns))
        try:
            if not (folder / SPEC).exists():
                raise UserError(f"{folder}: no {SPEC} in it, so it is no study; name one that a search has made")
            yield folder
        except UserError as error:
            raise UserError(fault.replace(str(folder), remote.shown(study)) for fault in error.faults) from None


def read_records(folder: Path, study: optuna.Study, known: Collection[str] = ()) -> list[TrialRecord]:
    """The trials of a study with their reports, in the order of their start, but for those that are known already."""
    return [
        TrialRecord(
            t.trial_id,
            t.status,
            t.settings,
            t.reason,
            tuple(read_history(trial_folder(folder, t.trial_id))),
            t.continues,
            t.confirms,
        )
        for t in asked(study)
        if t.trial_id not in known
    ]


def copy_checkpoint(source: Path, target: Path) -> None:
    """Lets the trial in one folder go on in another, which may hold an attempt at this that was cut short."""
    target.mkdir(parents=True, exist_ok=True)
    # The newest state comes last: a folder without it is a trial that has not begun.
    for name in (HISTORY, BEST, LAST):
        with whole(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def best_first(records: list[TrialRecord]) -> list[TrialRecord]:
    """The trials by their best validation JS; those without a report come last."""
    return sorted(records, key=lambda r: (r.best is None, r.best["val_js"] if r.best else 0.0, r.trial_id))


def frontier(records: list[TrialRecord], objective: Objective) -> list[TrialRecord]:
    """The Pareto front of JS and an objective's cost, the best JS first: no trial of less cost has bettered them."""
    cost = objective.cost or (lambda report: math.inf)
    return pareto_front(best_first(records), lambda record: cost(record.best) if record.best else math.inf)


def best_trial_id(folder: Path) -> str:
    """The best trial of a study, by its table.

    Raises:
        UserError: where there is no study, or no trial of it has reported.
    """
    try:
        table = pd.read_csv(folder / TRIALS, dtype={"trial_id": str})
    except (FileNotFoundError, pd.errors.EmptyDataError):
        raise UserError(f"{folder}: no {TRIALS} in it; name the folder of a study whose trials have begun") from None
    except OSError as error:
        raise UserError(f"{folder / TRIALS}: cannot be read: {error.strerror}; name the folder of a study") from None
    if table.empty or pd.isna(table[OBJECTIVE].iloc[0]):
        raise UserError(f"{folder}: no trial of this study has reported yet")
    return str(table["trial_id"].iloc[0])


def losers(records: list[TrialRecord], objective: Objective, spared: Collection[str] = ()) -> list[str]:
    """The ended trials whose weights go, lest a study's disk grow with its trials: but for the best, those of a front
    that the study is after, and the spared.
    """
    ended = [record for record in best_first(records) if record.status != "running"]
    front = {record.trial_id for record in frontier(ended, objective)} if objective.front else set()
    return [record.trial_id for record in ended[KEPT:] if record.trial_id not in {*front, *spared}]


def drop_checkpoints(folder: Path, trial_ids: Iterable[str]) -> None:
    """Deletes the weights of trials."""
    for trial_id in trial_ids:
        for file in trial_folder(folder, trial_id).glob("*.safetensors"):
            file.unlink()


def curves_of(records: Iterable[TrialRecord]) -> pd.DataFrame:
    """A row a report. It takes a tenth of the memory of the reports themselves."""
    return pd.DataFrame([{"trial_id": record.trial_id, **report} for record in records for report in record.reports])


def joined(*frames: pd.DataFrame) -> pd.DataFrame:
    """Rows of several frames. An empty one, which knows no types, would change those of the others."""
    return pd.concat([frame for frame in frames if len(frame)] or [pd.DataFrame()], ignore_index=True)


def thinned(record: TrialRecord) -> TrialRecord:
    """A trial with those of its reports alone that its rank and its row in the table need."""
    kept = [report for report in record.reports if report is record.best or report is record.reports[-1]]
    return dataclasses.replace(record, reports=tuple(kept))


def write_tables(folder: Path, records: list[TrialRecord], curves: pd.DataFrame | None = None) -> None:
    """Writes `trials.csv`, best trial first, and `curves.parquet`.

    Args:
        folder: of the study.
        records: of its trials; they may be thinned where `curves` are given.
        curves: of the same trials.
    """
    rows = [_row(record) for record in best_first(records)]
    table = pd.DataFrame(rows)
    rest = [column for column in table.columns if column not in _FIRST_COLUMNS]
    write_text(folder / TRIALS, table.reindex(columns=[*_FIRST_COLUMNS, *rest]).to_csv(index=False))
    with whole(folder / CURVES) as temporary:
        (curves_of(records) if curves is None else curves).to_parquet(temporary, index=False)


def _row(record: TrialRecord) -> dict[str, Any]:
    # The metrics beside the best JS are those of the same report, the one that the best checkpoint is from.
    best = dict(record.best or {})
    last = record.reports[-1] if record.reports else {}
    return {
        "trial_id": record.trial_id,
        "status": record.status,
        "epochs": last.get("epoch"),
        OBJECTIVE: best.get("val_js"),
        **{name: value for name, value in best.items() if name.startswith("val_")},
        "seconds": last.get("seconds"),
        "params_millions": last.get("params_millions"),
        "best_epoch": best.get("epoch"),
        "accumulate": last.get("accumulate"),
        **{name: value for name, value in record.settings.items() if name not in _MAY_CHANGE},
        "continues": record.continues,
        **({"confirms": record.confirms} if record.confirms else {}),
        "reason": record.reason,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _surroundings() -> dict[str, Any]:
    packages = ("raytune_emotion", "torch", "timm", "ray", "optuna", "numpy", "pyarrow", "pillow")
    return {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": os.environ.get(_COMMIT) or _commit(),
    }


def _commit() -> str | None:
    """Of the code that runs, with -dirty where it is another by now; none where it lies in no repository of its own."""
    here, git = Path(__file__), shutil.which("git")
    if git is None:
        return None

    def told(*arguments: str) -> str:
        command = [git, "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # The repository around it may be somebody else's, with the package in its environment.
    return (
        told("ls-files", here.name) and told("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    ) or None
