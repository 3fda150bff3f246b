"""Studies whose record lies at a URI, and whose machines die."""

import contextlib
import json
import shutil
from pathlib import Path

from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.run_folder import BEST, HISTORY, read_history
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Remote
from raytune_emotion.tuning.execution.job import job_of, train_here
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.remote_copy import PIECES, join_pieces
from raytune_emotion.tuning.study.spec import SPEC
from tests.support.cluster import RUN_SPACE
from tests.support.studies import ONE_CORE, searcher_of, spec_of

ON_ONE_CORE = Placement(ONE_CORE, 1, limit=1)


def begin_study(folder, store, *, space=RUN_SPACE, **changes):
    """Make a study; return its folder."""
    make_study(folder, spec_of(store, name=folder.name, space=space, concurrency=1, **changes))
    return folder


def lose(folder, uri):
    """The machine of the driver dies; another one fetches the study."""
    shutil.rmtree(folder)
    fetch(folder, uri)


def fetch(folder, uri):
    """Fetch a study, as a search does that continues it on another machine."""
    remote.pull(uri, folder, remote.names(uri, SPEC, JOURNAL, *PIECES, f"trials/*/{HISTORY}"))
    join_pieces(folder, JOURNAL)


def ask(folder, uri):
    """What a search does until its first trial begins."""
    remote.push(folder, uri, [SPEC])
    study = load(folder, Remote(uri))
    proposal = searcher_of(study.optuna, study.space, seed=study.spec.seed).ask()
    remote.push(folder, uri, [JOURNAL])
    return job_of(study, ONE_CORE, proposal)


def break_off(folder, uri, work):
    """Train the first trial of a study for two epochs, as a process that dies with its machine; return job and reports.

    It had died after it pushed the newest state, before it pushed what follows from that.
    """
    job = ask(folder, uri)
    with contextlib.closing(train_here(job)) as reports:
        before = [next(reports), next(reports)]
    assert before[1]["val_js"] < before[0]["val_js"], "only then can the best weights be those of the newest state"
    assert not Path(job.folder).exists(), "its process needs nothing of the driver's disk"
    (work / HISTORY).write_text(json.dumps(before[0]) + "\n")
    remote.push(work, job.location, [HISTORY])
    remote.delete(job.location, [BEST])
    lose(folder, uri)
    return job, before


def check_went_on(record, job, before, work):
    """Check that a trial of three epochs went on from where it was broken off."""
    # To the clocks the same: they were not trained again.
    assert list(record.reports[:2]) == before
    assert [r["report"] for r in record.reports] == [1, 2, 3]
    remote.pull(job.location, work, [BEST, HISTORY])
    assert read_best(work / BEST).report == record.best
    assert read_history(work) == list(record.reports)
