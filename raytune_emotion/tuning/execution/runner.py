"""Run the trials of a study on the joined Ray cluster."""

import contextlib
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

from raytune_emotion.errors import Breakdown
from raytune_emotion.interruption import check_interrupted, finish_block, is_interrupted, run_in_thread
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.atomic import scratch_folder
from raytune_emotion.storage.remote import outlast_outages
from raytune_emotion.terminal import short_path, warn
from raytune_emotion.tuning.execution.capacity import Capacity, Waiting
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost, wait_for_end
from raytune_emotion.tuning.execution.job import job_of
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.ray_patches import count_waiting_groups
from raytune_emotion.tuning.execution.ray_tune_patches import PlainTrainable, patch_tune
from raytune_emotion.tuning.execution.recorder import Recorder, Watch
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.trial_actor import TrialActor
from raytune_emotion.tuning.execution.tune_adapter import BetweenEvents, Gate, Recovery, Search, Silence
from raytune_emotion.tuning.execution.worker_nodes import label_selector, live_nodes
from raytune_emotion.tuning.study.open_study import OpenStudy

#: Seconds between two checks whether Ray Tune has ended, the cluster is alive, and the time is over.
_LOOK_S = 0.2
#: Seconds that Ray Tune gets once the record is closed, if it did not end before: an outage may have held it up.
_END_AFTER_OUTAGE_S = 10.0
#: True after each kind of signal: see `interruption.py`.
_INTERRUPTED = (
    "interrupted: the record and the results are being completed; the third Ctrl-C, and each later one, skips a part"
)
_WAITS_FOR_OTHERS = "waiting for the trials of other drivers; trials that they abandon are resumed here"


@dataclass(frozen=True)
class StudyRun:
    """A session of a study: its trials' placement, when it ends, and who receives its events."""

    #: The study, whose driver is this process. If its location is not the folder, the record is pushed before a trial
    #: begins, and a few seconds after it ends, so the study never depends on the local folder alone.
    study: OpenStudy
    placement: Placement  # placement of its trials
    time_budget: timedelta | None = None  # time after which the study is left as it is
    until_gain: float | None = None  # bits per hour; the study is left once the expected gain of training is smaller
    watch: Watch = lambda event: None  # receives all events of trials
    say: Callable[[str], None] = lambda text: None  # tells the user why nothing happens
    failure: Callable[[], str] = lambda: ""  # says what part of the cluster has died; "" while it is alive


def run_study(run: StudyRun) -> None:
    """Run the remaining trials of a study.

    Ended trials are unchanged. Trials that had begun continue from their checkpoints. New trials are added until the
    study has the number of its spec, or until its space has no more configurations.

    Raises:
        ClusterLost: the cluster has died.
        Breakdown: the record cannot be written, or many trials failed one after the other.
        KeyboardInterrupt: the session was interrupted; everything until then is recorded.
    """
    with outlast_outages(), contextlib.ExitStack() as leaving:
        recorder = Recorder(run.study, run.watch, until_gain=run.until_gain)
        interrupted = False
        try:
            if not recorder.broken:
                _run(recorder, run, leaving)
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            _close(recorder, interrupted=interrupted)


def _close(recorder: Recorder, *, interrupted: bool) -> None:
    """Close the record. A signal that comes meanwhile does not cut it, and interrupts the session afterwards.

    Raises:
        Breakdown: the record cannot be written, and the session was not interrupted.
        KeyboardInterrupt: a signal has come.
    """
    try:
        with finish_block():
            recorder.close()
    except Breakdown as error:
        # An interruption, such as that of a batch system, may end the wait for a URI that does not answer.
        if not (interrupted or is_interrupted()):
            raise
        warn(str(error))
    check_interrupted()


