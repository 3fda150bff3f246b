"""Run the trials of a study on the Ray cluster that this process has joined."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import FIFOScheduler

from raytune_emotion.interruption import check_interrupted, run_in_thread
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.atomic import scratch_folder
from raytune_emotion.terminal import short_path
from raytune_emotion.tuning.execution.capacity import Capacity
from raytune_emotion.tuning.execution.cluster import environment
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
from raytune_emotion.tuning.execution.job import job_of
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.ray_patches import count_waiting_groups
from raytune_emotion.tuning.execution.ray_tune_patches import PlainTrainable, patch_tune
from raytune_emotion.tuning.execution.recorder import Recorder, Watch
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.trial_actor import TrialActor
from raytune_emotion.tuning.execution.tune_adapter import BetweenEvents, Gate, Recovery, Search, Waiting
from raytune_emotion.tuning.study.open_study import OpenStudy

#: Between two looks at whether Ray Tune has ended, the cluster lives, and the time is over.
_LOOK_S = 0.2
#: Ray Tune gets so long to end trials in order; what it has not ended then ends with the session.
_END_S = 30.0
_END_OF_DEAD_S = 1.0
_WAITS_FOR_OTHERS = "waiting for the trials that other drivers run; what they leave is taken up here"


@dataclass(frozen=True)
class StudyRun:
    """What is run of a study: where, until when, and who hears of it."""

    #: With this process as its driver. Of a study at another location, nothing that it needs is in the folder alone
    #: while a trial runs: the record is there at every beginning and ending of one.
    study: OpenStudy
    placement: Placement  # of its trials
    time_budget: timedelta | None = None  # after which the study is left as it is then
    until_gain: float | None = None  # bits per hour; the study is left once less is expected of further training
    watch: Watch = lambda event: None  # hears of all that happens to trials
    say: Callable[[str], None] = lambda text: None  # tells the user why nothing happens
    failure: Callable[[], str] = lambda: ""  # says what of the cluster has died; empty while it lives


def run_study(run: StudyRun) -> None:
    """Run what is left to run of a study.

    Trials that have ended stay as they are; those that had begun go on from their checkpoints; new ones are asked for
    until the study has as many as its spec says, or its space as many as it has configurations.

    Raises:
        ClusterLost: the cluster has died.
        Breakdown: the record cannot be written, or one trial after the other has failed.
        KeyboardInterrupt: all until then is recorded.
    """
    recorder = Recorder(run.study, run.watch, until_gain=run.until_gain)
    try:
        if not recorder.broken:
            _run(recorder, run)
    finally:
        recorder.close()


def _run(recorder: Recorder, run: StudyRun) -> None:
    """Have Ray Tune run trials in a thread of its own, until it has no more, or has to stop.

    So this thread hears signals, and sees when the cluster has died: Ray Tune then waits for ever.
    """
    stop, errors = threading.Event(), list[BaseException]()
    deadline = time.monotonic() + run.time_budget.total_seconds() if run.time_budget else float("inf")
    # Ray Tune may still write into it when it is left.
    with scratch_folder() as scratch:

        def tune_trials() -> None:
            try:
                _tune(recorder, run, stop, str(scratch))
            except BaseException as error:  # else the study would seem to be over
                errors.append(error)

        ended = run_in_thread("tune", tune_trials)
        try:
            while not ended.is_set() and time.monotonic() < deadline and not recorder.shortfall:
                if lost := run.failure():
                    raise _cluster_lost(lost, run.study)
                check_interrupted()
                recorder.check()
                ended.wait(_LOOK_S)
            if time.monotonic() >= deadline:
                run.say("the time budget is spent: trials that run are left as they are")
            elif recorder.shortfall:
                run.say(recorder.shortfall)
        finally:
            stop.set()
            # It must not be inside Ray when this process leaves Ray, which would crash.
            ended.wait(_END_OF_DEAD_S if run.failure() else _END_S)
        if errors and not recorder.broken:
            of_ray = isinstance(errors[0], RayError | ConnectionError)
            if lost := run.failure() or (first_line(errors[0]) if of_ray else ""):
                raise _cluster_lost(lost, run.study) from errors[0]
            raise errors[0]


def _cluster_lost(what: str, study: OpenStudy) -> ClusterLost:
    place = short_path(study.folder) if study.copy.location.is_here(study.folder) else study.copy
    return ClusterLost(f"{what}; the study can be resumed: {place}")


def _tune(recorder: Recorder, run: StudyRun, stop: threading.Event, scratch: str) -> None:
    study, resources = run.study, run.placement.resources
    room = Capacity(run.placement, recorder.count_open, run.say)
    waiting = Waiting(lambda: run.say(_WAITS_FOR_OTHERS if recorder.waits else room.shortage()))
    # `Search` gives Tune no more trials than there is room for.
    pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(sys.maxsize)}
    search = Search(recorder, partial(job_of, study, resources), room, waiting, stop)
    # The process that drives the workers of a trial runs at once, whether or not there is room for them.
    count_unplaced = count_waiting_groups if resources.workers > 1 else lambda: 0
    with contextlib.closing(room), environment(pending), patch_tune():
        # Not through a Tuner, which adds but a pickle of everything to be restored from, as nothing is here.
        tune.run(
            _trainable(resources),
            name=study.folder.name,
            search_alg=search,
            scheduler=FIFOScheduler(),  # type: ignore[no-untyped-call]
            num_samples=study.spec.trials,
            reuse_actors=True,
            max_failures=study.spec.max_failures,  # since the newest report: see `Recovery`
            stop=Gate(recorder, search, stop),
            callbacks=[Recovery(), BetweenEvents(recorder, waiting, count_unplaced)],
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.trial_id,
            # What Tune writes of its own is of no use to us: the study's folder is the record.
            storage_path=scratch,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            raise_on_failed_trial=False,
            verbose=0,
        )


def _trainable(resources: Resources) -> Any:
    if resources.workers == 1:
        own = type("Trial", (PlainTrainable,), {"actor": TrialActor})
        return tune.with_resources(own, resources.per_worker)
    own = type("Trial", (PlainTrainable,), {"actor": TrialActor, "environment": {"RAY_TRAIN_V2_ENABLED": "1"}})
    # The process that drives the workers must not take a core that they need: it runs on the head node and takes none.
    return tune.with_resources(own, {"node:__internal_head__": 0.001})
