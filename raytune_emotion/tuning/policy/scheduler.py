"""Which trials are stopped early, and how the rungs are filled again when a study goes on."""

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytune_emotion.learn.report import OBJECTIVE, Report
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective


class Recorded(Protocol):
    """What a scheduler must know of a trial of the past."""

    @property
    def trial_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reports(self) -> Sequence[Report]: ...


# ASHA asks neither its controller nor anything of a trial but its id.
_NO_CONTROLLER: Any = None


def make_scheduler(most_reports: int, objective: Objective = JS_ALONE) -> TrialScheduler:
    """Asynchronous successive halving on the best validation JS, with the number of reports as its clock.

    A third of the trials passes the first rung, which is at a third of the length: before, the order of trials says
    little of their order at the end, as the recorded curves show (`benchmarks/curves`).

    Args:
        most_reports: of a trial that is not stopped.
        objective: of the study. For a front, trials are compared with those of about their cost alone: beside large
            models every small one would be stopped.
    """
    asha = functools.partial(
        ASHAScheduler,
        time_attr="report",
        metric=OBJECTIVE,
        mode="min",
        max_t=most_reports,
        grace_period=math.ceil(most_reports / 3),
        reduction_factor=3,
    )
    return _AmongAlike(asha, objective.cost) if objective.front and objective.cost else asha()


class _AmongAlike(FIFOScheduler):
    """A scheduler for every doubling of the cost."""

    def __init__(self, make: Callable[[], TrialScheduler], cost: Callable[[Report], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._make, self._cost = make, cost
        self._schedulers: dict[int, TrialScheduler] = {}
        self._joined: dict[str, TrialScheduler] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Report) -> str:
        if "report" not in result:
            # It has failed, or the study breaks off.
            return TrialScheduler.CONTINUE
        if trial.trial_id not in self._joined:
            # By its first report, lest a rate that varies move it.
            doubling = math.floor(math.log2(self._cost(result)))
            if doubling not in self._schedulers:
                self._schedulers[doubling] = self._make()
            self._joined[trial.trial_id] = self._schedulers[doubling]
            self._joined[trial.trial_id].on_trial_add(tune_controller, trial)
        return self._joined[trial.trial_id].on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Report) -> None:
        if trial.trial_id in self._joined:
            self._joined.pop(trial.trial_id).on_trial_complete(tune_controller, trial, result)


def replay(scheduler: TrialScheduler, records: Sequence[Recorded]) -> set[str]:
    """Fills a new scheduler's rungs with what trials have reported, in the order of time.

    Ray's own restoring forgets the rungs of a scheduler.

    Returns:
        The running trials that the scheduler does not let go on: they were stopped when the study broke off.
    """
    stopped: set[str] = set()
    added: set[str] = set()
    running = {
        record.trial_id: record.reports[-1] for record in records if record.status == "running" and record.reports
    }
    reports = [(report, record.trial_id) for record in records for report in record.reports]
    for report, trial_id in sorted(reports, key=lambda item: item[0]["time"]):
        trial: Any = SimpleNamespace(trial_id=trial_id)
        if trial_id not in added:
            scheduler.on_trial_add(_NO_CONTROLLER, trial)
            added.add(trial_id)
        # What has reported again was let go on, by rungs that some whose reports are older had not come to yet.
        goes_on = scheduler.on_trial_result(_NO_CONTROLLER, trial, report) != TrialScheduler.STOP
        if not goes_on and report is running.get(trial_id):
            stopped.add(trial_id)
    return stopped