def _run(recorder: Recorder, run: StudyRun, leaving: contextlib.ExitStack) -> None:
    """Run trials with Ray Tune in a separate thread, until there are no more, or until it must stop.

    Meanwhile this thread receives signals, and notices the death of the cluster, for which Ray Tune waits for ever.

    Args:
        recorder: record of the study.
        run: session of the study.
        leaving: is left once the record is closed. A thread that an outage has held up ends only then.
    """
    stop, errors = threading.Event(), list[BaseException]()
    deadline = time.monotonic() + run.time_budget.total_seconds() if run.time_budget else float("inf")
    # Ray Tune may still write into this folder after it was stopped.
    scratch = leaving.enter_context(scratch_folder())

    def tune_trials() -> None:
        try:
            _tune(recorder, run, stop, str(scratch))
        except BaseException as error:  # without this, the study would seem to be over
            errors.append(error)

    ended = run_in_thread("tune", tune_trials)
    # The thread must not be inside Ray when this process leaves Ray, which would crash.
    leaving.callback(wait_for_end, ended, run.failure, _END_AFTER_OUTAGE_S)
    try:
        while not ended.is_set() and time.monotonic() < deadline and not recorder.shortfall:
            if lost := run.failure():
                raise _cluster_lost(lost, run.study)
            check_interrupted()
            recorder.check()
            ended.wait(_LOOK_S)
        if time.monotonic() >= deadline:
            run.say("the time budget is spent: running trials are left as they are")
        elif recorder.shortfall:
            run.say(recorder.shortfall)
    except KeyboardInterrupt:
        run.say(_INTERRUPTED)
        raise
    finally:
        stop.set()
        # The last reports are recorded meanwhile.
        wait_for_end(ended, run.failure)
    if errors and not recorder.broken:
        of_ray = isinstance(errors[0], RayError | ConnectionError)
        if lost := run.failure() or (first_line(errors[0]) if of_ray else ""):
            raise _cluster_lost(lost, run.study) from errors[0]
        raise errors[0]


def _cluster_lost(what: str, study: OpenStudy) -> ClusterLost:
    place = short_path(study.folder) if study.copy.is_here else study.copy
    return ClusterLost(f"{what}; the study can be resumed: {place}")


def _tune(recorder: Recorder, run: StudyRun, stop: threading.Event, scratch: str) -> None:
    study, resources = run.study, run.placement.resources
    room = Capacity(run.placement, recorder.count_open, run.say)
    waiting = Waiting(lambda: run.say(_WAITS_FOR_OTHERS if recorder.waits else room.shortage()))
    search = Search(recorder, partial(job_of, study, resources), room, waiting, stop)
    # The process that drives the workers of a trial runs at once, whether or not there is room for them.
    count_unplaced = count_waiting_groups if resources.workers > 1 else lambda: 0
    callbacks: list[tune.Callback] = [Recovery(), BetweenEvents(recorder, waiting, count_unplaced)]
    if resources.workers == 1:  # several workers wait for each other for a limited time
        callbacks.append(Silence(run.say))
    with contextlib.closing(room), patch_tune():
        # A Tuner is not used: it only adds a pickle for a restoration, which is not used here.
        tune.run(
            _trainable(resources),
            name=study.folder.name,
            search_alg=search,
            scheduler=FIFOScheduler(),  # type: ignore[no-untyped-call]
            num_samples=study.spec.trials,
            reuse_actors=True,
            max_failures=study.spec.max_failures,  # since the newest report: see `Recovery`
            stop=Gate(recorder, search, stop),
            callbacks=callbacks,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.trial_id,
            # Tune's own files are not needed: the record is in the study's folder.
            storage_path=scratch,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            raise_on_failed_trial=False,
            verbose=0,
        )


def _trainable(resources: Resources) -> Any:
    if resources.workers == 1:
        own = type("Trial", (PlainTrainable,), {"actor": TrialActor})
        return tune.with_resources(own, lambda config: place_of(resources))
    own = type("Trial", (PlainTrainable,), {"actor": TrialActor, "environment": {"RAY_TRAIN_V2_ENABLED": "1"}})
    # The process that drives the workers must not take one of their cores: it runs on the head node without a core.
    return tune.with_resources(own, {"node:__internal_head__": 0.001})


def place_of(resources: Resources) -> tune.PlacementGroupFactory:
    """Return what a trial of one worker asks for. The place is on the node with the largest part of its cores free."""
    selector = label_selector(live_nodes(), off_gpus=resources.off_gpus)
    return tune.PlacementGroupFactory([resources.per_worker], "SPREAD", bundle_label_selector=[selector])
