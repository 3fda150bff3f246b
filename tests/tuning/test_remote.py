"""Studies whose record lies in a bucket of a real S3 server, and whose machines die."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray

from raytune_emotion import mirror
from raytune_emotion.__main__ import command_main
from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.checkpoint import BEST, HISTORY, LAST, read_best, read_history
from raytune_emotion.learn.package import load_package
from raytune_emotion.train import add_arguments, settings_of
from raytune_emotion.tuning import engine
from raytune_emotion.tuning.engine import Placement, _Search, extend_best, fit_to_cluster, run_study
from raytune_emotion.tuning.searcher import JOURNAL, create_study, load_study
from raytune_emotion.tuning.space import parse_space
from raytune_emotion.tuning.study import CURVES, KEPT, SPEC, TRIALS, best_first, read_spec, trial_folder, write_spec
from raytune_emotion.tuning.trial import Resources
from tests.test_mirror import SECRET, s3_server
from tests.tuning.test_engine import SPACE, left_behind, numbers
from tests.tuning.test_study import spec_of


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as uri:
        yield uri


@pytest.fixture
def begin(tmp_path, store, cluster, bucket):
    """Makes a study and returns its folder and what runs it."""

    def make(name, uri, **changes):
        folder = tmp_path / name
        folder.mkdir()
        spec = spec_of(store, name=name, space=SPACE, concurrency=1, **changes)
        create_study(folder, parse_space(spec.space, name))
        write_spec(folder, spec)

        def go(watch=lambda event: None, *, workers=1, **more):
            place = fit_to_cluster(workers=workers, gpus_per_worker=0.0, concurrency=1)
            return run_study(folder, dataclasses.replace(spec, **more), place, uri=uri, watch=watch)

        return folder, go

    return make


def lose(folder, uri):
    """The machine of the driver dies; another one fetches the study."""
    shutil.rmtree(folder)
    mirror.pull(uri, folder, mirror.names(uri, SPEC, JOURNAL, f"trials/*/{HISTORY}"))


def test_a_study_at_a_uri_has_the_record_of_a_local_one_and_outlives_its_machine(begin, bucket, tmp_path):
    uri = mirror.join(bucket, "a study")
    local_folder, go_locally = begin("local", None, trials=4, epochs=2)
    folder, go = begin("remote", uri, trials=4, epochs=2)
    local, remote = go_locally(), go()
    assert [r.settings for r in remote] == [r.settings for r in local]
    assert [r.status for r in remote] == [r.status for r in local]
    assert [numbers(r.reports) for r in remote] == [numbers(r.reports) for r in local]

    names = mirror.names(uri, "*")
    assert {SPEC, JOURNAL, TRIALS, CURVES, engine.DRIVER} == {name for name in names if "/" not in name}
    for name in (HISTORY, "params.json", "events.out.tfevents.*"):
        assert len(mirror.names(uri, f"trials/*/{name}")) == 4, name
    kept = {r.trial_id for r in best_first(remote)[:KEPT]}
    for name in (BEST, LAST):
        assert {Path(found).parent.name for found in mirror.names(uri, f"trials/*/{name}")} == kept, name
    # The driver has no need of weights.
    assert not list(folder.rglob("*.safetensors"))
    mirror.pull(uri, tmp_path / "there", [TRIALS])
    table, expected = (pd.read_csv(place / TRIALS) for place in (tmp_path / "there", local_folder))
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), expected.drop(columns="seconds"))

    lose(folder, uri)
    after = go(trials=5)
    assert after[:4] == remote
    assert after[4].status in ("complete", "pruned")
    assert len(mirror.names(uri, f"trials/*/{BEST}")) == KEPT


def test_a_study_that_broke_off_goes_on_from_the_mirrored_checkpoint_on_several_workers(begin, bucket, tmp_path):
    uri = mirror.join(bucket, "broken off")
    folder, go = begin("study", uri, trials=1, epochs=3)

    def break_off(event):
        if event.report is not None and event.report["report"] == 2:
            raise Breakdown("as the test wants it")

    with pytest.raises(Breakdown, match=r"resumed: s3://\*\*\*@bucket/broken%20off\?\*\*\*$"):
        go(break_off)
    before = mirror.read(uri, f"trials/0000/{HISTORY}").decode()
    assert before.count("\n") >= 2
    # The trial's process had died after it pushed the newest state, before it pushed what follows from that.
    (tmp_path / HISTORY).write_text(before.splitlines(keepends=True)[0])
    mirror.push(tmp_path, mirror.join(uri, "trials", "0000"), [HISTORY])
    mirror.delete(uri, [f"trials/0000/{BEST}"])

    lose(folder, uri)
    (record,) = go(workers=2)
    assert [r["report"] for r in record.reports] == [1, 2, 3]
    # To the clocks the same: they were not trained again.
    assert [json.dumps(r) for r in record.reports][: before.count("\n")] == before.splitlines()
    mirror.pull(uri, tmp_path, [f"trials/0000/{name}" for name in (BEST, HISTORY)])
    assert read_best(trial_folder(tmp_path, "0000") / BEST).report == record.best
    assert read_history(trial_folder(tmp_path, "0000")) == list(record.reports)
    assert left_behind() == (0.0, [])


def test_a_study_whose_mirror_fails_is_broken_off_whole_and_can_go_on_further(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_WAITS", (0.01, 0.01))
    place = tmp_path / "place"
    folder, go = begin("study", place.as_uri(), trials=2, epochs=1)

    def unmount(event):
        if event.status == "complete":
            place.rename(tmp_path / "elsewhere")
            place.touch()

    with pytest.raises(Breakdown, match=r"failed 3 times in a row.*the study can be resumed: file:///"):
        go(unmount)
    place.unlink()
    (tmp_path / "elsewhere").rename(place)
    lose(folder, place.as_uri())
    records = go()
    assert [r.status for r in records] == ["complete", "complete"]
    assert len(list(place.glob(f"trials/*/{HISTORY}"))) == 2
    assert not list(place.rglob("*.part"))

    lose(folder, place.as_uri())
    longer = extend_best(folder, dataclasses.replace(read_spec(folder), epochs=2), place.as_uri())
    after = go(trials=longer.trials, epochs=2)
    assert after[:2] == records
    assert [r.continues for r in after[2:]] == [r.trial_id for r in best_first(records)]
    for record in after[2:]:
        assert record.reports[:1] == records[int(record.continues)].reports
        assert [r["report"] for r in record.reports] == [1, 2]


def test_a_search_that_was_thought_dead_undoes_nothing_of_the_next(begin, tmp_path):
    place = tmp_path / "place"
    folder, _ = begin("study", place.as_uri())

    def search():
        placement = Placement(Resources(1, 1.0, 0.0), 1)
        return _Search(folder, read_spec(folder), placement, load_study(folder), print, place.as_uri())

    first = search()
    first.record()
    second = search()
    with pytest.raises(Breakdown, match="another search has gone on with this study"):
        first.record()
    second.record()
    shutil.rmtree(place)
    with pytest.raises(Breakdown, match="no longer there"):
        second.record()


def test_the_commands_work_at_a_uri_and_a_killed_search_goes_on_elsewhere(cluster, bucket, faces, tmp_path, capsys):
    results = mirror.join(bucket, "results")
    uri = mirror.join(results, "killed")
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE | {"data.image_size": 32}))

    def search(machine, *options):
        command = [sys.executable, "-m", "raytune_emotion.search", "--results", results, *options]
        command += ["--address", ray.get_runtime_context().gcs_address]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / machine)}
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    begun = ["--name", "killed", "--data", str(faces), "--space", str(tmp_path / "space.yaml")]
    driver = search("one machine", *begun, "--trials", "2", "--epochs", "8", "--concurrency", "1")
    while (mirror.read(uri, f"trials/0000/{HISTORY}") or b"").count(b"\n") < 2:
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    shutil.rmtree(tmp_path / "one machine")
    before = mirror.read(uri, f"trials/0000/{HISTORY}")

    driver = search("another machine", "--resume")
    output = driver.communicate()[0]
    assert driver.returncode == 0, output
    assert SECRET not in output
    assert "exported    s3://***@bucket/results/killed/best?***" in output
    assert mirror.read(uri, f"trials/0000/{HISTORY}").startswith(before)
    mirror.pull(uri, tmp_path / "there", mirror.names(uri, TRIALS, "best/*", "*.html"))
    table = pd.read_csv(tmp_path / "there" / TRIALS, dtype={"trial_id": str})
    assert set(table["status"]) <= {"complete", "pruned"}
    assert len(table) == 2
    assert load_package(tmp_path / "there" / "best").image_size == 32

    assert command_main("export", [uri, str(tmp_path / "second"), "--trial", table["trial_id"][1]]) == 0
    assert json.loads((tmp_path / "second" / "metrics.json").read_text())["val_js"] == table["val_js"][1]
    assert command_main("export", [uri, str(tmp_path / "none"), "--trial", "0009"]) == 2
    assert "error: s3://***@bucket/results/killed?***: has no weights of a trial 0009" in capsys.readouterr().err

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert settings_of(parser.parse_args(["--study", uri]))["optim.lr"] == table["optim.lr"][0]

    mirror.delete(uri, ["report.html", TRIALS])
    assert command_main("report", [uri]) == 0
    assert "s3://***@bucket/results/killed/report.html" in capsys.readouterr().out
    assert mirror.read(uri, TRIALS) == (tmp_path / "there" / TRIALS).read_bytes()
    assert mirror.exists(mirror.join(uri, "report.html"))
    assert command_main("report", [mirror.join(results, "never")]) == 2
    assert command_main("search", ["--results", results, "--name", "killed"]) == 2
    assert command_main("search", ["--results", results, "--name", "never", "--resume"]) == 2
