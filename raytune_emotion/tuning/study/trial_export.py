"""Export the weights of a study's trials."""

from collections.abc import Sequence
from pathlib import Path

from raytune_emotion.data.store import Store, open_if_here
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import Best, read_best
from raytune_emotion.learn.export_folder import TIMM, publish_export, write_package
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import shell_word, typed_command
from raytune_emotion.tuning.study.spec import StudySpec, find_store, spec_of
from raytune_emotion.tuning.study.trials import DATA, data_of, trial_file, trial_folder, trials_with


def check_kept(study: Location, trial_id: str) -> None:
    """Check that a study has the weights of a trial.

    Raises:
        UserError: it has none; the error lists the trials that have weights.
    """
    kept = trials_with(study, BEST)
    if trial_id not in kept:
        those = f"choose one of {', '.join(kept)}" if kept else "name the folder of a study whose trials have reported"
        raise UserError(f"{study}: no weights of trial {trial_id}, because only the best ones are kept; {those}")


def export_trial(study: Location, dest: Location, trial_id: str, formats: Sequence[str] = (TIMM,)) -> None:
    """Export the best weights of a trial, and replace an earlier export at dest.

    Raises:
        UserError: the study has no weights of that trial, dest cannot be written, or a format cannot be made.
    """
    check_kept(study, trial_id)
    wanted = (trial_file(trial_id, BEST), trial_file(trial_id, DATA))
    with publish_export(dest) as package, study.copy_here(*wanted) as folder:
        note = f"Trial {trial_id} of the study {study.name}."
        _write(package, trial_folder(folder, trial_id), note, formats, spec_of(study))


def export_run(run: Location, dest: Location, formats: Sequence[str] = (TIMM,)) -> None:
    """Export the best weights so far of a run of `train`, and replace an earlier export at dest.

    Raises:
        UserError: the run has not been evaluated yet, dest cannot be written, or a format cannot be made.
    """
    if run.sizes([BEST]) == [None]:
        command = f"{typed_command('train')} --resume --name {shell_word(run.name)}"
        raise UserError(f"{run}: the run has no evaluation yet; continue it with {command}, and its --results")
    with publish_export(dest) as package, run.copy_here(BEST, DATA) as folder:
        _write(package, folder, f"The run {run.name}.", formats)


def _write(dest: Path, run: Path, note: str, formats: Sequence[str], spec: StudySpec | None = None) -> None:
    best = read_best(run / BEST)
    write_package(dest, best, [note], formats=formats, store=store_of(run, best, spec))


def store_of(run: Path, best: Best, spec: StudySpec | None = None) -> Store | None:
    """Return the packed data of a run or a trial; None if they are not on this machine.

    Args:
        run: folder of the run.
        best: its checkpoint.
        spec: spec of its study, which says where the data are if they were moved after the training.
    """
    address, size = data_of(run), best.settings["data.image_size"]
    store = open_if_here(address, size, best.fingerprint) if address is not None else None
    return find_store(spec, best.fingerprint, fetch=False) if store is None and spec is not None else store
