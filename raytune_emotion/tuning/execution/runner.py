"""Runs a study's trials on a Ray cluster."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from ray import tune

from raytune_emotion.errors import Breakdown
from raytune_emotion.storage import remote
from raytune_emotion.tuning.execution.cluster import Placement
from raytune_emotion.tuning.execution.job import Resources
from raytune_emotion.tuning.execution.ray_patches import mended_tune
from raytune_emotion.tuning.execution.trial_actor import TrialActor
from raytune_emotion.tuning.execution.tune_adapter import (
    Event,
    Search,
    SmallerBatches,
    StopWhenBroken,
    TableWriter,
    full_disk_told,
    has_last,
)
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.optuna_study import Searcher, asked, load_study
from raytune_emotion.tuning.study.records import (
    TrialRecord,
    best_first,
    losers,
    read_records,
)
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, read_spec


def run_study(
    folder: Path,
    spec: StudySpec,
    placement: Placement,
    *,
    uri: str | None = None,
    time_budget: timedelta | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> list[TrialRecord]:
    """Runs what is left to run of a study, on the Ray cluster that this process has joined.

    Trials that have ended stay as they are; those that had begun go on from their checkpoints; new ones are asked for
    until the study has as many as its spec says.

    Args:
        folder: of the study.
        spec: of the study.
        placement: of its trials.
        uri: of the study's mirror, whose record the folder has. Nothing that the study needs is then in the folder
            alone while a trial runs: the record is there at every beginning and ending of one.
        time_budget: after which the study is left as it is then.
        watch: is told of all that happens.

    Returns:
        All trials. Some are still `running` where the study is out of time. They are fewer than asked for where it is,
        or where the space has no more configurations.

    Raises:
        Breakdown: the disk is full, the mirror fails, or one trial after the other has failed.
        KeyboardInterrupt: by Ctrl-C; all until then is recorded.
    """
    study = load_study(folder)
    with _telling_how_to_go_on(folder, uri):
        search = Search(folder, spec, placement, study, watch, uri)
        began = time.monotonic()
        _tune(search, folder, spec, placement, time_budget)
        if search.broken:
            raise Breakdown(search.broken)
        search.record()
    in_time = time_budget is None or time.monotonic() - began < time_budget.total_seconds()
    if in_time and not search.is_done():
        # Tune, which has caught it, returns as if all were over.
        raise KeyboardInterrupt
    return read_records(folder, study)


def _tune(search: Search, folder: Path, spec: StudySpec, placement: Placement, time_budget: timedelta | None) -> None:
    """Has Ray Tune run trials until the search has no more, or is out of time or interrupted."""
    if search.is_finished():
        return
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(placement.concurrency)
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as scratch, mended_tune():
        # Not through a Tuner, which adds but a pickle of everything to be restored from, as nothing is here.
        tune.run(
            _trainable(placement.resources),
            name=folder.name,
            search_alg=search,
            scheduler=search.scheduler,
            num_samples=spec.trials,
            reuse_actors=True,
            time_budget_s=time_budget,
            max_failures=spec.max_failures,
            stop=StopWhenBroken(search),
            callbacks=[SmallerBatches(), TableWriter(search)],
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.trial_id,
            # What Tune writes of its own is of no use to us: the study's folder is the record.
            storage_path=scratch,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            raise_on_failed_trial=False,
            verbose=0,
        )


@contextlib.contextmanager
def _telling_how_to_go_on(folder: Path, uri: str | None) -> Iterator[None]:
    try:
        with full_disk_told(folder):
            yield
    except Breakdown as error:
        raise Breakdown(f"{error}; the study can be resumed: {remote.shown(uri) if uri else folder}") from error


def extend_best(folder: Path, spec: StudySpec, uri: str | None = None) -> StudySpec:
    """Has the best complete trials of a study whose epochs were raised go on to the new end, as trials of their own."""
    study = load_study(folder)
    records = read_records(folder, study)
    lost = {*losers(records, OBJECTIVES[spec.objective])}
    before = read_spec(folder).epochs
    # Those whose weights are kept, and that have run to the end that was, not out of patience.
    can = [
        r
        for r in best_first(records)
        if r.status == "complete"
        and r.trial_id not in lost
        and r.reports[-1]["epoch"] >= before
        and has_last(folder, uri, r.trial_id)
    ]
    searcher = Searcher(study, parse_space(spec.space, SPEC), seed=spec.seed)
    for record in can:
        searcher.extend(record.trial_id)
    return dataclasses.replace(spec, trials=max(spec.trials, len(asked(study))) + len(can))


def _trainable(resources: Resources) -> Any:
    if resources.workers == 1:
        return tune.with_resources(TrialActor, resources.per_worker)
    # The process that drives the workers must not take a core that they need: it runs on the head node and takes none.
    return tune.with_resources(TrialActor, {"node:__internal_head__": 0.001})
