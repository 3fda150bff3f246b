"""Measure the time from a report to the next step of training, in studies that have ended.

    python -m benchmarks continuing STUDY…

The next step is one of the same trial, or a place becomes free and a new or a paused trial begins there, in the same
process. This time contains the decision, Ray and the checkpoint.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from benchmarks import table_console
from raytune_emotion.tuning.policy.freeze_thaw import TAKE_UP_S
from raytune_emotion.tuning.policy.trial_attributes import TAKEN_UP
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.tables import CURVES
from raytune_emotion.tuning.study.trials import trial_id_of

SAME, NEW, PAUSED = "the same trial", "a new trial", "a paused trial"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks continuing", description=str(__doc__).splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY", help="folder of a study that ran in one go")
    args = parser.parse_args(arguments)
    table = Table(
        "study", "trained next", "times", "median, s", "least", "most",
        title=f"seconds until it trains; simulations assume {TAKE_UP_S:g} s for a paused trial", box=box.SIMPLE,
    )  # fmt: skip
    for folder in args.studies:
        taken_up = {trial_id_of(each.number): each.user_attrs.get(TAKEN_UP, 0) for each in load_study(folder).trials}
        for kind, waits in waits_of(pd.read_parquet(folder / CURVES), taken_up).items():
            numbers = (median(waits), min(waits), max(waits)) if waits else ()
            table.add_row(folder.name, kind, str(len(waits)), *(f"{number:.2f}" for number in numbers))
    table_console().print(table)
    return 0


def waits_of(curves: pd.DataFrame, taken_up: Mapping[str, int]) -> dict[str, list[float]]:
    """Return the seconds from a report to the next training, by what is trained next.

    Args:
        curves: reports of the trials of a study.
        taken_up: how often each trial was taken up after a pause: this often it waited longest after its reports.
    """
    waits: dict[str, list[float]] = {SAME: [], NEW: [], PAUSED: []}
    begun: list[tuple[float, str]] = []  # times at which a trial began to use a place
    freed: list[float] = []  # times at which a place became free
    for trial_id, rows in curves.sort_values("report").groupby("trial_id"):
        end_R = rows["time"].to_numpy(float)
        start_R = end_R - np.diff(rows["seconds"].to_numpy(float), prepend=0.0)
        wait_R = start_R[1:] - end_R[:-1]
        longest = {*np.argsort(-wait_R, kind="stable")[: taken_up.get(str(trial_id), 0)].tolist()}
        begun += [(start_R[0], NEW), *((start_R[number + 1], PAUSED) for number in longest)]
        freed += [*(end_R[number] for number in longest), end_R[-1]]
        waits[SAME] += [wait for number, wait in enumerate(wait_R.tolist()) if number not in longest]
    freed.sort()
    # The first trials find free places.
    later = sorted(each for each in begun if each[0] > freed[0])
    for (start, kind), end in zip(later, freed, strict=False):
        waits[kind].append(start - end)
    return waits


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
