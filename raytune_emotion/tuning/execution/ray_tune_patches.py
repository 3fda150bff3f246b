"""Contain all uses of private interfaces of Ray Tune, each with its reason.

`tests/tuning/execution/test_ray_contract.py` names each of them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ray
import ray.tune.tune
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment, Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.progress_reporter import TrialProgressCallback

#: Attribute that marks a Ray Tune trial whose process must not run another trial.
_FORGET = "raytune_emotion_forget"
#: Part of Ray's message about a process that its memory monitor has killed.
LOW_MEMORY = "running low on memory"
#: Largest length of a reason, characters. Ray adds long advice to its messages.
_LONGEST_REASON = 240


class PlainTrainable(tune.Trainable):
    """Represent in the driver an actor that is not a `Trainable`, so that it need not import Ray Tune.

    That import takes 0.3 core-seconds and 90 MB.
    """

    actor: type
    environment: ClassVar[dict[str, str]] = {}  # environment variables of the actor's process


class _ActorClasses:
    """Replace Tune's cache of actor classes."""

    def __init__(self) -> None:
        self._found: dict[type[PlainTrainable], Any] = {}

    def get(self, trainable: type[PlainTrainable]) -> Any:
        if trainable not in self._found:
            # A process with its own environment cannot be one that Ray has already started.
            options = {"runtime_env": {"env_vars": trainable.environment}} if trainable.environment else {"num_cpus": 0}
            self._found[trainable] = ray.remote(**options)(trainable.actor)
        return self._found[trainable]


def _own_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the entries that Tune adds, which only Ray Tune can read."""
    return {key: value for key, value in config.items() if not key.startswith("__")}


class _ActorManager(RayActorManager):
    """Treat an actor that Ray's memory monitor has killed as one that died.

    Tune does not know the monitor's error, and would end the study.
    """

    def add_actor(self, cls: Any, kwargs: dict[str, Any], resource_request: Any, **hooks: Any) -> Any:
        return super().add_actor(cls, {"config": _own_settings(kwargs["config"])}, resource_request, **hooks)

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            # The first line is sufficient. The others, about the use of memory, are also in Ray's logs.
            exception = RayActorError(error_msg=str(exception).splitlines()[0])
        super()._actor_task_failed(tracked_actor_task, exception)


class _Controller(TuneController):
    """Restart a trial whose process died before it began to run the trial, for example between two trials.

    Tune gets two messages about such a death, and takes the second for the death of a trial that cannot be restarted.

    This class also ends the process of a trial whose node ends soon; Tune would give it the next trial.

    It also forgets ended trials; Tune would keep 45 KiB of each, and iterate over all of them at every event.
    """

    _newest_failure: Exception | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._class_cache: Any = _ActorClasses()

    def _schedule_trial_task(self, trial: Trial, method_name: str, *args: Any, **options: Any) -> Any:
        if method_name == "reset":
            options |= {"args": (_own_settings(options["args"][0]),), "kwargs": {}}
        return super()._schedule_trial_task(trial, method_name, *args, **options)

    def step(self) -> None:
        super().step()  # type: ignore[no-untyped-call]
        ended = self._stopped_trials | self._failed_trials
        if ended:
            self._trials = [trial for trial in self._trials if trial not in ended]
            for kept in (self._stopped_trials, self._failed_trials, self._trials_to_cache):
                kept.difference_update(ended)
            for trial in ended:
                self._trial_metadata.pop(trial.trial_id, None)

    def _maybe_cache_trial_actor(self, trial: Trial) -> bool:
        return not hasattr(trial, _FORGET) and super()._maybe_cache_trial_actor(trial)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if exception is self._newest_failure:
            return
        self._newest_failure = exception
        if trial in self._resetting_trials:
            self._resetting_trials.discard(trial)
            # Tune does the same for a process that dies during its start.
            self._set_trial_status(trial, Trial.RUNNING)
            if trial in self._staged_trials:
                # The process is alive, but failed to leave its previous trial. Unstaging prevents an endless wait.
                self._unstage_trial_with_resources(trial)
        super()._trial_task_failure(trial, exception)


def forget_actor(trial: Trial) -> None:
    """Let the process of a trial end with the trial."""
    setattr(trial, _FORGET, True)


@contextlib.contextmanager
def patch_tune() -> Iterator[None]:
    """Let `tune.run` use these classes within the block."""
    places = [(tune_controller, "RayActorManager", _ActorManager), (ray.tune.tune, "TuneController", _Controller)]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, replacement in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), own in zip(places, before, strict=True):
            setattr(module, name, own)


def make_trial(experiment: Experiment, trial_id: str, config: dict[str, Any], settings: Mapping[str, Any]) -> Trial:
    """Make a Ray Tune trial with this project's id. Tune itself draws ids at random."""
    trial: Trial = _create_trial_from_spec(
        {**experiment.spec, "config": config},
        _make_parser(),
        evaluated_params=settings,
        experiment_tag=trial_id,
        trial_id=trial_id,
    )
    return trial


def newest_error(trial: Trial) -> str:
    """Return the reason why a trial's process ended the last time, as one line without Ray's advice."""
    # The trial's own method is not used: it reads a copy that may not exist yet.
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(encoding="utf-8") if file is not None and file.exists() else "killed"
    lines = text.rpartition("Failure #")[2].strip().splitlines()
    line = next((line for line in lines if LOW_MEMORY in line), lines[-1])
    if len(line) <= _LONGEST_REASON:
        return line
    start = line[:_LONGEST_REASON]
    return start[: start.rfind(". ") + 1] or f"{start} …"


class QuietProgress(TrialProgressCallback):
    """Replace Tune's own progress report, which prints nothing here but would keep every trial in memory."""

    def log_result(self, trial: Trial, result: dict[str, Any], error: bool = False) -> None:
        pass

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        pass
