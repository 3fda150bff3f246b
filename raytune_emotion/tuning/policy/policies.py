"""Make the sampler and the scheduler of a study from their names."""

import functools
from collections.abc import Callable, Sequence

from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from raytune_emotion.learn.report import DriverReport
from raytune_emotion.tuning.policy.candidates import domain_of, is_exhausted
from raytune_emotion.tuning.policy.decisions import (
    FORECAST,
    FREEZE_THAW,
    Answer,
    Begin,
    Decision,
    Limits,
    Policy,
    Recorded,
)
from raytune_emotion.tuning.policy.freeze_thaw import FreezeThaw
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.sampler import ForecastSampler, make_sampler
from raytune_emotion.tuning.policy.scheduler import STOPPING, Scheduler, replay
from raytune_emotion.tuning.space.space import Space


class BeginAndStop:
    """Begin the trials that the study's sampler proposes, and stop trials for good by a scheduler."""

    def __init__(self, space: Space, scheduler: Scheduler) -> None:
        self._domain, self._scheduler = domain_of(space), scheduler
        self._stopped: dict[str, int] = {}  # by an answer that may not be recorded: the report that it answers

    def next(self, past: Sequence[FrozenTrial], limits: Limits) -> Answer:
        if not limits.new or is_exhausted(self._domain, self._domain.tried(past)):
            return None
        return Begin({})

    def decide(self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        return "go on" if self._scheduler.keeps(trial_id, report) else "stop"

    def decide_again(
        self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits
    ) -> Decision:
        # The scheduler has had the report already.
        return "stop" if self._stopped.get(trial_id) == report["report"] else "go on"

    def replay(self, trials: Sequence[Recorded]) -> None:
        stopped = replay(self._scheduler, trials)
        self._stopped |= {trial.trial_id: trial.reports[-1]["report"] for trial in trials if trial.trial_id in stopped}


def make_sampler_of(inputs: PolicyInputs, name: str) -> Callable[[int], BaseSampler]:
    """Return a function that makes the sampler for a trial number. The name is one of `SAMPLERS`."""
    if name != FORECAST:
        return functools.partial(make_sampler, name, inputs.seed)
    sampler = ForecastSampler(
        inputs.space,
        seed=inputs.seed,
        objective=inputs.objective,
        earlier=inputs.earlier,
        reports=inputs.reports,
    )
    return lambda number: sampler


def make_policy(inputs: PolicyInputs, *, sampler: str = FORECAST, scheduler: str = FREEZE_THAW) -> Policy:
    """Make the policy of a study.

    Args:
        inputs: the study's part of the policy.
        sampler: name in `SAMPLERS`.
        scheduler: name in `SCHEDULERS`.
    """
    if scheduler != FREEZE_THAW:
        return BeginAndStop(inputs.space, STOPPING[scheduler](inputs.epochs, inputs.objective))
    return FreezeThaw(inputs, proposes=sampler == FORECAST)
