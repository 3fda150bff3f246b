"""Contain all uses of private interfaces of Optuna, each with its reason.

`tests/tuning/study/test_optuna_contract.py` names each of them.
"""

import contextlib
import weakref
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileOpenLock
from optuna.trial import FrozenTrial

from raytune_emotion.storage.json_text import load_json


def reopen(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return the handle of a trial that another process has asked for. `ask` gives handles only of new trials."""
    return optuna.Trial(study, trial._trial_id)


def stored_trial(trial: optuna.Trial) -> FrozenTrial:
    """Return a trial from the storage. The public interface lists all trials, and takes longer with each of them."""
    return trial.storage.get_trial(trial._trial_id)


def close_when_unused(storage: RDBStorage) -> RDBStorage:
    """Close the connections of a storage when it is no longer used. Optuna leaves them to the garbage collector."""
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def check_end(journal: Path) -> None:
    """Check the last line of a journal. Optuna ignores a damaged last line, and fails after the next line is written.

    Raises:
        ValueError: the line is complete, but not JSON.
    """
    content = journal.read_bytes()
    end = content.rfind(b"\n")
    if end > 0:
        load_json(content[content.rfind(b"\n", 0, end) + 1 : end])


def mend_journal(journal: Path) -> None:
    """Repair a journal after a process was killed. No other process may use it meanwhile.

    Optuna would wait for the lock of the killed process. A full disk, or a power cut, leaves an incomplete line. Optuna
    could read neither this line nor the text that is appended to it.
    """
    with contextlib.suppress(RuntimeError):
        JournalFileOpenLock(str(journal)).release()
    with contextlib.suppress(FileNotFoundError), journal.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
