"""Use the private interfaces of Optuna, each for a reason: all such uses stand here.

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
    """Return the handle of a trial that was asked for by another process; `ask` gives handles of new trials alone."""
    return optuna.Trial(study, trial._trial_id)


def stored_trial(trial: optuna.Trial) -> FrozenTrial:
    """Return a trial as the storage has it; the public way lists all trials, and takes longer with each of them."""
    return trial.storage.get_trial(trial._trial_id)


def close_when_unused(storage: RDBStorage) -> RDBStorage:
    """Have a storage close its connections once nobody uses it; Optuna leaves them to the garbage collector."""
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def check_end(journal: Path) -> None:
    """Check the last line of a journal: Optuna reads on without a damaged one, and fails at the next that is written.

    Raises:
        ValueError: the line is whole, and no JSON.
    """
    content = journal.read_bytes()
    end = content.rfind(b"\n")
    if end > 0:
        load_json(content[content.rfind(b"\n", 0, end) + 1 : end])


def mend_journal(journal: Path) -> None:
    """Undo what a process that was killed has left in a journal. Nobody else may be at work on it.

    Optuna would wait for the lock that the process held. A full disk, or a power cut, leaves a torn line: with what is
    written behind it, Optuna could read neither.
    """
    with contextlib.suppress(RuntimeError):
        JournalFileOpenLock(str(journal)).release()
    with contextlib.suppress(FileNotFoundError), journal.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
