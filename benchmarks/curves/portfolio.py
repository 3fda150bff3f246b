"""Choose the portfolio that searches begin with from the recorded curves.

    python -m benchmarks.curves.portfolio

Of each set of curves 32 configurations are kept, from the best to the worst in even steps of their rank, each with its
best JS after the time that a random one takes to its end: a search should first have a good model soon, and begin the
slow ones when it knows more. A forecast that has seen them ranks the others; printed are the rank correlations, for
other numbers of configurations and for the best ones alone, too. The best alone say nothing of what to avoid.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.curves.replay import CURVES, SPACE
from benchmarks.curves.response import Recorded, read_curves
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.policy.forecast import Curve, Forecast
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.policy.portfolio import PORTFOLIO, RECORDED
from raytune_emotion.tuning.space.parser import load_space

#: Configurations of a set of curves.
KEPT = 32
#: Digits of the numbers that are kept.
_DIGITS = 4


def main() -> int:
    space = load_space(SPACE)
    curves = {file.stem: read_curves(file, space) for file in sorted(CURVES.glob("*.parquet"))}
    searched = {key: its for key, its in space.to_dict().items() if key == "when" or isinstance(its, Mapping)}
    parts = [_part(name, recorded, searched) for name, recorded in curves.items()]
    # One configuration a line.
    text = json.dumps(parts, separators=(",", ":")).replace("[[{", "[\n[{").replace("],[", "],\n[")
    write_text(PORTFOLIO, text.replace("}]]}", "}]\n]}") + "\n")
    _show(curves)
    return 0


def spread(recorded: Recorded, count: int) -> list[int]:
    """Return the numbers of some configurations, in even steps of their rank."""
    order = np.argsort(js_in_time(recorded))
    chosen: list[int] = order[np.linspace(0, len(order) - 1, count).astype(int)].tolist()
    return chosen


def js_in_time(recorded: Recorded) -> Floats:
    """Return the best JS of N configurations after the time that a random one takes to its end, or its first one."""
    best_NR = np.minimum.accumulate(recorded.js_NR, axis=1)
    in_time_N = (np.cumsum(recorded.seconds_NR, axis=1) <= recorded.mean_seconds).sum(axis=1)
    js_N: Floats = best_NR[np.arange(len(best_NR)), np.maximum(in_time_N, 1) - 1]
    return js_N


def _part(name: str, recorded: Recorded, searched: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of the portfolio: what was recorded, and of each configuration the settings and the JS."""
    js_N = js_in_time(recorded)
    rows = [
        [{key: _rounded(value) for key, value in recorded.settings[number].items()}, {"1": _rounded(js_N[number])}]
        for number in spread(recorded, KEPT)
    ]
    return {RECORDED: name, "space": searched, "trials": rows}


def _rounded(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _show(curves: Mapping[str, Recorded]) -> None:
    """Print how well forecasts rank configurations that they have not seen."""
    table = Table("portfolio of", "configurations", *(f"ranks {name}" for name in curves), box=box.SIMPLE)
    for name, recorded in curves.items():
        order = np.argsort(js_in_time(recorded)).tolist()
        chosen = {f"{count} of all ranks": spread(recorded, count) for count in (8, 16, 24, KEPT, 48, 100)}
        chosen |= {f"the best {count}": order[:count] for count in (KEPT, 100)}
        for label, numbers in chosen.items():
            js_N = js_in_time(recorded)
            seen = [Curve(recorded.settings[number], {1: float(js_N[number])}) for number in numbers]
            forecast = Forecast(recorded.encoding, seen)
            ranks = (_correlation(forecast, each, numbers if each is recorded else []) for each in curves.values())
            table.add_row(name, label, *(f"{rank:.2f}" for rank in ranks))
    Console().print(table)


def _correlation(forecast: Forecast, recorded: Recorded, seen: Sequence[int]) -> float:
    """Return Spearman's rank correlation of what is forecast of the configurations that were not seen."""
    left = sorted({*range(len(recorded.settings))} - {*seen})
    mean_M, _ = forecast([recorded.settings[number] for number in left])
    return float(pd.Series(mean_M).corr(pd.Series(js_in_time(recorded)[left]), method="spearman"))


if __name__ == "__main__":
    sys.exit(main())
