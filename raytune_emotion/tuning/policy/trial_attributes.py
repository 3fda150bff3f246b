"""Define the attributes that this project sets on Optuna's trials, and what follows from them."""

import copy
import math
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

SETTINGS = "settings"  # configuration, by dotted path
COST = "cost"  # cost, if the objective has one
PAUSED = "paused"  # whether the trial is paused; Optuna has no such state, and calls it running
SECONDS = "seconds"  # seconds of training until it last paused or ended
TAKEN_UP = "taken_up"  # how often it was resumed to train
RESUMED_IN = "resumed_in"  # seconds for which nothing was trained before it was last resumed
DRIVER = "driver"  # driver that runs it, if a study has several
START = "start"  # whether it is a start point of the study's space
CONTINUES = "continues"  # trial from whose checkpoint it continues
CONFIRMS = "confirms"  # in a confirmation: trial of the search that has the same configuration
REASON = "reason"  # reason of its failure
#: Attributes of an Optuna study: the expected further gain, in bits and seconds; and, after its epochs were raised, the
#: number of its first trial that no longer completes at the old end.
GAIN, RAISED = "expected_gain", "raised_before"


def is_running(trial: FrozenTrial) -> bool:
    """Tell whether a trial trains now."""
    return trial.state == TrialState.RUNNING and not trial.user_attrs.get(PAUSED)


def is_paused(trial: FrozenTrial) -> bool:
    """Tell whether a trial is paused, so that it can be resumed."""
    return trial.state == TrialState.RUNNING and bool(trial.user_attrs.get(PAUSED))


def count_reports(trial: FrozenTrial) -> int:
    """Return the number of a trial's last report; 0 before the first."""
    return max(trial.intermediate_values, default=0)


def reports_left(trial: FrozenTrial, reports: int) -> int:
    """Return the number of reports that a trial lacks to its end, at least one."""
    return max(1, reports - count_reports(trial))


def has_whole_trial(past: Sequence[FrozenTrial], reports: int, raised: int) -> bool:
    """Tell whether a trial was trained to its end, which comes before its last report if its JS rises for long.

    Args:
        past: trials that have begun.
        reports: reports of a trial without early stopping.
        raised: number of the first trial that completes at this end, not at an earlier one.
    """
    return any(
        count_reports(trial) >= reports or (trial.state == TrialState.COMPLETE and trial.number >= raised)
        for trial in past
    )


def as_paused(trial: FrozenTrial, seconds: float | None = None) -> FrozenTrial:
    """Return a trial as it would be recorded if it paused now, with its seconds of training if they are known.

    What is recorded of a trial that runs are the seconds until it last paused, and it has reported since.
    """
    paused = copy.copy(trial)
    known = {name: value for name, value in trial.user_attrs.items() if name != SECONDS}
    paused.user_attrs = {**known, PAUSED: True, **({} if seconds is None else {SECONDS: seconds})}
    return paused


def best_js(trial: FrozenTrial) -> float:
    """Return the lowest validation JS that a trial has reported, bits; infinity before its first report."""
    return min(trial.intermediate_values.values(), default=math.inf)


def result_of(trial: FrozenTrial) -> float:
    """Return the value of a complete trial, and of any other one its last finite report; NaN if there is none."""
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return trial.value
    finite = {step: value for step, value in trial.intermediate_values.items() if math.isfinite(value)}
    return finite[max(finite)] if finite else math.nan
