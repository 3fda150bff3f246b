"""The confirmation of a study: its best configurations, run again with fresh seeds, and what comes of it.

It is a study of its own within the folder of the one that it confirms, whose trials are all decided when it begins.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.policy.decisions import SETTINGS
from raytune_emotion.tuning.study.optuna_study import CONFIRMS
from raytune_emotion.tuning.study.records import TrialRecord, best_first
from raytune_emotion.tuning.study.spec import StudySpec

#: The confirmation's folder in that of its study, and its table there.
CONFIRMED = "confirmed"
STANDINGS = "confirmed.csv"

HEADINGS = ("trial", "mean JS, bits", "standard error", "seeds", "failed", "JS in the search")

_SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class Standing:
    """A configuration, and what it came to with each seed."""

    trial_id: str  # in the search
    searched_js: float  # there, bits
    runs: tuple[TrialRecord, ...]  # those that are complete, the best first
    failed: int

    @property
    def mean(self) -> float | None:
        """Of the runs' best validation JS, bits; None where there is none."""
        return statistics.fmean(self._js) if self.runs else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean, bits; None where there are not two runs."""
        n = len(self.runs)
        return statistics.stdev(self._js) / math.sqrt(n) if n > 1 else None

    @property
    def in_words(self) -> str:
        if self.standard_error is None:
            return f"{self.mean:.4f} bits (one seed)"
        n = len(self.runs)
        return f"{self.mean:.4f} ± {self.standard_error:.4f} bits (mean and standard error over {n} seeds)"

    @property
    def row(self) -> dict[str, Any]:
        """Of `confirmed.csv`; for people, it stands below `HEADINGS`."""
        return {
            "trial_id": self.trial_id,
            "mean_js": self.mean,
            "standard_error": self.standard_error,
            "seeds": len(self.runs),
            "failed": self.failed,
            "searched_js": self.searched_js,
        }

    @property
    def cells(self) -> list[str]:
        values = self.row.values()
        return ["" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]

    @property
    def median(self) -> TrialRecord:
        """The run in the middle; of two, the worse."""
        return self.runs[len(self.runs) // 2]

    @property
    def _js(self) -> list[float]:
        return [record.best["val_js"] for record in self.runs if record.best]


def best_configurations(records: Iterable[TrialRecord], count: int) -> list[TrialRecord]:
    """The best trial of each of the best configurations: one that went on from another has the same as that."""
    found: list[TrialRecord] = []
    for record in best_first([record for record in records if record.best and record.status != "failed"]):
        if len(found) < count and all(record.settings != other.settings for other in found):
            found.append(record)
    return found


def enqueue(study: optuna.Study, records: Sequence[TrialRecord], seeds: Iterable[int]) -> None:
    """Has a confirmation's Optuna study ask for each configuration with each seed, but for what it has already.

    Seed by seed: wherever it is broken off, the configurations have about as many runs each.
    """
    known = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    there = {(attributes[CONFIRMS], attributes[SETTINGS][_SEED]) for attributes in known}
    for seed in seeds:
        for record in records:
            if (record.trial_id, seed) not in there:
                settings = {**record.settings, _SEED: seed}
                study.enqueue_trial({}, user_attrs={SETTINGS: settings, CONFIRMS: record.trial_id})


def fresh_seeds(seed: int, count: int) -> list[int]:
    """The seeds after that of the study."""
    return [(seed + 1 + i) % 2**31 for i in range(count)]


def standings(spec: StudySpec, records: Sequence[TrialRecord]) -> list[Standing]:
    """How the configurations of a confirmation stand, the best mean first; those of which a run has failed come later,
    and last those without a complete run.
    """
    found = [
        Standing(
            trial_id,
            searched_js,
            tuple(best_first([r for r in records if r.confirms == trial_id and r.status == "complete"])),
            sum(r.confirms == trial_id and r.status == "failed" for r in records),
        )
        for trial_id, searched_js in (spec.confirms or {}).items()
    ]
    return sorted(found, key=lambda s: (not s.runs, s.failed, s.mean or 0.0))


def write_standings(folder: Path, found: Iterable[Standing]) -> None:
    """Writes `confirmed.csv`."""
    write_text(folder / STANDINGS, pd.DataFrame([standing.row for standing in found]).to_csv(index=False))
