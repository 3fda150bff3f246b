"""Draw the results of `rivals` and `policies` by budget: python -m benchmarks.curves.picture."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.curves.replay import BUDGET, SHARE, SPENT, WORKERS, found_at, read_rows
from benchmarks.policies import OURS
from benchmarks.rivals import KEPT, OF_RANDOM, RANDOM, RAY

PICTURE = Path("docs/policies.png")
COLOURS = {RANDOM: "#c9b79c", RAY: "#1f6f8b", OURS: "#d1495b"}
FACES = {"ferplus_small": "real faces", "drawn": "drawn faces"}


def main() -> None:
    picture({**read_rows(KEPT), **read_rows(KEPT.with_name("policies.json"))}).savefig(PICTURE, dpi=110)


def picture(rows: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> Figure:
    """Draw median and quartiles of the best JS by spent budget, for every set of curves and number of workers."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.subplots(len(FACES), len(WORKERS), sharex=True, sharey="row")
    for (row, name), (column, workers) in product(enumerate(FACES), enumerate(WORKERS)):
        axes: Axes = grid[row, column]
        for policy, colour in COLOURS.items():
            found = rows[name, "surrogate", workers, policy]
            median, low, high = np.array([[found[each] for each in found_at(share)] for share in SPENT]).T
            full_trials = BUDGET * np.array(SPENT)
            axes.plot(full_trials, median, color=colour, label=policy, linewidth=2)
            axes.fill_between(full_trials, low, high, color=colour, alpha=0.15, linewidth=0)
        goal = rows[name, "surrogate", workers, RANDOM][OF_RANDOM]
        axes.axhline(goal, color=COLOURS[RANDOM], linestyle=":", label=f"{RANDOM}, after {BUDGET}")
        axes.set_title(f"{FACES[name]}, {workers} workers", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(full_trials, [f"{each:g}" for each in full_trials])
    for row, name in enumerate(FACES):
        # Limit the axis: the high values of the beginning would compress the rest.
        last = [
            rows[name, "surrogate", workers, policy][found_at(SHARE)[0]]
            for workers, policy in product(WORKERS, COLOURS)
        ]
        grid[row, 0].set_ylim(0.9 * min(last), 1.15 * max(last))
    figure.supxlabel("spent, in full trials", fontsize=9)
    figure.supylabel("best validation JS, bits", fontsize=9)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    return figure


if __name__ == "__main__":
    main()
