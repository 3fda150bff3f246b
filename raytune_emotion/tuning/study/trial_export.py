"""Export the weights of a study's trials."""

from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST
from raytune_emotion.learn.export_folder import check_replaceable, export_checkpoint
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.study.records import trial_folder


def export_trial(study: Location, dest: Location, trial_id: str) -> None:
    """Export the best weights of a trial; an earlier export at dest is replaced.

    Raises:
        UserError: the study has no weights of that trial, or dest cannot be written.
    """
    kept = [name.split("/")[1] for name in study.find(f"trials/*/{BEST}")]
    if trial_id not in kept:
        those = (
            f"there are those of {', '.join(kept)}" if kept else "name the folder of a study whose trials have reported"
        )
        raise UserError(f"{study}: has no weights of trial {trial_id}, as only those of the best are kept; {those}")
    check_replaceable(dest)
    with study.copy_here(f"trials/{trial_id}/{BEST}") as folder, dest.publish() as package:
        notes = [f"Trial {trial_id} of the study {study.name}."]
        export_checkpoint(trial_folder(folder, trial_id) / BEST, package, notes)


def export_run(run: Location, dest: Location) -> None:
    """Export the best weights that a run of `train` has until now; an earlier export at dest is replaced.

    Raises:
        UserError: the run has not been evaluated yet, or dest cannot be written.
    """
    if run.sizes([BEST]) == [None]:
        raise UserError(f"{run}: the run has no evaluation yet; go on with it by train --resume --name {run.name}")
    check_replaceable(dest)
    with run.copy_here(BEST) as folder, dest.publish() as package:
        export_checkpoint(folder / BEST, package, [f"The run {run.name}."])
