"""Finish a study: confirm its best configurations, train the winner longer, combine models where that helps, export.

Every step can be repeated. An interrupted step keeps its results and continues from there.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.learn.combine import unseen_js_of_ensemble
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.export_folder import TIMM, FormatError, publish_export, write_package
from raytune_emotion.learn.run_folder import BEST, PREDICTIONS
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import count, plain_console, plain_table
from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.placement import Demand, Placement, fit_here
from raytune_emotion.tuning.session.run_confirmation import run_confirmation
from raytune_emotion.tuning.session.single_run import TrainingFailed, Workers, train_single
from raytune_emotion.tuning.study.combination import (
    MEMBERS,
    Candidates,
    Combination,
    combine_ensemble,
    combine_soup,
    list_kept,
    read_groups,
)
from raytune_emotion.tuning.study.combined_export import write_ensemble, write_soup
from raytune_emotion.tuning.study.confirmation import CONFIRMED, RECORD_OF_CONFIRMATION, rank_confirmed
from raytune_emotion.tuning.study.open_study import OpenStudy, load, read_study
from raytune_emotion.tuning.study.request import ConfirmRequest
from raytune_emotion.tuning.study.spec import StudySpec, find_store
from raytune_emotion.tuning.study.trials import is_taken

#: Folder of the final fits, each in a folder with the id of its trial; and folder of the final export.
FINAL, FINISHED = "final", "finished"
#: Patterns of the models of a study.
_WEIGHTS = tuple(
    f"{runs}/*/{name}" for runs in ("trials", f"{CONFIRMED}/trials", FINAL) for name in (BEST, PREDICTIONS)
)
#: Number of configurations to confirm, and of seeds for each.
TOP, SEEDS = 3, 3
#: Epochs of the final fit, as a multiple of those of a trial.
LONGER = 2
#: Smallest micro-batch per GPU in the final fit, if it has more GPUs than a trial. Steps of several workers are not
#: captured as CUDA graphs: an H200 trains resnet18 on 8514 images/s in captured steps of 32 rows, in launched ones on
#: 3411, so a smaller micro-batch on each of two GPUs takes longer than the whole one on a single GPU.
_LEAST_ROWS = 128
#: Key of the steps in `metrics.json`.
STEPS = "finish_steps"
#: Description of how the JS of a step is measured.
_MEASURED = (
    "Each combination, and each choice among the models, was made on one half of the validation set and measured on "
    "the other, both ways round. The trials, their epochs and the confirmed winner were selected on the whole set. The "
    "better one of soup and ensemble is exported if its JS is lower than that of the best single model after the final "
    "fit; otherwise the single model that is best on the whole validation set."
)


@dataclass(frozen=True)
class Step:
    """A step of a finish, and the JS of the best model after it."""

    name: str
    js: float | None  # bits, on the half that did not choose; None: not measured
    before: float | None = None  # JS of the best single model before it, bits
    failure: str = ""  # why the step failed

    @property
    def gain(self) -> float | None:
        """Return the decrease of the JS by the step, bits."""
        return None if self.js is None or self.before is None else self.before - self.js

    @property
    def cells(self) -> list[str]:
        """Return the cells of the step in the printed table."""
        what = f"{self.name}: failed ({self.failure})" if self.failure else self.name
        return [what, *("" if number is None else f"{number:.4f}" for number in (self.js, self.gain))]

    @property
    def entry(self) -> dict[str, Any]:
        """Return the entry of the step in `metrics.json`."""
        return {"step": self.name, "js": self.js, "gain": self.gain, "failure": self.failure}

    def __str__(self) -> str:
        what, js, gain = self.cells
        return f"{what}: {js or 'not measured'}" + (f" (gain {gain})" if gain else "")


@dataclass(frozen=True)
class Finished:
    """The exported model of a finish, and the steps that led to it."""

    steps: Sequence[Step]
    model: str  # sentences that say which one it is
    js: float  # on the whole validation set, bits


def finish_study(place: Location, address: str | None, *, check: Callable[[], None] = lambda: None) -> None:
    """Finish a study that has been searched, and export its best model.

    A failed final fit and a failed pt2 file of an ensemble are noted among the steps.

    Args:
        place: location of the study.
        address: of a cluster; None for this machine.
        check: raises an error if another process has taken over the study. Called before each step that reads it.

    Raises:
        UserError: no trial has reported, or the data are gone.
        KeyboardInterrupt: it was interrupted; another call continues it.
    """
    console = plain_console()
    run_confirmation(ConfirmRequest(study=place, top=TOP, seeds=SEEDS, address=address), advise=False)
    check()
    with read_study(place, *RECORD_OF_CONFIRMATION) as study:
        confirmation = load(study.folder / CONFIRMED)
        winner = rank_confirmed(confirmation.spec, confirmation.records())[0].trial_id
        epochs = LONGER * study.spec.epochs
        failure = _fit_longer(study, winner, epochs, address)
        check()
        fit = f"the final fit of trial {winner} ({count(epochs, 'epoch')})"
        finished = _compare_and_export(study, confirmation, fit, failure)
    table = plain_table("step", "JS, bits", "gain, bits")
    for step in finished.steps:
        table.add_row(*step.cells)
    console.print(table)
    console.print(
        f"""{_MEASURED}

