"""Name trials and their files, and find a trial by the id that the user typed."""

from collections.abc import Iterable
from pathlib import Path

from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.study.remote_copy import DRIVER

PARAMS = "params.json"
#: Stands for all trials in `trial_file`.
ALL = "*"
#: Largest number of trials that an error message lists. Of more, it names the first and the last.
_LISTED = 10
#: Length of the longest text that is read as the number of a trial.
_MOST_DIGITS = 100
#: Name of the file with the address of a trial's packed data. Its results depend only on these and the settings.
DATA = "data.txt"


def trial_file(trial_id: str, name: str) -> str:
    """Return the path of a trial's file, from the folder of its study."""
    return f"trials/{trial_id}/{name}"


def trial_folder(study: Path, trial_id: str) -> Path:
    return study / "trials" / trial_id


def trials_with(study: Location, name: str) -> list[str]:
    """List the ids of the trials that have a file of this name. The folder of the trials may be a link."""
    return [file.split("/")[0] for file in (study / "trials").find(f"{ALL}/{name}")]


def data_of(run: Path) -> str | None:
    """Return the address of the packed data of a run or of a trial; None if it was not written."""
    try:
        # Text that is not UTF-8 cannot be the address of a store.
        return (run / DATA).read_text(encoding="utf-8", errors="replace").strip() or None
    except (FileNotFoundError, IsADirectoryError):
        return None


def is_taken(run: Location) -> bool:
    """Tell whether the name of a run is taken. The lock file or the claim of a killed process does not count."""
    return run.exists() and not (run.follow_links().is_folder() and entries_of(run) <= {LOCK, DRIVER})


def entries_of(folder: Location) -> set[str]:
    """Return the names of the files, links and folders in a folder, also of empty ones."""
    return {*folder.list_folders(), *(file.name for file in folder.list_files())}


def refuse_taken(run: Location) -> None:
    """Refuse a new run of `train` if its name is taken.

    Raises:
        UserError: the name is taken.
    """
    if is_taken(run):
        found = "a run of this name exists already; continue it with --resume, or choose another --name"
        other = "this name is taken, but not by a run of train; choose another --name"
        raise UserError(f"{run}: {found if run.read(PARAMS) is not None else other}")


def trial_id_of(number: int) -> str:
    return f"{number:04d}"


def as_trial_id(text: str) -> str:
    """Convert a typed number to an id: `2` is `0002`. A number of many digits names no trial, and stays as it is."""
    return trial_id_of(int(text)) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else text


def find_trial(text: str, known: Iterable[str], study: object) -> str:
    """Return the id of a trial.

    Args:
        text: the typed id.
        known: ids of the study's trials.
        study: name of the study for messages.

    Raises:
        UserError: there is no such trial; the error names the existing ones.
    """
    known = sorted(filter(str.isdecimal, known), key=int)
    wanted = as_trial_id(text)
    if wanted not in known:
        raise UserError(f"{study}: no trial {text}; {describe_ids(known)}")
    return wanted


def describe_ids(ids: list[str]) -> str:
    """Say which trials exist, in order. Consecutive ones, and many with gaps, are named by the first and the last."""
    if not ids:
        return "no trial has begun"
    whole = [trial_id_of(number) for number in range(int(ids[0]), int(ids[0]) + len(ids))]
    if len(ids) > 2 and ids == whole:
        return f"there are {ids[0]} to {ids[-1]}"
    return f"there are {', '.join(ids)}" if len(ids) <= _LISTED else f"there are {len(ids)} from {ids[0]} to {ids[-1]}"
