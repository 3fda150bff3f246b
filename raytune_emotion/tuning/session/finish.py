"""Finish a study: confirm its best configurations, train the winner longer, combine models where that helps, export.

Every step can be repeated: what an interrupted one has reached is kept, and it goes on from there.
"""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.learn.combine import choose_ensemble, mean_of, measure_gain
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.export_folder import FormatError, write_package
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.storage.atomic import is_taken
from raytune_emotion.storage.locations import Folder
from raytune_emotion.terminal import count, plain_console, plain_table, shell_word
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
from raytune_emotion.tuning.study.confirmation import CONFIRMED, rank_confirmed
from raytune_emotion.tuning.study.open_study import OpenStudy, load
from raytune_emotion.tuning.study.request import ConfirmRequest
from raytune_emotion.tuning.study.spec import find_store

#: Folders of the final fits, each named by its trial, and of the final export in the folder of a study.
FINAL, FINISHED = "final", "finished"
#: Configurations and seeds that are confirmed.
TOP, SEEDS = 3, 3
#: The final fit trains this many times the epochs of a trial.
LONGER = 2
#: Rows of a micro-batch that a GPU of the final fit has at least: BatchNorm takes its statistics of them.
_LEAST_ROWS = 16
#: Key of the steps in `metrics.json`.
STEPS = "finish_steps"
#: How the JS of a step is measured, in words.
_MEASURED = (
    "Each combination, and each choice among the models, was made on one half of the validation set and measured on "
    "the other, both ways round. The trials, their epochs and the confirmed winner were selected on the whole set. The "
    "export is what has the lowest of these numbers."
)


@dataclass(frozen=True)
class Step:
    """One step of the way, and what the best model after it reaches."""

    name: str
    js: float | None  # bits, on the half that did not choose; None: not measured
    before: float | None = None  # JS of the best single model before it, bits
    failure: str = ""  # why the step failed

    @property
    def gain(self) -> float | None:
        """Return by how much the step lowers the JS, bits."""
        return None if self.js is None or self.before is None else self.before - self.js

    @property
    def cells(self) -> list[str]:
        """Return the row of a table for people."""
        what = f"{self.name}: failed ({self.failure})" if self.failure else self.name
        return [what, *("" if number is None else f"{number:.4f}" for number in (self.js, self.gain))]

    @property
    def entry(self) -> dict[str, Any]:
        """Return what `metrics.json` says of the step."""
        return {"step": self.name, "js": self.js, "gain": self.gain, "failure": self.failure}

    def __str__(self) -> str:
        what, js, gain = self.cells
        return f"{what}: {js or 'not measured'}" + (f" (gain {gain})" if gain else "")


def finish_study(folder: Path, address: str | None) -> None:
    """Finish a study that has been searched, and export its best model.

    A final fit that fails, and a format that cannot be written, are noted among the steps.

    Args:
        folder: of the study.
        address: of a cluster; None for this machine.

    Raises:
        UserError: no trial has reported, or the data are gone.
        KeyboardInterrupt: it was interrupted, and goes on when it is called again.
    """
    console = plain_console()
    run_confirmation(ConfirmRequest(study=Folder(folder), top=TOP, seeds=SEEDS, address=address), advise=False)
    study, confirmation = load(folder), load(folder / CONFIRMED)
    winner = rank_confirmed(confirmation.spec, confirmation.records())[0].trial_id
    epochs = LONGER * study.spec.epochs
    failure = _fit_longer(study, winner, epochs, address)

    searched = list_kept(folder, study.records())
    confirmed = list_kept(folder / CONFIRMED, confirmation.records(), f"{CONFIRMED}/")
    # Also that of an earlier winner, and one that failed after its first evaluation.
    fits = [(f"{FINAL}/{best.parent.name}", best.parent) for best in sorted((folder / FINAL).glob(f"*/{BEST}"))]
    groups = read_groups(
        [*searched, *confirmed, *fits], functools.partial(find_store, study.spec, fetch=True), find_device()
    )
    names = [name for name, _ in (*searched, *confirmed, *fits)]
    ends = (len(searched), len(searched) + len(confirmed), len(names))
    first, second, third = (_unseen_js(groups, names[:end]) for end in ends)
    steps = [
        Step("best trial of the search", first),
        Step(f"best of it and {count(len(confirmed), 'confirmed run')}", second, first),
        Step(f"best of these and the final fit of trial {winner} ({count(epochs, 'epoch')})", third, second, failure),
    ]
    table = plain_table("step", "JS, bits", "gain, bits")
    for step in _export(folder / FINISHED, groups[0], folder.name, steps):
        table.add_row(*step.cells)
    console.print(table)
    console.print(f"{_MEASURED}\nexported    {shell_word(folder / FINISHED)}")


