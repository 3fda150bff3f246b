"""Choose kept trials of a study for an ensemble or a soup that is better than the best trial."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_emotion.data.store import Store
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import Best, read_best, read_predictions
from raytune_emotion.learn.combine import (
    Soup,
    choose_ensemble,
    choose_soup,
    list_compatible,
    mean_of,
    predict_whole,
    unseen_js,
    unseen_js_of_ensemble,
)
from raytune_emotion.learn.evaluation import means_of_metrics
from raytune_emotion.learn.metrics import logits_of
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.trials import trial_folder

#: Largest number of members of an ensemble, by default.
MEMBERS = 3

#: Finds the packed data of a fingerprint, which may have moved since the training; None if they are not there.
FindStore = Callable[[str], Store | None]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Trials whose weights are kept, the best first, with their predictions of the validation split."""

    trial_ids: tuple[str, ...]
    bests: tuple[Best, ...]
    predictions: tuple[Tensor, ...]  # [N, K], float64
    store: Store
    left_out: int = 0  # trials whose weights are kept, but that were trained on other data

    @property
    def targets(self) -> Tensor:
        """Return the targets of the validation split."""
        return torch.from_numpy(self.store.val.prob_NK.copy()).double()

    def only(self, numbers: Sequence[int]) -> "Candidates":
        """Return the candidates with these numbers."""
        return dataclasses.replace(
            self,
            trial_ids=tuple(self.trial_ids[number] for number in numbers),
            bests=tuple(self.bests[number] for number in numbers),
            predictions=tuple(self.predictions[number] for number in numbers),
        )


