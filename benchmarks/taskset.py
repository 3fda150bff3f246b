"""Compare search policies on tasks of Taskset: learning curves of models and data that are not this project's.

    python -m benchmarks taskset FOLDER [--workers W] [--seeds S] [--steps N] [--policies A,B] [--json FILE]

Each file of the folder is a task: 1,000 configurations of an optimizer with 8 numbers each, and 51 validations per
configuration (Metz et al., 2020, "Using a thousand optimization tasks to learn hyperparameter search strategies"). A
step is one validation. Values are regrets: 0 is the best recorded value, 1 the median after one step.
"""

import argparse
import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import FloatDistribution

from benchmarks.judge import Recording, add_arguments, policies_of, run
from raytune_emotion.errors import UserError
from raytune_emotion.tuning.space.space import Space

#: Numbers of a configuration, and whether they were drawn logarithmically.
SETTINGS = {
    "learning_rate": True, "beta1": False, "beta2": False, "epsilon": True, "l1": True, "l2": True,
    "linear_decay": True, "exponential_decay": True,
}  # fmt: skip
#: Lower bound of numbers before the logarithm is taken.
_LEAST = 1e-12


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks taskset", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of files *.json or *.json.xz")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="validations of a study (default: 1000)")
    add_arguments(parser, seeds=3)
    args = parser.parse_args(arguments)
    names = policies_of(parser, args)
    files = sorted(file for file in args.folder.glob("*.json*") if file.name.endswith((".json", ".json.xz")))
    if not files:
        parser.error(f"{args.folder}: holds no *.json or *.json.xz; name a folder of tasks")
    try:
        tasks = [read_task(file, args.steps) for file in files]
    except UserError as error:
        parser.error("; ".join(error.faults))
    title = f"regret on {len(tasks)} tasks, {args.workers} workers, {args.steps} validations, {args.seeds} seeds"
    run(tasks, names, args, title)
    return 0


def read_task(file: Path, steps: int) -> Recording:
    """Read a task.

    Raises:
        UserError: the file is not a task.
    """
    try:
        with lzma.open(file, "rt") if file.suffix == ".xz" else file.open() as stream:
            rows: list[dict[str, Any]] = json.load(stream)
        x_ND = np.array([[row["hp"][name] for name in SETTINGS] for row in rows], float)
        value_NR = np.array([row["valid"]["loss"] for row in rows], float)
        worst = value_NR[np.isfinite(value_NR)].max()
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise UserError(f"{file}: is no task of Taskset ({type(error).__name__}: {error}); move it away") from None
    kept_N = np.isfinite(x_ND).all(axis=1)
    x_ND, value_NR = x_ND[kept_N], value_NR[kept_N]
    # A diverged configuration counts as the worst value.
    value_NR = np.where(np.isfinite(value_NR), value_NR, worst)
    x_ND = np.where([*SETTINGS.values()], np.maximum(x_ND, _LEAST), x_ND)
    space = Space({
        name: FloatDistribution(float(x_ND[:, at].min()), float(x_ND[:, at].max()), log=log)
        for at, (name, log) in enumerate(SETTINGS.items())
    })  # fmt: skip
    params = [dict(zip(SETTINGS, map(float, x_D), strict=True)) for x_D in x_ND]
    bounds = float(value_NR.min()), float(np.median(value_NR[:, 0]))
    best_NR = np.minimum.accumulate(value_NR, axis=1)
    name = file.name.partition(".")[0]
    return Recording(name, space, params, best_NR, np.ones_like(best_NR), steps, 0.0, choose=True, bounds=bounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
