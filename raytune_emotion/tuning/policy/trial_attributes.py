"""The attributes that this project sets on Optuna's trials, and what follows from them."""

import copy
import math

from optuna.trial import FrozenTrial, TrialState

SETTINGS = "settings"  # its configuration, by dotted path
COST = "cost"  # where one counts
PAUSED = "paused"  # whether it is paused, for which Optuna has no state but `RUNNING`
SECONDS = "seconds"  # that it had trained at the report by which it last paused or ended
TAKEN_UP = "taken_up"  # how often it was taken up to train
DRIVER = "driver"  # that runs it, where a study has several
START = "start"  # whether it is a start point of the study's space
CONTINUES = "continues"  # the trial that it goes on from
CONFIRMS = "confirms"  # of a confirmation: the trial of the other study that had its configuration first
REASON = "reason"  # why it failed
#: Attribute of an Optuna study: the expected further gain, in bits and seconds.
GAIN = "expected_gain"


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