@dataclasses.dataclass(frozen=True)
class Combination:
    """Trials that were chosen to be combined, and what that brings.

    Both JS are measured on images that did not choose the models: these were chosen on one half of the validation set
    and measured on the other, both ways round. None: there are too few images.
    """

    candidates: Candidates
    members: tuple[int, ...]  # numbers of candidates, the best first
    predicted_NK: Tensor
    single: float | None  # JS of the best single model, bits
    combined: float | None  # JS of the combination, bits

    @property
    def trial_ids(self) -> list[str]:
        """Return the trials of the members."""
        return [self.candidates.trial_ids[number] for number in self.members]

    @property
    def bests(self) -> list[Best]:
        """Return the weights of the members."""
        return [self.candidates.bests[number] for number in self.members]

    def sentence(self, what: str) -> str:
        """Describe the gain of the combination."""
        if self.combined is None:
            return f"What the {what} brings was not measured: there are too few validation images."
        return (
            f"JS {self.combined:.4f} bits; the best single model {self.single:.4f}. Both were chosen on one "
            f"half of the validation set and measured on the other, both ways round. The trials and their epochs were "
            f"selected on the whole set."
        )

    @property
    def js(self) -> float | None:
        """Return the JS on the half that did not choose, bits; None if not measured.

        A lone member counts as a single model.
        """
        return self.combined if len(self.members) > 1 else self.single

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the metrics on the whole validation set, with the size of one member and the gain of the combination.

        What a report of a run says of its training is left out: each member had its own.
        """
        logits_NK = logits_of(self.predicted_NK)
        metrics = means_of_metrics(logits_NK, self.candidates.targets, self.candidates.store.classes)
        values: dict[str, Any] = {f"val_{name}": value for name, value in metrics.items()}
        values |= {
            "best_val_js": metrics["js"],
            "params_millions": self.bests[0].report["params_millions"],
            "members": len(self.members),
        }
        if self.combined is not None:
            values |= {"unseen_js": self.combined, "unseen_js_single": self.single}
        return values


def list_kept(folder: Path, records: Sequence[TrialRecord], prefix: str = "") -> list[tuple[str, Path]]:
    """List the trials of a study that can be combined, with their folders: those that have weights and did not fail.

    Trials that run, or were left before their end, count too: the best of a study may be one of them.

    Args:
        folder: of the study.
        records: of its trials.
        prefix: of the names that the trials get.
    """
    ids = [record.trial_id for record in records if record.counts]
    folders = [(f"{prefix}{trial_id}", trial_folder(folder, trial_id)) for trial_id in ids]
    return [(name, trial) for name, trial in folders if (trial / BEST).exists()]


def read_candidates(trials: Sequence[tuple[str, Path]], find: FindStore, device: torch.device) -> Candidates:
    """Read the candidates for a combination: trials with the data and the image size of the best one.

    Args:
        trials: names, and the folders of the runs.
        find: finds their data.
        device: for models whose predictions are not kept.

    Raises:
        UserError: there are none, a checkpoint is damaged, or the data are not to be found.
    """
    bests = _read_bests(trials)
    return _candidates_of(next(iter(bests.values())).fingerprint, bests, dict(trials), find, device)


def read_groups(trials: Sequence[tuple[str, Path]], find: FindStore, device: torch.device) -> list[Candidates]:
    """Read candidates of all image sizes, grouped by size; the group of the best trial comes first."""
    bests = _read_bests(trials)
    fingerprints = dict.fromkeys(best.fingerprint for best in bests.values())
    return [_candidates_of(fingerprint, bests, dict(trials), find, device) for fingerprint in fingerprints]


def _read_bests(trials: Sequence[tuple[str, Path]]) -> dict[str, Best]:
    """Read the best weights of trials, the best trial first."""
    if not trials:
        raise UserError("no trial has weights, so there is nothing to combine; wait until one has reported")
    bests = {name: read_best(trial / BEST) for name, trial in trials}
    return dict(sorted(bests.items(), key=lambda item: (item[1].report["val_js"], item[0])))


def _candidates_of(
    fingerprint: str, bests: Mapping[str, Best], folders: Mapping[str, Path], find: FindStore, device: torch.device
) -> Candidates:
    """Read the candidates that were trained on one store."""
    names = tuple(name for name, best in bests.items() if best.fingerprint == fingerprint)
    store = find(fingerprint)
    if store is None:
        raise UserError(
            f"{folders[names[0]]}: the packed data of the run are not on this machine, so nothing can be chosen; run "
            f"this where it was trained"
        )
    predictions = []
    for name in names:
        predicted_NK = read_predictions(folders[name], bests[name])
        predictions.append(predict_whole(bests[name], store.val, device) if predicted_NK is None else predicted_NK)
    left_out = len(bests) - len(names)
    return Candidates(names, tuple(bests[name] for name in names), tuple(predictions), store, left_out)


def combine_ensemble(candidates: Candidates, most: int) -> Combination:
    """Choose the members of an ensemble."""
    predictions, ids, true_NK = candidates.predictions, candidates.store.val.ids, candidates.targets
    members = choose_ensemble(predictions, true_NK, _all(candidates), most)
    single, combined = (unseen_js_of_ensemble(predictions, ids, true_NK, count) for count in (1, most))
    return Combination(candidates, members, mean_of(predictions, members), single, combined)


def combine_soup(candidates: Candidates, device: torch.device) -> tuple[Combination, Best]:
    """Choose trials with the backbone of the best one for a soup, and return its weights, too.

    Args:
        candidates: to choose from.
        device: to predict mixtures on.
    """
    candidates = candidates.only(list_compatible(candidates.bests))
    soup = Soup(candidates.bests, candidates.store, candidates.predictions, device)
    count, ids, true_NK = len(candidates.bests), candidates.store.val.ids, candidates.targets
    members = choose_soup(soup.predict, count, true_NK, _all(candidates))
    single = unseen_js_of_ensemble(candidates.predictions, ids, true_NK, 1)
    combined = unseen_js(lambda rows: choose_soup(soup.predict, count, true_NK, rows), soup.predict, ids, true_NK)
    return Combination(candidates, members, soup.predict(members), single, combined), soup.best(members)


def _all(candidates: Candidates) -> Any:
    return torch.ones(len(candidates.store.val), dtype=torch.bool).numpy()
