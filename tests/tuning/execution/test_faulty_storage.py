"""Studies at a URI whose server fails, or dies: the search goes on, or ends in order, and its record is whole."""

import json
import shutil

import pytest

from raytune_emotion.data.store import open_store
from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Remote
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.policy.warm_start import EARLIER
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.remote_copy import DRIVER
from raytune_emotion.tuning.study.spec import SPEC
from raytune_emotion.tuning.study.tables import CURVES, TRIALS
from raytune_emotion.tuning.study.trials import trial_folder
from tests.support.commands import exit_code
from tests.support.reports import make_report
from tests.support.studies import SMALL_SPACE, spec_of
from tests.support.studies_at_uri import fetch

pytestmark = pytest.mark.long


@pytest.fixture
def faults(faults, monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.001,) * 3)
    return faults


def train(study, trial_id, epochs):
    """Stand in for the training: write and push what a trial's process does, from where it was left."""
    place, location = trial_folder(study.folder, trial_id), study.copy.location / "trials" / trial_id
    place.mkdir(parents=True, exist_ok=True)
    location.pull(place, [LAST])
    done = int((place / LAST).read_text()) if (place / LAST).exists() else 0
    for epoch in range(min(done + 1, epochs), epochs + 1):  # the last report again, if nobody has heard it
        numbers = range(1, epoch + 1)
        reports = [make_report(n, 0.5 / n, finished=n == epochs, time=n, images_per_second=1.0) for n in numbers]
        (place / LAST).write_text(str(epoch))
        (place / BEST).write_text(str(epoch))
        (place / HISTORY).write_text("".join(f"{json.dumps(report)}\n" for report in reports))
        location.push(place, [LAST, BEST, HISTORY])
        yield reports[-1]


def run(study):
    recorder = Recorder(study)
    try:
        while (proposal := recorder.next()) is not None:
            for report in train(study, proposal.trial_id, study.spec.epochs):
                if not recorder.report(proposal.trial_id, report):
                    break
    finally:
        recorder.close()


#: Methods of requests that change a bucket.
WRITES = ("PUT", "POST", "DELETE")


@pytest.fixture
def study(store, tmp_path):
    """Makes a study in a folder of this machine that is to be kept at a URI."""
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss": "kl"}

    def make(name, uri=None):
        make_study(tmp_path / name, spec_of(store, space=space, trials=3, epochs=2, scheduler="none"))
        if uri is None:
            return load(tmp_path / name)
        remote.push(tmp_path / name, uri, [SPEC, JOURNAL])
        return load(tmp_path / name, Remote(uri))

    return make


def test_a_study_on_a_server_that_fails_every_twentieth_request_is_that_of_a_quiet_one(bucket, faults, study):
    quiet = study("quiet")
    run(quiet)
    uri = remote.join(bucket, "faulty")
    faults.plan = lambda number, method, path: ("error", "drop", "deaf")[number // 20 % 3] if number % 20 < 3 else None
    faulty = study("faulty", uri)
    run(faulty)
    assert len(faults.requests) > 100
    faults.reset()
    assert faulty.records() == quiet.records()
    for name in (JOURNAL, TRIALS, CURVES):
        assert remote.read(uri, name) == (faulty.folder / name).read_bytes()
    assert (faulty.folder / TRIALS).read_bytes() == (quiet.folder / TRIALS).read_bytes()


@pytest.mark.parametrize("dies_at", [5, 30, 60, 90, 120])
def test_a_study_whose_server_dies_goes_on_elsewhere_with_every_trial(bucket, faults, study, dies_at):
    uri = remote.join(bucket, f"dies-{dies_at}")
    lost = study("here", uri)
    faults.reset()
    faults.plan = lambda number, method, path: "drop" if number >= dies_at else None
    with pytest.raises(Breakdown, match="failed 4 times in a row"):
        run(lost)

    faults.reset()
    shutil.rmtree(lost.folder)
    fetch(lost.folder, uri)
    resumed = load(lost.folder, Remote(uri))
    run(resumed)
    assert [(r.status, len(r.reports)) for r in resumed.records()] == [("complete", 2)] * 3


@pytest.mark.parametrize("lost", [DRIVER, SPEC])
def test_search_whose_study_never_came_to_its_place_is_typed_again(
    bucket, faults, store, tmp_path, without_ray, monkeypatch, capsys, lost
):
    monkeypatch.setattr("raytune_emotion.tuning.report.conclusion.conclude", lambda *_, **__: None)
    (tmp_path / "space.yaml").write_text(SMALL_SPACE)
    results = remote.join(bucket, f"half-{lost}")
    asked = ["--data", store.path, "--space", tmp_path / "space.yaml", "--trials", 1, "--epochs", 1]
    command = ["search", *asked, "--results", results, "--name", "s"]
    faults.plan = lambda number, method, path: "drop" if method in WRITES and f"/s/{lost}" in path else None
    assert exit_code(command) == 1
    assert capsys.readouterr().err.rstrip().endswith("; type the same command again")
    faults.reset()
    assert exit_code([*command, "--resume"]) == 2
    known = {DRIVER: "no study of this name to resume"}
    said = known.get(lost, "its search broke off before there was a study; leave --resume out")
    assert f"{remote.join(results, 's')}: {said}" in capsys.readouterr().err
    assert exit_code(command) == 0
    assert exit_code(command) == 2
    assert "a study of this name exists already" in capsys.readouterr().err


def test_study_leaves_nothing_of_one_that_never_came_to_its_place(bucket, faults, study):
    uri = remote.join(bucket, "anew")
    new = study("new")
    (new.folder / EARLIER).write_text("[]")
    faults.plan = lambda number, method, path: "drop" if method in WRITES and SPEC in path else None
    with pytest.raises(Breakdown, match="type the same command again"):
        run(load(new.folder, Remote(uri)))
    faults.reset()
    assert remote.read(uri, EARLIER) == b"[]"
    (new.folder / EARLIER).unlink()
    run(load(new.folder, Remote(uri)))
    assert remote.read(uri, EARLIER) is None
    assert remote.read(uri, SPEC) == (new.folder / SPEC).read_bytes()


def test_a_store_is_fetched_from_a_server_that_fails_and_one_that_dies(bucket, faults, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = remote.join(bucket, "store")
    names = sorted(path.name for path in store.path.iterdir() if not path.name.startswith("."))
    remote.push(store.path, uri, names)
    faults.reset()
    faults.plan = lambda number, method, path: "half" if number >= 6 and method == "GET" else None
    with pytest.raises(Breakdown, match="failed 4 times in a row"):
        open_store(uri)
    faults.reset()
    faults.plan = lambda number, method, path: "half" if number % 5 < 2 and method == "GET" else None
    fetched = open_store(uri)
    assert fetched.fingerprint == store.fingerprint
    assert fetched.path.is_relative_to(tmp_path)
