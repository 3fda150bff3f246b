"""Publish the report of a study: fetch the models that it looks at, write it, and copy it to the study's location."""

from collections.abc import Sequence
from pathlib import Path

from raytune_emotion.learn.run_folder import BEST, PREDICTIONS
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.tuning.report.page import OPTIONAL, report_files, write_report
from raytune_emotion.tuning.study.confirmation import (
    CONFIRMED,
    RECORD_OF_CONFIRMATION,
    rank_confirmed,
    write_confirmed,
)
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import JOURNAL, expected_gain
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.remote_copy import join_pieces
from raytune_emotion.tuning.study.trials import ALL, DATA, PARAMS, trial_file


def publish_report(study: OpenStudy, records: list[TrialRecord]) -> list[str]:
    """Write the page of a study with its plots and tables, also at the study's location.

    Args:
        study: a search or a confirmation, opened to read it or to work on it.
        records: records of its trials.

    Returns:
        The trials of other configurations that may be as good as the best one; see `write_report`.

    Raises:
        UserError, Breakdown: the location cannot be read, or nothing can be written.
    """
    folder, place, spec = study.folder, study.copy.location, study.spec
    pull_for_report(place, folder, records)
    if spec.confirms is not None:
        write_confirmed(folder, rank_confirmed(spec, records))
    Folder(folder).delete(OPTIONAL)
    rivals = write_report(folder, spec, records, gain=expected_gain(study.optuna), place=place)
    place.push(folder, files := report_files(folder))
    place.delete(name for name in OPTIONAL if name not in files)
    return rivals


def pull_for_report(place: Location, folder: Path, records: Sequence[TrialRecord]) -> None:
    """Copy what a report needs into the folder of a study at a URI: models, and the record of its confirmation.

    The models are those of trials that have reported and not failed.

    Args:
        place: where the study lies.
        folder: in which this process works on it.
        records: of its trials.

    Raises:
        UserError, Breakdown: the place cannot be read.
    """
    if place.is_here(folder):
        return
    looked_at = {record.trial_id for record in records if record.counts}
    found = place.find(trial_file(ALL, BEST), *RECORD_OF_CONFIRMATION)
    confirmation = [name for name in found if name.startswith(f"{CONFIRMED}/")]
    trials = [Path(name).parent for name in found if name not in confirmation]
    models = [trial / name for trial in trials for name in (BEST, PREDICTIONS, DATA, PARAMS) if trial.name in looked_at]
    place.pull(folder, [*confirmation, *map(str, models)])
    join_pieces(folder, f"{CONFIRMED}/{JOURNAL}")
