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
from raytune_emotion.tuning.policy.forecast import Forecast
from raytune_emotion.tuning.policy.freeze_thaw import FreezeThaw
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective
from raytune_emotion.tuning.policy.sampler import ForecastSampler, make_sampler
from raytune_emotion.tuning.policy.scheduler import STOPPING, Scheduler, replay
from raytune_emotion.tuning.space.space import Space


class BeginAndStop:
    """Begin the trials that the study's sampler proposes, and stop trials for good by a scheduler."""

    def __init__(self, space: Space, scheduler: Scheduler) -> None:
        self._domain, self._scheduler = domain_of(space), scheduler

    def next(self, past: Sequence[FrozenTrial], limits: Limits) -> Answer:
        if not limits.new or is_exhausted(self._domain, {self._domain.key_of(trial) for trial in past}):
            return None
        return Begin({})

    def decide(self, trial_id: str, report: DriverReport, past: Sequence[FrozenTrial], limits: Limits) -> Decision:
        return "go on" if self._scheduler.keeps(trial_id, report) else "stop"

    def replay(self, trials: Sequence[Recorded]) -> set[str]:
        return replay(self._scheduler, trials)


def make_sampler_of(
    space: Space,
    name: str,
    *,
    seed: int,
    objective: Objective = JS_ALONE,
    earlier: Sequence[Forecast] = (),
    reports: int = 1,
) -> Callable[[int], BaseSampler]:
    """Return a function that makes the sampler for a trial number. For the arguments see `make_policy`."""
    if name != FORECAST:
        return functools.partial(make_sampler, name, seed)
    sampler = ForecastSampler(space, seed=seed, objective=objective, earlier=earlier, reports=reports)
    return lambda number: sampler


def make_policy(
    space: Space,
    *,
    sampler: str = FORECAST,
    scheduler: str = FREEZE_THAW,
    epochs: float,
    reports: int,
    seed: int,
    objective: Objective = JS_ALONE,
    earlier: Sequence[Forecast] = (),
) -> Policy:
    """Make the policy of a study.

    Args:
        space: search space of the study.
        sampler: name in `SAMPLERS`.
        scheduler: name in `SCHEDULERS`.
        epochs: epochs of a trial that is trained to its end.
        reports: reports of such a trial.
        seed: seed of the study.
        objective: objective of the study.
        earlier: forecasts of other studies.
    """
    if scheduler != FREEZE_THAW:
        return BeginAndStop(space, STOPPING[scheduler](epochs, objective))
    return FreezeThaw(
        space,
        epochs=epochs,
        reports=reports,
        seed=seed,
        objective=objective,
        earlier=earlier,
        proposes=sampler == FORECAST,
    )
