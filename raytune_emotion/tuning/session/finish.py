"""Finish a study: confirm its best configurations, train the winner longer, combine models where that helps, export.

Every step can be repeated: what an interrupted one has reached is kept, and it goes on from there.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.learn.combine import choose_ensemble, mean_of, measure_gain
from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.storage.atomic import is_taken
from raytune_emotion.storage.locations import Folder
from raytune_emotion.terminal import count, plain_console, plain_table, shell_word
from raytune_emotion.tuning.session.run_confirmation import run_confirmation
from raytune_emotion.tuning.session.single_run import Workers, train_single
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

#: Folders of the final fits, each named by its trial, and of the final export in the folder of a study.
FINAL, FINISHED = "final", "finished"
#: Configurations and seeds that are confirmed.
TOP, SEEDS = 3, 3
#: The final fit trains this many times the epochs of a trial.
LONGER = 2


@dataclass(frozen=True)
class Step:
    """What the models after a step of the way reach."""

    name: str
    js: float | None  # bits, on images that no choice has seen; None: not measured

    @property
    def cells(self) -> tuple[str, str]:
        """Return the row of a table for people."""
        return self.name, "" if self.js is None else f"{self.js:.4f}"


def finish_study(folder: Path, address: str | None) -> None:
    """Finish a study that has been searched, and export its best model.

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
    epochs = _fit_longer(study, winner, address)
    fit = f"{FINAL}/{winner}"

    # Where the time was over, the best trial may be one that is paused.
    searched = list_kept(folder, study.records(), at_rest=True)
    confirmed = list_kept(folder / CONFIRMED, confirmation.records(), f"{CONFIRMED}/")
    trials = [*searched, *confirmed, (fit, folder / fit)]
    stores = [open_store(address) for address in study.spec.stores.values()]
    groups, names = read_groups(trials, stores), [name for name, _ in trials]
    steps = [
        Step("best trial of the search", _unseen_js(groups, names[: len(searched)])),
        Step(f"best of it and {count(len(confirmed), 'confirmed run')}", _unseen_js(groups, names[:-1])),
        Step(
            f"best of these and the final fit of trial {winner} ({count(epochs, 'epoch')})",
            _unseen_js(groups, names),
        ),
    ]
    steps += _export(folder / FINISHED, groups[0], study, steps)
    table = plain_table("step", "JS, bits")
    for step in steps:
        table.add_row(*step.cells)
    console.print(table)
    console.print(
        f"JS on the half of the validation set that chose nothing, mean over both halves\n"
        f"exported    {shell_word(folder / FINISHED)}"
    )


def _fit_longer(study: OpenStudy, trial_id: str, address: str | None) -> int:
    """Train the configuration of a trial for longer on all GPUs, or go on with that. Return the epochs."""
    record = study.record(trial_id)
    epochs = LONGER * study.spec.epochs
    settings = {**study.spec.settings(record.settings), "train.epochs": epochs}
    store = open_store(study.spec.stores[RunConfig.from_flat(settings).data.image_size])
    config = RunConfig.from_flat({**settings, "data.classes": store.classes})
    share = study.spec.gpus_per_worker
    # On CPUs, one process uses every core.
    gpus = 0 if share == 0 else _count_gpus(address)
    # No micro-batch of one row: BatchNorm would see no variance.
    most = min(config.train.batch_size, len(store.train)) // (2 * config.train.accumulate)
    workers = Workers(max(1, min(gpus, most)), None if share is None else float(math.ceil(share)), address)
    # One folder for each: a study that goes on may have another winner.
    fit = study.folder / FINAL / trial_id
    train_single(fit, config, store, workers, fresh=not is_taken(fit), advise=False)
    return epochs


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


def _export(dest: Path, candidates: Candidates, study: OpenStudy, steps: Sequence[Step]) -> list[Step]:
    """Export an ensemble, a soup, or the best model: what is best on unseen images. Return the steps to it."""
    ensemble = combine_ensemble(candidates, MEMBERS)
    soup, mixed = combine_soup(candidates)
    more = [
        Step(_name_members(found, what), found.gain.combined if found.gain else None)
        for what, found in (("soup", soup), ("ensemble", ensemble))
    ]
    way = "; ".join(f"{step.name}: {step.cells[1] or 'not measured'}" for step in [*steps, *more])
    notes = [f"The way to this model, by the JS in bits on images that no choice has seen: {way}."]
    # By the JS, not by the gain: a soup's gain is over the best model of one backbone.
    unseen = {what: found.gain.combined for what, found in (("ensemble", ensemble), ("soup", soup)) if found.gain}
    best = min(unseen, key=lambda what: unseen[what], default=None)
    name = study.folder.name
    if best is None or ensemble.gain is None or unseen[best] >= ensemble.gain.single:
        first = candidates.bests[0]
        notes += [f"Neither soup nor ensemble helps: this is {candidates.trial_ids[0]} of the study {name}."]
        write_package(dest, first, notes, store=candidates.store)
    elif best == "ensemble":
        write_ensemble(dest, ensemble, name, ["pt2"], notes)
    else:
        write_soup(dest, soup, mixed, name, ["timm"], notes)
    return more
