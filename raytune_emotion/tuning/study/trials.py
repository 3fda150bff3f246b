"""Name trials and the files of one, and find the trial that somebody means."""

from collections.abc import Iterable
from pathlib import Path

from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import is_taken

PARAMS = "params.json"
#: Number of trials that an error message lists; of more it says the first and the last.
_LISTED = 10
#: The packed data that a trial trains on; with its settings, all that its numbers depend on.
DATA = "data.txt"


def data_of(run: Path) -> str | None:
    """Return the address of the packed data of a run, or of a trial; None where it has not been written."""
    try:
        # Text that is not UTF-8 names no store.
        return (run / DATA).read_text(encoding="utf-8", errors="replace").strip() or None
    except (FileNotFoundError, IsADirectoryError):
        return None


def refuse_taken(run: Path) -> None:
    """Refuse a new run of `train` where there is one of its name.

    Raises:
        UserError: there is.
    """
    if is_taken(run):
        found = "a run of this name already; go on with it by --resume, or choose --name"
        other = "something of this name that is no run of train; choose --name"
        raise UserError(f"{run}: there is {found if (run / PARAMS).exists() else other}")


def trial_id_of(number: int) -> str:
    return f"{number:04d}"


def as_trial_id(text: str) -> str:
    """Return what was said as an id: `2` is `0002`."""
    return trial_id_of(int(text)) if text.isascii() and text.isdigit() else text


def find_trial(text: str, known: Iterable[str], study: object) -> str:
    """Return the id of a trial.

    Args:
        text: what was said.
        known: the ids of the study's trials.
        study: a name for it in messages.

    Raises:
        UserError: there is no such trial; the sentence names those that there are.
    """
    known = sorted(filter(str.isdecimal, known), key=int)
    wanted = as_trial_id(text)
    if wanted not in known:
        raise UserError(f"{study}: there is no trial {text}; {describe_ids(known)}")
    return wanted


def describe_ids(ids: list[str]) -> str:
    """Say which trials there are, in their order; a row of them by its ends, as well as many with gaps."""
    if not ids:
        return "no trial has begun"
    whole = [trial_id_of(number) for number in range(int(ids[0]), int(ids[0]) + len(ids))]
    if len(ids) > 2 and ids == whole:
        return f"there are {ids[0]} to {ids[-1]}"
    return f"there are {', '.join(ids)}" if len(ids) <= _LISTED else f"there are {len(ids)} from {ids[0]} to {ids[-1]}"