model       {finished.model}
JS          {finished.js:.4f} bits on the whole validation set; the table has values of its halves
exported    {place / FINISHED}"""
    )


def _compare_and_export(study: OpenStudy, confirmation: OpenStudy, fit: str, failure: str) -> Finished:
    """Compare all models of a study, and export the best one or the best combination.

    Args:
        study: the study.
        confirmation: its confirmation.
        fit: description of the final fit.
        failure: why that failed, or "".
    """
    place, device = study.copy.location, find_device(study.spec.gpus_per_worker)
    with publish_export(place / FINISHED) as dest, place.copy_here(*_WEIGHTS) as folder:
        searched = list_kept(folder, study.records())
        confirmed = list_kept(folder / CONFIRMED, confirmation.records(), f"{CONFIRMED}/")
        # Includes the fit of an earlier winner, and a fit that failed after its first evaluation.
        fits = [(f"{FINAL}/{best.parent.name}", best.parent) for best in sorted((folder / FINAL).glob(f"*/{BEST}"))]
        trials = [*searched, *confirmed, *fits]
        groups = read_groups(trials, functools.partial(find_store, study.spec, fetch=True), device)
        names = [name for name, _ in trials]
        ends = (len(searched), len(searched) + len(confirmed), len(names))
        first, second, third = (_unseen_js(groups, names[:end]) for end in ends)
        steps = [
            Step("best trial of the search", first),
            Step(f"best of it and {count(len(confirmed), 'confirmed run')}", second, first),
            Step(f"best of these and {fit}", third, second, failure),
        ]
        return _export(dest, groups[0], place.name, steps, device)


def _fit_longer(study: OpenStudy, trial_id: str, epochs: int, address: str | None) -> str:
    """Train the configuration of a trial for longer on all GPUs, or continue that training.

    Returns:
        The reason if it failed; otherwise an empty string.
    """
    settings = {**study.spec.settings(study.record(trial_id).settings), "train.epochs": epochs}
    store = open_store(study.spec.stores[RunConfig.from_flat(settings).data.image_size])
    config = RunConfig.from_flat({**settings, "data.classes": store.classes})
    most = min(config.train.batch_size, len(store.train)) // (_LEAST_ROWS * config.train.accumulate)
    workers = _choose_workers(study.spec, max(study.spec.workers_per_trial, most), address)
    # Each winner has a folder of its own, because a resumed study may have another winner.
    fit = study.copy.location / FINAL / trial_id
    try:
        train_single(fit, config, store, workers, fresh=not is_taken(fit), advise=False)
    except TrainingFailed as error:
        return error.reason
    return ""


def _choose_workers(spec: StudySpec, most: int, address: str | None) -> Workers:
    """Choose the workers of a final fit: one for each GPU, as far as a worker finds room there.

    On cores, it is one process on this machine, or as many workers on a cluster as a trial has.

    Args:
        spec: of the study.
        most: largest number of workers with GPUs.
        address: of a cluster; None for this machine.

    Raises:
        UserError: there is no room for a worker.
    """
    gpus = None if spec.gpus_per_worker is None else float(math.ceil(spec.gpus_per_worker))
    place = _place_single_workers(gpus, address)
    if place.resources.gpus_per_worker:
        # A cluster with an autoscaler adds nodes on demand.
        found = max(place.concurrency, spec.workers_per_trial) if place.grows else place.concurrency
        return Workers(min(found, most), gpus, address)
    # On this machine, one process uses every core.
    return Workers(1 if address is None else spec.workers_per_trial, gpus, address)


def _place_single_workers(gpus: float | None, address: str | None) -> Placement:
    """Fit as many single workers as possible, by the rule for the workers of the final fit itself."""
    demand = Demand(gpus_per_worker=gpus)
    if address is None:
        return fit_here(demand)
    with ray_session(address):
        return fit_to_cluster(demand)


def _unseen_js(groups: Sequence[Candidates], names: Collection[str]) -> float | None:
    """Return the JS of the best of some models, on images that were not used to choose it.

    Args:
        groups: all models, grouped by image size. Models of one group can be combined; all can be compared.
        names: names of the models to compare.
    """
    predictions = [
        predicted_NK
        for group in groups
        for name, predicted_NK in zip(group.trial_ids, group.predictions, strict=True)
        if name in names
    ]
    if not predictions or any(group.store.val.ids != groups[0].store.val.ids for group in groups):
        return None
    return unseen_js_of_ensemble(predictions, groups[0].store.val.ids, groups[0].targets, 1)


def _name_members(found: Combination, what: str) -> str:
    alone = " alone, as no other helps it" if len(found.members) == 1 else ""
    return f"the {what} of {', '.join(found.trial_ids)}{alone}"


def _export(dest: Path, candidates: Candidates, study: str, steps: Sequence[Step], device: torch.device) -> Finished:
    """Export the best of ensemble, soup and single model, by the JS on images that were not used to choose it.

    Args:
        dest: the folder.
        candidates: models with the image size of the best one.
        study: name of the study.
        steps: earlier steps; the last one compares single models.
        device: predicts the validation images.
    """
    single = steps[-1].js
    ensemble, (soup, mixed) = combine_ensemble(candidates, MEMBERS), combine_soup(candidates, device)
    found = {"soup": soup, "ensemble": ensemble}
    steps = [*steps, *(Step(_name_members(its, what), its.js, single) for what, its in found.items())]
    # A combination with one member is a single model. The other combination may still be better.
    js = {what: its.js for what, its in found.items() if its.js is not None and len(its.members) > 1}
    best = min(js, key=js.__getitem__, default=None)
    if best is None or single is None or js[best] >= single:
        first = candidates.bests[0]
        if single is not None:
            why = "Neither soup nor ensemble helps"
        else:
            why = "Whether a soup or an ensemble helps was not measured: " + (
                "there are too few validation images"
                if ensemble.single is None
                else "the image sizes have different validation images"
            )
        model = f"{why}. This is {candidates.trial_ids[0]} of the study {study}."
        metrics = {**first.report, **_entries(steps)}
        write_package(dest, first, [model, _describe(steps)], metrics=metrics, store=candidates.store)
        return Finished(steps, model, first.report["val_js"])
    if best == "soup":
        write_soup(dest, soup, mixed, study, ["timm"], [_describe(steps)], _entries(steps))
    else:
        try:
            write_ensemble(dest, ensemble, study, ["pt2"], [_describe(steps)], _entries(steps))
        except FormatError as error:
            if error.format == TIMM:
                raise
            # `predict` only needs the weights.
            steps = [*steps, Step("the ensemble as pt2", None, failure=error.reason)]
            write_ensemble(dest, ensemble, study, [], [_describe(steps)], _entries(steps))
    model = f"This is {_name_members(found[best], best)} of the study {study}."
    return Finished(steps, model, found[best].metrics["val_js"])


def _describe(steps: Sequence[Step]) -> str:
    """Return the sentences about the steps for the model card."""
    return f"The way to this model, by its JS in bits: {'; '.join(map(str, steps))}. {_MEASURED}"


def _entries(steps: Sequence[Step]) -> dict[str, Any]:
    """Return the entries of the steps in `metrics.json`."""
    return {STEPS: [step.entry for step in steps]}
