"""Ray Tune, mended: the death of one process ends neither a trial nor the study, and ended trials cost nothing more."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray.tune.tune
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial


class _ActorManager(RayActorManager):
    """Takes an actor that Ray's memory monitor has killed for one that died.

    The monitor ends it with an error that Tune does not know, at which it would end the study.
    """

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            # Its first line says it; the others, where memory went, are in Ray's logs too.
            exception = RayActorError(error_msg=str(exception).splitlines()[0])
        super()._actor_task_failed(tracked_actor_task, exception)


class _Controller(TuneController):
    """Restarts a trial whose process died before it had begun to run it, as when it died between two trials.

    Tune hears of such a death twice, and takes the second time for that of a trial that cannot be restarted.

    It also forgets trials that have ended: Tune would keep 45 KiB of each, and walk through all at every event.
    """

    _newest_failure: Exception | None = None

    def step(self) -> None:
        super().step()  # type: ignore[no-untyped-call]
        ended = self._stopped_trials | self._failed_trials
        if ended:
            self._trials = [trial for trial in self._trials if trial not in ended]
            for kept in (self._stopped_trials, self._failed_trials, self._trials_to_cache):
                kept.difference_update(ended)
            for trial in ended:
                self._trial_metadata.pop(trial.trial_id, None)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if exception is self._newest_failure:
            return
        self._newest_failure = exception
        if trial in self._resetting_trials:
            self._resetting_trials.discard(trial)
            # As Tune itself does for a process that dies in its making.
            self._set_trial_status(trial, Trial.RUNNING)
            if trial in self._staged_trials:
                # Its process lives, which has failed to leave the trial before; else it would wait for that for ever.
                self._unstage_trial_with_resources(trial)
        super()._trial_task_failure(trial, exception)


@contextlib.contextmanager
def mended_tune() -> Iterator[None]:
    """Lets `tune.run` use the above."""
    places = [(tune_controller, "RayActorManager", _ActorManager), (ray.tune.tune, "TuneController", _Controller)]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, mended in places:
        setattr(module, name, mended)
    try:
        yield
    finally:
        for (module, name, _), own in zip(places, before, strict=True):
            setattr(module, name, own)


def forget_token() -> None:
    """Have Ray read anew whether it is to use a token, and which: it keeps both for the whole process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
