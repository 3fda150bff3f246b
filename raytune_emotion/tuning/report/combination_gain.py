"""Measure the gain of an ensemble, a soup and mirror images for a study, as far as that is quick."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raytune_emotion.errors import UserError
from raytune_emotion.learn.combine import STATISTICS_ROWS, js_of, list_compatible
from raytune_emotion.learn.evaluation import predict_rows
from raytune_emotion.learn.model import load_model
from raytune_emotion.learn.run_folder import PREDICTIONS
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.terminal import shell_word
from raytune_emotion.tuning.study.combination import (
    MEMBERS,
    Candidates,
    Combination,
    combine_ensemble,
    combine_soup,
    list_kept,
    read_candidates,
)
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.spec import find_store, read_spec

#: Largest number of models of a soup here.
_MIXED = 3
#: Largest number of mixtures to predict for a soup of so many models.
_MIXTURES = 4
#: Longest time for which a report runs models, seconds.
_MOST_SECONDS = 15.0
_BATCH = 64
#: The GPU is left to trials: those of a confirmation run while the process of the search is alive.
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MeasuredCombination:
    """The gain of one way to use the kept trials."""

    way: str
    measured_on: str
    single: float | None  # JS of the best single model, bits; None: not measured
    combined: float | None  # JS, bits; None: not measured
    cost: str
    command: str  # that makes what was measured; empty where none does

    @property
    def cells(self) -> list[str]:
        """Return the row of the table for people."""
        gain = None if self.single is None or self.combined is None else self.single - self.combined
        numbers = ("" if number is None else f"{number:.4f}" for number in (self.single, self.combined, gain))
        return [self.way, self.measured_on, *numbers, self.cost, self.command]


HEADINGS = (
    "combination", "measured on", "best single model, bits", "combination, bits", "gain, bits", "cost", "command",
)  # fmt: skip
#: Headings of columns of text.
TEXTS = ("combination", "measured on", "cost", "command")
_UNSEEN, _ALL = "the half that did not choose, for each half", "the whole validation set"


def measure_combinations(
    folder: Path, records: Sequence[TrialRecord], study: Location | None = None
) -> list[MeasuredCombination]:
    """Measure the gain of each way. A way that would take long gets a row that says so.

    Args:
        folder: of the study.
        records: of its trials.
        study: location of the study, for the commands; None: the folder.

    Returns:
        A row for each way; those that cannot be measured here are left out.
    """
    with_weights = list_kept(folder, records)
    kept = [(name, trial) for name, trial in with_weights if (trial / PREDICTIONS).exists()]
    export = f"raytune-emotion export {shell_word(str(study or Folder(folder)))}"
    # Without `--trial`, the command chooses among all trials with weights.
    export_of_all = export if len(kept) == len(with_weights) else ""
    try:
        find = functools.partial(find_store, read_spec(folder), fetch=False)
        candidates = read_candidates(kept, find, _CPU)
        began = time.monotonic()
        mirrored_NK = _predict_mirrored(candidates, began + _MOST_SECONDS)
        # A mixture predicts the validation set, after the images for the statistics of its BatchNorm.
        images = 1 + min(STATISTICS_ROWS, len(candidates.store.train)) / len(candidates.store.val)
        is_fast = mirrored_NK is not None and _MIXTURES * images * (time.monotonic() - began) < _MOST_SECONDS
        found = [
            _ensemble(candidates, export_of_all),
            _soup(candidates, export_of_all, is_fast=is_fast),
            _mirror(candidates, export, mirrored_NK),
        ]
        return [each for each in found if each is not None]
    except (UserError, OSError, RuntimeError):
        return []


def _ensemble(candidates: Candidates, export: str) -> MeasuredCombination | None:
    chosen = combine_ensemble(candidates, MEMBERS)
    if len(candidates.trial_ids) == 1:
        return None
    members = len(chosen.members)
    command = f"{export} ensemble --ensemble {members}" if export else ""
    return _measured("ensemble", chosen, f"{members} times the time", command)


def _soup(candidates: Candidates, export: str, *, is_fast: bool) -> MeasuredCombination | None:
    compatible = list_compatible(candidates.bests)
    few = candidates.only(compatible[:_MIXED])
    if len(few.trial_ids) == 1:
        return None
    command = f"{export} soup --soup" if export else ""
    if not is_fast:
        return _not_measured("mean weights", "none", command)
    chosen, _ = combine_soup(few, _CPU)
    # `export --soup` chooses among all models that can be averaged.
    return _measured("mean weights", chosen, "none", command if len(few.trial_ids) == len(compatible) else "")


def _measured(what: str, chosen: Combination, cost: str, command: str) -> MeasuredCombination | None:
    if chosen.combined is None:
        return None
    if len(chosen.members) == 1:  # those of the halves, whose JS is known, may have had more members
        what = f"{what}: no other trial helps {chosen.trial_ids[0]}"
        return MeasuredCombination(what, _UNSEEN, chosen.single, chosen.single, "", "")
    what = f"{what} of {', '.join(chosen.trial_ids)}"
    return MeasuredCombination(what, _UNSEEN, chosen.single, chosen.combined, cost, command)


def _not_measured(what: str, cost: str, command: str) -> MeasuredCombination:
    return MeasuredCombination(
        what, f"not measured: would take longer than {_MOST_SECONDS:g} s", None, None, cost, command
    )


def _mirror(candidates: Candidates, export: str, mirrored_NK: Tensor | None) -> MeasuredCombination:
    """Measure the mean of the predictions of images and mirror images."""
    trial_id = candidates.trial_ids[0]
    # The folder `best` may hold another trial, as after a confirmation.
    dest = f"trial_{trial_id}"
    command = f"{export} {dest} --trial {trial_id} && raytune-emotion predict --mirror {dest} FACE.jpg"
    what, cost = f"mirror image, trial {trial_id}", "2 times the time"
    if mirrored_NK is None:
        return _not_measured(what, cost, command)
    plain_NK, targets = candidates.predictions[0], candidates.targets
    both_NK = (plain_NK + mirrored_NK) / 2
    single, combined = (float(js_of(predicted_NK, targets).mean()) for predicted_NK in (plain_NK, both_NK))
    return MeasuredCombination(what, _ALL, single, combined, cost, command)


def _predict_mirrored(candidates: Candidates, until: float) -> Tensor | None:
    """Predict the mirror images of the validation set with the best model, [N, K]; None if that takes too long."""
    model, split = load_model(candidates.bests[0]), candidates.store.val
    rows_N = np.arange(len(split))
    logits_NK, _ = predict_rows(model, split, rows_N, device=_CPU, rows=_BATCH, until=until, mirror=True)
    return None if time.monotonic() > until else logits_NK.double().softmax(-1)
