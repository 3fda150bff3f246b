"""Studies whose record lies in a bucket of a real S3 server, and whose machines die."""

import contextlib
import dataclasses
import functools
import shutil
from itertools import islice
from pathlib import Path

import pytest

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, read_history
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Remote
from raytune_emotion.tuning.execution.job import job_of, newest_report, train_here
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.study.open_study import load, raise_epochs
from raytune_emotion.tuning.study.optuna_study import JOURNAL, Proposal
from raytune_emotion.tuning.study.records import KEPT, best_first
from raytune_emotion.tuning.study.remote_copy import DRIVER
from raytune_emotion.tuning.study.spec import SPEC
from raytune_emotion.tuning.study.tables import CURVES, TRIALS
from raytune_emotion.tuning.study.trials import PARAMS, trial_folder
from tests.support.cluster import RUN_SPACE
from tests.support.reports import without_clocks
from tests.support.studies import run_here
from tests.support.studies_at_uri import ON_ONE_CORE, ask, begin_study, break_off, check_went_on, lose


@pytest.fixture
def begin(tmp_path, store):
    """Makes a study; returns its folder."""
    return functools.partial(begin_study, tmp_path / "study", store)


@pytest.mark.long
def test_a_study_at_a_uri_has_the_record_of_a_local_one_and_outlives_its_machine(begin, bucket, cluster, tmp_path):
    uri, events = remote.join(bucket, "a study"), []
    folder = begin(trials=4, epochs=2)
    study = load(folder, Remote(uri))
    run_study(StudyRun(study, ON_ONE_CORE, watch=events.append))
    records = study.records()
    # So that what is compared below was trained in a fresh process, in one that had trained before, and in this one.
    assert len({event.report["pid"] for event in events if event.report}) < 4

    names = remote.names(uri, "*")
    assert {name for name in names if "/" not in name} == {SPEC, JOURNAL, TRIALS, CURVES, DRIVER}
    for name in (HISTORY, PARAMS, "events.out.tfevents.*"):
        assert len(remote.names(uri, f"trials/*/{name}")) == 4, name
    kept = {r.trial_id for r in best_first(records)[:KEPT]}
    for name in (BEST, LAST):
        assert {Path(found).parent.name for found in remote.names(uri, f"trials/*/{name}")} == kept, name
    assert not list(folder.rglob("*.safetensors")), "the driver has no need of weights"
    for name in (SPEC, JOURNAL, TRIALS, CURVES):
        assert remote.read(uri, name) == (folder / name).read_bytes(), name
    for record in records:
        job = job_of(load(folder), ON_ONE_CORE.resources, Proposal(record.trial_id, record.settings, None))
        with contextlib.closing(
            train_here(dataclasses.replace(job, folder=str(tmp_path / record.trial_id), location=None))
        ) as local:
            assert without_clocks(record.reports) == without_clocks(islice(local, len(record.reports)))

    lose(folder, uri)
    study = load(folder, Remote(uri))
    after = run_here(raise_epochs(study, dataclasses.replace(study.spec, epochs=3)))
    assert after[:4] == records
    can = [r.trial_id for r in best_first(records)[:KEPT] if r.status == "complete"]
    assert [r.continues for r in after[4:]] == can
    for record in after[4:]:
        assert record.reports[:2] == records[int(record.continues)].reports
    assert len(remote.names(uri, f"trials/*/{BEST}")) == KEPT


def test_a_trial_goes_on_from_the_mirrored_checkpoint(begin, bucket, tmp_path):
    uri = remote.join(bucket, "broken off")
    folder = begin(space=RUN_SPACE | {"start": [{"optim.lr": 1e-3, "loss.kl": 1.0}]}, trials=1, epochs=3, seed=2)
    job, before = break_off(folder, uri, tmp_path)
    (record,) = run_here(load(folder, Remote(uri)))
    check_went_on(record, job, before, tmp_path)


def test_a_mirror_that_fails_breaks_a_study_off_whole(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    monkeypatch.setattr(remote, "_OUTAGE_WAITS", ())
    place = tmp_path / "place"
    folder = begin(trials=2, epochs=3)
    job = ask(folder, place.as_uri())
    recorder = Recorder(load(folder, Remote(place.as_uri())))
    with contextlib.closing(train_here(job)) as reports:
        before = next(reports)
        place.rename(tmp_path / "elsewhere")
        place.touch()
        with pytest.raises(Breakdown, match="failed 3 times in a row"):
            next(reports)
    assert recorder.next() is None
    assert "failed 3 times in a row" in recorder.broken
    assert recorder.is_over

    place.unlink()
    (tmp_path / "elsewhere").rename(place)
    assert [r["report"] for r in train_here(job)] == [2, 3]
    assert read_history(trial_folder(place, "0000"))[0] == before
    assert not list(place.rglob("*.part"))
    # All was said, but its ending was not heard. The process that died was uploading its weights.
    assert list(train_here(job)) == []
    (trial_folder(place, "0000") / "best.safetensors.0123abcd.part").touch()
    assert newest_report(job)["finished"]
    assert not list(place.rglob("*.part"))


def test_stale_driver_cannot_overwrite_newer_one(begin, tmp_path):
    place = tmp_path / "place"
    folder = begin()

    def search():
        return Recorder(load(folder, Remote(place.as_uri())))

    first, second, third = search(), search(), search()
    for stale in (first, second):
        assert stale.next() is None
        with pytest.raises(Breakdown, match="another process has taken over"):
            stale.close()
    shutil.rmtree(place)
    assert third.next() is None
    with pytest.raises(Breakdown, match="its files no longer exist"):
        third.close()