def _fit_longer(study: OpenStudy, trial_id: str, epochs: int, address: str | None) -> str:
    """Train the configuration of a trial for longer on all GPUs, or go on with that.

    Returns:
        Why it failed; empty where it did not.
    """
    settings = {**study.spec.settings(study.record(trial_id).settings), "train.epochs": epochs}
    store = open_store(study.spec.stores[RunConfig.from_flat(settings).data.image_size])
    config = RunConfig.from_flat({**settings, "data.classes": store.classes})
    share = study.spec.gpus_per_worker
    # On CPUs, one process uses every core.
    gpus = 0 if share == 0 else _count_gpus(address)
    most = min(config.train.batch_size, len(store.train)) // (_LEAST_ROWS * config.train.accumulate)
    workers = Workers(max(1, min(gpus, most)), None if share is None else float(math.ceil(share)), address)
    # One folder for each: a study that goes on may have another winner.
    fit = study.folder / FINAL / trial_id
    try:
        train_single(fit, config, store, workers, fresh=not is_taken(fit), advise=False)
    except TrainingFailed as error:
        return error.reason
    return ""


def _count_gpus(address: str | None) -> int:
    if address is None:
        return torch.cuda.device_count()
    # Imported for a cluster alone: it takes seconds.
    import ray

    from raytune_emotion.tuning.execution.cluster import ray_session

    with ray_session(address):
        return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def _unseen_js(groups: Sequence[Candidates], names: Collection[str]) -> float | None:
    """Return the JS of the best single one of some models, on images that did not choose it.

    Args:
        groups: all models, those of one image size together: only such can be combined, but all can be compared.
        names: of the models.
    """
    predictions = [
        predicted_NK
        for group in groups
        for name, predicted_NK in zip(group.trial_ids, group.predictions, strict=True)
        if name in names
    ]
    if not predictions or any(group.store.val.ids != groups[0].store.val.ids for group in groups):
        return None
    targets = groups[0].targets
    gain = measure_gain(
        lambda rows: choose_ensemble(predictions, targets, rows, 1),
        mean_of(predictions),
        len(predictions),
        groups[0].store.val.ids,
        targets,
    )
    return gain.single if gain is not None else None


def _name_members(found: Combination, what: str) -> str:
    alone = " alone, as no other helps it" if len(found.members) == 1 else ""
    return f"the {what} of {', '.join(found.trial_ids)}{alone}"


def _export(dest: Path, candidates: Candidates, study: str, steps: Sequence[Step]) -> Sequence[Step]:
    """Export an ensemble, a soup, or the best single model: what is best where it was not chosen.

    Args:
        dest: the folder.
        candidates: the models of the best one's image size.
        study: its name.
        steps: until now, the last of which compares single models.

    Returns:
        All steps.
    """
    single = steps[-1].js
    ensemble, (soup, mixed) = combine_ensemble(candidates, MEMBERS), combine_soup(candidates, find_device())
    found = {"soup": soup, "ensemble": ensemble}
    steps = [*steps, *(Step(_name_members(its, what), its.js, single) for what, its in found.items())]
    # A combination of one member is a single model, and no reason to leave the other combination out.
    js = {what: its.js for what, its in found.items() if its.js is not None and len(its.members) > 1}
    best = min(js, key=js.__getitem__, default=None)
    if best is None or single is None or js[best] >= single:
        first = candidates.bests[0]
        notes = [
            f"Neither soup nor ensemble helps: this is {candidates.trial_ids[0]} of the study {study}.",
            _describe(steps),
        ]
        write_package(dest, first, notes, metrics={**first.report, **_entries(steps)}, store=candidates.store)
    elif best == "soup":
        write_soup(dest, soup, mixed, study, ["timm"], [_describe(steps)], _entries(steps))
    else:
        try:
            write_ensemble(dest, ensemble, study, ["pt2"], [_describe(steps)], _entries(steps))
        except FormatError as error:
            # Its weights, which `predict` loads, are enough.
            steps = [*steps, Step("the ensemble as pt2", None, failure=error.reason)]
            write_ensemble(dest, ensemble, study, [], [_describe(steps)], _entries(steps))
    return steps


def _describe(steps: Sequence[Step]) -> str:
    """Return the sentences on the way to a model for its card."""
    return f"The way to this model, by its JS in bits: {'; '.join(map(str, steps))}. {_MEASURED}"


def _entries(steps: Sequence[Step]) -> dict[str, Any]:
    """Return what `metrics.json` says of the way to a model."""
    return {STEPS: [step.entry for step in steps]}
