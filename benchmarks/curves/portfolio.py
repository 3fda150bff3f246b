"""Choose the portfolio, with which searches begin, from the recorded curves.

    python -m benchmarks.curves.portfolio

From each set of curves, 32 configurations are kept with their best JS, from the best to the worst in even steps of
their rank. A forecast from them ranks the others. The program prints Spearman's rank correlations, also for other
numbers of configurations and for only the best ones. The best ones alone do not show which configurations to avoid.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from benchmarks import table_console
from benchmarks.curves.replay import CURVES, SPACE
from benchmarks.curves.response import Recorded, read_curves
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.policy.forecast import Curve, Forecast
from raytune_emotion.tuning.policy.gaussian_process import Floats
from raytune_emotion.tuning.policy.portfolio import PORTFOLIO, RECORDED
from raytune_emotion.tuning.space.parser import load_space

#: Number of kept configurations per set of curves.
KEPT = 32
#: Number of digits of the kept numbers.
_DIGITS = 4


def main() -> int:
    space = load_space(SPACE)
    curves = {file.stem: read_curves(file, space) for file in sorted(CURVES.glob("*.parquet"))}
    searched = {key: its for key, its in space.to_dict().items() if key == "when" or isinstance(its, Mapping)}
    parts = [_part(name, recorded, searched) for name, recorded in curves.items()]
    # Write one configuration per line.
    text = json.dumps(parts, separators=(",", ":")).replace("[[{", "[\n[{").replace("],[", "],\n[")
    write_text(PORTFOLIO, text.replace("}]]}", "}]\n]}") + "\n")
    _show(curves)
    return 0


def spread(recorded: Recorded, count: int) -> list[int]:
    """Return the numbers of `count` configurations, in even steps of their rank."""
    order = np.argsort(best_js(recorded))
    chosen: list[int] = order[np.linspace(0, len(order) - 1, count).astype(int)].tolist()
    return chosen


def best_js(recorded: Recorded) -> Floats:
    """Return the best JS of every configuration, [N]."""
    best_N: Floats = recorded.js_NR.min(axis=1)
    return best_N


def _part(name: str, recorded: Recorded, searched: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of the portfolio: the name of the data, and settings and JS of each configuration."""
    js_N = best_js(recorded)
    rows = [
        [{key: _rounded(value) for key, value in recorded.settings[number].items()}, {"1": _rounded(js_N[number])}]
        for number in spread(recorded, KEPT)
    ]
    return {RECORDED: name, "space": searched, "trials": rows}


def _rounded(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _show(curves: Mapping[str, Recorded]) -> None:
    """Print how well forecasts rank unseen configurations."""
    table = Table("portfolio of", "configurations", *(f"ranks {name}" for name in curves), box=box.SIMPLE)
    for name, recorded in curves.items():
        order = np.argsort(best_js(recorded)).tolist()
        chosen = {f"{count} of all ranks": spread(recorded, count) for count in (8, 16, 24, KEPT, 48, 100)}
        chosen |= {f"the best {count}": order[:count] for count in (KEPT, 100)}
        for label, numbers in chosen.items():
            js_N = best_js(recorded)
            seen = [Curve(recorded.settings[number], {1: float(js_N[number])}) for number in numbers]
            forecast = Forecast(recorded.encoding, seen)
            ranks = (_correlation(forecast, each, numbers if each is recorded else []) for each in curves.values())
            table.add_row(name, label, *(f"{rank:.2f}" for rank in ranks))
    table_console().print(table)


def _correlation(forecast: Forecast, recorded: Recorded, seen: Sequence[int]) -> float:
    """Return Spearman's rank correlation of the forecasts for unseen configurations with their values."""
    left = sorted({*range(len(recorded.settings))} - {*seen})
    mean_M, _ = forecast([recorded.settings[number] for number in left])
    return float(pd.Series(mean_M).corr(pd.Series(best_js(recorded)[left]), method="spearman"))


if __name__ == "__main__":
    sys.exit(main())
