"""Export several trials of a study as one model: an ensemble, or the mean of their weights."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_emotion.learn.checkpoint import Best
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.export_folder import (
    TIMM,
    FormatError,
    publish_export,
    write_ensemble_package,
    write_package,
)
from raytune_emotion.learn.run_folder import BEST, PREDICTIONS
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import warn
from raytune_emotion.tuning.study.combination import (
    Candidates,
    Combination,
    combine_ensemble,
    combine_soup,
    list_kept,
    read_candidates,
)
from raytune_emotion.tuning.study.open_study import OpenStudy, read_study
from raytune_emotion.tuning.study.spec import find_store
from raytune_emotion.tuning.study.trials import ALL, trial_file

#: Files of a study that are combined.
_WEIGHTS = (trial_file(ALL, BEST), trial_file(ALL, PREDICTIONS))


def export_ensemble(study: Location, dest: Location, most: int, formats: Sequence[str]) -> Combination:
    """Export an ensemble of a study's trials as one model, and replace an earlier export at dest.

    The weights of its members, which `predict` loads, are always among the files.

    Args:
        study: location of the study.
        dest: location to write.
        most: largest number of members.
        formats: beside the weights; empty: pt2 or, if that cannot be made, none, with a warning.

    Raises:
        UserError: there is nothing to combine, dest cannot be written, or a format in `formats` cannot be made.
    """
    with publish_export(dest) as package, read_study(study, *_WEIGHTS) as read:
        chosen = combine_ensemble(_candidates(read), most)
        try:
            write_ensemble(package, chosen, study.name, formats or ["pt2"])
        except FormatError as error:
            if formats or error.format == TIMM:
                raise
            why = f"{error.reason}, so only the weights are exported"
            warn(why)
            write_ensemble(package, chosen, study.name, [], [f"{why}."])
    return chosen


def export_soup(study: Location, dest: Location, formats: Sequence[str]) -> Combination:
    """Export the mean weights of a study's trials, and replace an earlier export at dest.

    Raises:
        UserError: there is nothing to combine, dest cannot be written, or a format cannot be made.
    """
    with publish_export(dest) as package, read_study(study, *_WEIGHTS) as read:
        chosen, best = combine_soup(_candidates(read), find_device(read.spec.gpus_per_worker))
        write_soup(package, chosen, best, study.name, formats)
    return chosen


def write_ensemble(
    dest: Path,
    chosen: Combination,
    study: str,
    formats: Sequence[str],
    notes: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the export folder of an ensemble; a lone member is exported as a single model.

    Args:
        dest: the folder.
        chosen: the members.
        study: name of their study.
        formats: beside the weights of the members, which `predict` loads.
        notes: sentences for the model card.
        metrics: further ones, for `metrics.json`.

    Raises:
        FormatError: a format cannot be written.
        UserError: the folder cannot be written.
    """
    if len(chosen.members) == 1:
        _write_alone(dest, chosen, study, [TIMM, *formats], notes, metrics)
        return
    write_ensemble_package(
        dest,
        [*zip(chosen.trial_ids, chosen.bests, strict=True)],
        [f"Trials {', '.join(chosen.trial_ids)} of the study {study}.", *notes],
        gain=chosen.sentence("ensemble"),
        metrics={**chosen.metrics, **(metrics or {})},
        formats=formats,
        store=chosen.candidates.store,
    )


def write_soup(
    dest: Path,
    chosen: Combination,
    best: Best,
    study: str,
    formats: Sequence[str],
    notes: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the export folder of a soup; see `write_ensemble`."""
    if len(chosen.members) == 1:
        _write_alone(dest, chosen, study, formats, notes, metrics)
        return
    origin = [
        f"The mean of the weights of the trials {', '.join(chosen.trial_ids)} of the study {study}. "
        f"{chosen.sentence('soup')}",
        f"The settings below are those of trial {chosen.trial_ids[0]}, the first of them.",
        *notes,
    ]
    values = {**chosen.metrics, **(metrics or {})}
    write_package(dest, best, origin, metrics=values, formats=formats, store=chosen.candidates.store)


def _write_alone(
    dest: Path,
    chosen: Combination,
    study: str,
    formats: Sequence[str],
    notes: Sequence[str],
    metrics: Mapping[str, Any] | None,
) -> None:
    origin = [f"Trial {chosen.trial_ids[0]} of the study {study}, alone, as no other trial helps it.", *notes]
    (best,) = chosen.bests
    values = {**best.report, **(metrics or {})}
    write_package(dest, best, origin, metrics=values, formats=formats, store=chosen.candidates.store)


def _candidates(study: OpenStudy) -> Candidates:
    find = functools.partial(find_store, study.spec, fetch=True)
    return read_candidates(list_kept(study.folder, study.records()), find, find_device(study.spec.gpus_per_worker))
