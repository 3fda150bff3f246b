"""Measure what an ensemble, a soup, and the mirror image would bring to a study, as far as that takes little time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raytune_emotion.data.augment import normalise
from raytune_emotion.errors import UserError
from raytune_emotion.learn.combine import js_of, list_compatible
from raytune_emotion.learn.device import exact_fp32
from raytune_emotion.learn.model import load_model, mean_std
from raytune_emotion.learn.run_folder import PREDICTIONS
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
from raytune_emotion.tuning.study.spec import read_spec, stores_here

#: Models of a soup at most.
_MIXED = 3
#: For so long models are run at most: a report is no evaluation of its own.
_MOST_SECONDS = 15.0
_BATCH = 64


@dataclass(frozen=True)
class Brought:
    """What one way to use the kept trials would bring."""

    way: str
    measured_on: str
    single: float  # JS of the best single model, bits
    combined: float  # JS, bits
    cost: str
    command: str  # that makes what was measured; empty where none does

    @property
    def cells(self) -> list[str]:
        """Return the row of the table for people."""
        numbers = (self.single, self.combined, self.single - self.combined)
        return [self.way, self.measured_on, *(f"{number:.4f}" for number in numbers), self.cost, self.command]


HEADINGS = (
    "combination", "measured on", "best single model, bits", "combination, bits", "gain, bits", "cost", "command",
)  # fmt: skip
#: Those of them whose cells are words.
TEXTS = ("combination", "measured on", "cost", "command")
_UNSEEN, _ALL = "the half that did not choose, for each half", "the whole validation set"


def measure_combinations(folder: Path, records: Sequence[TrialRecord], *, here: bool = True) -> list[Brought]:
    """Measure what each way would bring; those that would take long, or cannot be measured here, are left out.

    Args:
        folder: of the study.
        records: of its trials.
        here: whether the study lies in the folder, so that commands can name it.
    """
    with_weights = list_kept(folder, records)
    kept = [(name, trial) for name, trial in with_weights if (trial / PREDICTIONS).exists()]
    export = f"raytune-emotion export {shell_word(folder)}" if here else ""
    # Where nobody names a trial, all that have weights are chosen from.
    export_of_all = export if len(kept) == len(with_weights) else ""
    try:
        candidates = read_candidates(kept, stores_here(read_spec(folder)))
        found = [_ensemble(candidates, export_of_all)]
        began = time.monotonic()
        mirrored = _mirror(candidates, export, began + _MOST_SECONDS)
        # A soup of three models is predicted in four mixtures at most.
        if mirrored is not None and 4 * (time.monotonic() - began) < _MOST_SECONDS:
            found.append(_soup(candidates, export_of_all))
        return [brought for brought in [*found, mirrored] if brought is not None]
    except (UserError, OSError, RuntimeError):
        return []


def _ensemble(candidates: Candidates, export: str) -> Brought | None:
    chosen = combine_ensemble(candidates, MEMBERS)
    if len(candidates.trial_ids) == 1:
        return None
    members = len(chosen.members)
    command = f"{export} ensemble --ensemble {members}" if export else ""
    return _brought("ensemble", chosen, f"{members} times the time", command)


def _soup(candidates: Candidates, export: str) -> Brought | None:
    few = candidates.only(range(min(_MIXED, len(candidates.trial_ids))))
    chosen, _ = combine_soup(few)
    if len(chosen.candidates.trial_ids) == 1:
        return None
    # `export --soup` chooses among all models that can be averaged.
    all_mixed = len(chosen.candidates.trial_ids) == len(list_compatible(candidates.bests))
    return _brought("mean weights", chosen, "none", f"{export} soup --soup" if export and all_mixed else "")


def _brought(what: str, chosen: Combination, cost: str, command: str) -> Brought | None:
    if chosen.gain is None:
        return None
    if len(chosen.members) == 1:
        what, cost, command = f"{what}: no other trial helps {chosen.trial_ids[0]}", "", ""
    else:
        what = f"{what} of {', '.join(chosen.trial_ids)}"
    return Brought(what, _UNSEEN, chosen.gain.single, chosen.gain.combined, cost, command)


def _mirror(candidates: Candidates, export: str, until: float) -> Brought | None:
    """Predict the mirror images of the validation set with the best model; None where that takes too long."""
    best, split = candidates.bests[0], candidates.store.val
    model = load_model(best)
    parts = []
    with torch.inference_mode(), exact_fp32():
        for start in range(0, len(split), _BATCH):
            if time.monotonic() > until:
                return None
            rows_B = np.arange(start, min(start + _BATCH, len(split)))
            x_BHWC = torch.from_numpy(split.gather(rows_B)).flip(2)
            parts.append(model(normalise(x_BHWC, *mean_std(model))).double().softmax(-1))
    plain_NK, targets = candidates.predictions[0], candidates.targets
    both_NK = (plain_NK + torch.cat(parts)) / 2
    single, combined = (float(js_of(predicted_NK, targets).mean()) for predicted_NK in (plain_NK, both_NK))
    trial_id = candidates.trial_ids[0]
    # What lies in `best` may be another trial, as after a confirmation.
    dest = f"trial_{trial_id}"
    command = f"{export} {dest} --trial {trial_id} && raytune-emotion predict --mirror {dest} FACE.jpg"
    return Brought(
        f"mirror image, trial {trial_id}", _ALL, single, combined, "2 times the time", command if export else ""
    )
