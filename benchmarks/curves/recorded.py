"""Compare search policies on recorded learning curves of a search space of this project.

    python -m benchmarks curves FILE.csv… --space SPACE.yaml [--start-points] [--trials N] [--workers W] [--json FILE]

A file has a row for every evaluation of a trial, with the columns `trial`, one per setting of the space by its dotted
path, `epoch`, `seconds` (of training, since the trial began) and `val_js`. Further columns are ignored. Files of
`benchmarks.curves.record` are accepted, too. Trials that ended before the others are left out. A study has the time of
a quarter of the trials: it begins more trials than it trains to the end. With `--trials N`, it begins at most N trials,
and has the time of N mean ones. If a start point leaves settings out, they are drawn at random.

`default` begins with the portfolio, as a study of this space does, but without the part with the name of the file.
`no-portfolio` is the default without a portfolio. `misled` has one in which the best configuration has the JS of the
worst, and so on. `no-lengths` has no portfolio, and the same prior of the length scale for every setting. Differences
are those from the policy that is named first.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from benchmarks.judge import Recording, add_arguments, policies_of, run
from raytune_emotion.data.faces import shown
from raytune_emotion.errors import UserError
from raytune_emotion.tuning.policy.freeze_thaw import TAKE_UP_S
from raytune_emotion.tuning.space.library import find_space
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space, draw

_TRIAL, _EPOCH, _SECONDS, _JS = "trial", "epoch", "seconds", "val_js"
#: Names of these columns in files of `benchmarks.curves.record`.
_OWN = {"configuration": _TRIAL, "core_seconds": _SECONDS}
#: Time of a study, as a share of the time of all recorded trials.
_SHARE = 1 / 4


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks curves", description=str(__doc__).splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="recorded curves, as CSV or *.parquet")
    parser.add_argument("--space", required=True, metavar="SPACE", help="the space that they were drawn from")
    parser.add_argument("--start-points", action="store_true", help="begin every study with those of the space")
    parser.add_argument("--trials", type=int, metavar="N", help="trials of a study, whose time it has")
    add_arguments(parser, seeds=10)
    args = parser.parse_args(arguments)
    if args.trials is not None and args.trials < 1:
        parser.error("--trials: must be at least 1")
    names = policies_of(parser, args)
    try:
        space = load_space(find_space(args.space))
        recordings = [read_recording(file, space, args.trials) for file in args.files]
        if args.start_points:
            # A start point may be a part of a configuration.
            points = [params_of(space, settings) for settings in draw(space, len(space.start), seed=0)]
            recordings = [dataclasses.replace(each, start=points) for each in recordings]
    except UserError as error:
        parser.error("; ".join(error.faults))
    count = ", ".join(f"{len(each.params)} trials of {each.name}" for each in recordings)
    rest = f", the time of {args.trials} trials" if args.trials else ""
    rest += ", begun with the start points" if args.start_points else ""
    run(recordings, names, args, f"best JS, bits, on {count}, {args.workers} workers, {args.seeds} seeds{rest}")
    return 0


def read_recording(file: Path, space: Space, trials: int | None = None) -> Recording:
    """Read the curves of trials.

    Args:
        trials: number of trials that a study may begin, in the mean time of so many; None: all, in the time of a
            quarter of them.

    Raises:
        UserError: a column is missing, a value is wrong, or no two trials can be compared.
    """
    try:
        table = pd.read_parquet(file).rename(columns=_OWN) if file.suffix == ".parquet" else pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; name a table of curves") from None
    missing = [name for name in (_TRIAL, _EPOCH, _SECONDS, _JS, *space.columns()) if name not in table.columns]
    if missing:
        raise UserError(f"{file}: has no column {', '.join(missing)}; name the space that its trials were drawn from")
    if faults := _faults_of(table):
        raise UserError(f"{file}: {fault}" for fault in faults)
    table = table.astype({_EPOCH: float, _SECONDS: float, _JS: float})
    groups = [rows.sort_values(_EPOCH) for _, rows in table.groupby(_TRIAL, sort=True)]
    reports = max(map(len, groups), default=0)
    whole = [rows for rows in groups if len(rows) == reports and np.isfinite(rows[[_SECONDS, _JS]]).all(axis=None)]
    if len(whole) < 2:
        raise UserError(f"{file}: holds fewer than two trials of {reports} evaluations; record more")
    value_NR = np.minimum.accumulate([rows[_JS].to_numpy(float) for rows in whole], axis=1)
    seconds_NR = np.diff([rows[_SECONDS].to_numpy(float) for rows in whole], axis=1, prepend=0.0)
    params = [_params_of_trial(file, space, rows) for rows in whole]
    budget = float(seconds_NR.sum()) * (_SHARE if trials is None else trials / len(whole))
    return Recording(file.stem, space, params, value_NR, seconds_NR, budget, TAKE_UP_S, choose=False, trials=trials)


def _faults_of(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each kind of wrong value in a table of curves. Empty values are not wrong."""
    faults = []
    for name in (_EPOCH, _SECONDS, _JS):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if (words := table[name][numbers.isna() & table[name].notna()].unique()).size:
            faults.append(f"{name}: {shown(str(words[0]))} is not a number; leave it empty if a trial diverged")
    if faults:
        return faults
    ordered = table.sort_values(_EPOCH, kind="stable")
    twice = ordered[ordered.duplicated([_TRIAL, _EPOCH])]
    falls = ordered[ordered.groupby(_TRIAL)[_SECONDS].diff() <= 0]
    for trial, epoch in zip(twice[_TRIAL][:1], twice[_EPOCH], strict=False):
        faults.append(f"trial {trial} has epoch {epoch:g} more than once; remove one of the rows")
    for trial, epoch in zip(falls[_TRIAL][:1], falls[_EPOCH], strict=False):
        faults.append(f"trial {trial}: {_SECONDS} do not rise until epoch {epoch:g}; they count from its beginning")
    return faults


def _params_of_trial(file: Path, space: Space, rows: pd.DataFrame) -> dict[str, Any]:
    params = params_of(space, {str(key): value for key, value in rows.iloc[0].items()})
    try:
        space.suggest(FixedTrial(params))
    except ValueError as error:
        message = str(error).partition(". ")[0]
        raise UserError(f"{file}: trial {rows[_TRIAL].tolist()[0]}: {message}; give it one for each setting") from None
    return params


def params_of(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return Optuna's parameters of a configuration. Values outside of the space are moved to its edge."""
    point = {key: _word(space, key, value) for key, value in settings.items() if not pd.isna(value)}
    drawn = space.parameters
    return {name: _inside(drawn[name], value) for name, value in space.params_of(point).items()}


def _word(space: Space, key: str, value: Any) -> Any:
    """Return a value in the form of the space. A table may hold 1 for 1.0, or True for true."""
    return next((listed for listed in space.values_of(key) if str(listed) == str(value) or listed == value), value)


def _inside(distribution: BaseDistribution, value: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return value
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    kind = int if isinstance(distribution, IntDistribution) else float
    return kind(min(max(value, distribution.low), distribution.high))
