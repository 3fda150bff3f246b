"""Studies in a bucket, at S3 and at GCS, whose driver is killed and goes on elsewhere.

Not part of `make test`: run it by `make machines ONLY=at_uri`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import ray

from raytune_emotion.cli import command_main
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.learn.run_folder import HISTORY, read_history
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Remote
from raytune_emotion.train import add_arguments, settings_of
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution import recorder
from raytune_emotion.tuning.execution.placement import Placement
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.policy.decisions import Begin, TakeUp
from raytune_emotion.tuning.session import finish
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.spec import SPEC
from raytune_emotion.tuning.study.tables import TRIALS
from tests.support.cluster import RUN_SPACE, held_resources, joined_session, trials_in_this_process
from tests.support.reports import without_clocks
from tests.support.s3 import SECRET
from tests.support.scripted_policy import ScriptedPolicy
from tests.support.studies_at_uri import begin_study, break_off, check_went_on, lose


@pytest.mark.parametrize("server", ["bucket", "gcs"])
def test_the_commands_work_at_a_uri_and_a_killed_search_goes_on_elsewhere(
    cluster, server, request, faces, tmp_path, capsys, monkeypatch, no_plots
):
    results = remote.join(request.getfixturevalue(server), "results")
    uri = remote.join(results, "killed")
    (tmp_path / "space.yaml").write_text(json.dumps(RUN_SPACE | {"data.image_size": 32}))

    begun = ["--name", "killed", "--data", str(faces), "--space", str(tmp_path / "space.yaml")]
    begun += ["--trials", "2", "--epochs", "8", "--concurrency", "1"]
    address = ["--address", ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(
        [sys.executable, "-m", "raytune_emotion.search", "--results", results, *begun, *address],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "one machine")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while (remote.read(uri, f"trials/0000/{HISTORY}") or b"").count(b"\n") < 2:
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    shutil.rmtree(tmp_path / "one machine")
    before = remote.read(uri, f"trials/0000/{HISTORY}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    # Ray can be started only once in a process, and has been.
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    code = command_main("search", ["--results", results, "--resume", *address])
    output = "".join(capsys.readouterr())
    assert code == 0, output
    assert SECRET not in output
    assert f"exported    {remote.join(uri, 'best')}\n" in output
    assert remote.read(uri, f"trials/0000/{HISTORY}").startswith(before)
    remote.pull(uri, tmp_path / "there", remote.names(uri, TRIALS, "best/*", "*.html"))
    table = pd.read_csv(tmp_path / "there" / TRIALS, dtype={"trial_id": str})
    assert set(table["status"]) <= {"complete", "pruned"}
    assert len(table) == 2
    assert load_package(tmp_path / "there" / "best").image_size == 32

    assert command_main("export", [uri, str(tmp_path / "second"), "--trial", table["trial_id"][1]]) == 0
    assert json.loads((tmp_path / "second" / "metrics.json").read_text())["val_js"] == table["val_js"][1]
    assert command_main("export", [uri, str(tmp_path / "none"), "--trial", "0009"]) == 2
    assert f"error: {uri}: no trial 0009; there are 0000, 0001" in capsys.readouterr().err
    assert command_main("export", [uri, remote.join(results, "exported")]) == 0
    assert remote.names(remote.join(results, "exported"), "*") == [
        "README.md", "config.json", "metrics.json", "model.safetensors"
    ]  # fmt: skip

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert settings_of(parser.parse_args(["--study", uri]), [])["optim.lr"] == table["optim.lr"][0]

    remote.delete(uri, ["report.html", TRIALS])
    assert command_main("report", [uri]) == 0
    assert capsys.readouterr().out.endswith(f"{remote.join(uri, 'report.html')}\n")
    assert remote.read(uri, TRIALS) == (tmp_path / "there" / TRIALS).read_bytes()
    assert remote.exists(remote.join(uri, "report.html"))
    assert command_main("report", [remote.join(results, "never")]) == 2
    assert command_main("search", ["--results", results, "--name", "killed"]) == 2
    assert command_main("search", ["--results", results, "--name", "never", "--resume"]) == 2

    monkeypatch.setattr(finish, "TOP", 1)
    monkeypatch.setattr(finish, "SEEDS", 1)
    monkeypatch.setattr(finish, "LONGER", 1)
    with trials_in_this_process():
        code = command_main("search", ["--results", results, "--resume", "--finish"])
    output, errors = capsys.readouterr()
    assert code == 0, errors
    assert SECRET not in output + errors
    assert output.endswith(f"exported    {remote.join(uri, 'finished')}\n")
    remote.pull(uri, tmp_path / "there", remote.names(uri, "finished/*", "confirmed/*", f"final/*/{HISTORY}"))
    (fit,) = (tmp_path / "there" / "final").iterdir()
    assert [report["epoch"] for report in read_history(fit)] == [*range(1, 9)]
    assert load_package(tmp_path / "there" / "confirmed" / "best").image_size == 32
    assert load_package(tmp_path / "there" / "finished").image_size == 32


def test_a_paused_trial_of_several_workers_goes_on_on_another_machine_as_if_it_had_not_paused(
    cluster, bucket, store, tmp_path, monkeypatch
):
    uri = remote.join(bucket, "paused")
    two_workers = Placement(Resources(2, 1.0, 0.0), 1, limit=1)
    policy = ScriptedPolicy()
    monkeypatch.setattr(recorder, "make_policy", lambda *_, **__: policy)
    space = RUN_SPACE | {"model.backbone": "test_resnet"}
    options = {"space": space, "trials": 2, "epochs": 4}

    alone = begin_study(tmp_path / "alone", store, **options)
    policy.answers = [Begin({}), None]
    run_study(StudyRun(load(alone), two_workers))
    (expected,) = load(alone).records()

    folder = begin_study(tmp_path / "study", store, **options)
    remote.push(folder, uri, [SPEC])
    policy.decisions, policy.answers = {("0000", 2): "pause"}, [Begin({}), Begin({})]

    def interrupt(event):
        if event.proposal.trial_id == "0001" and event.report:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_study(StudyRun(load(folder, Remote(uri)), two_workers, watch=interrupt))
    assert [record.status for record in load(folder).records()] == ["paused", "running"]

    lose(folder, uri)
    policy.answers = [TakeUp(0), None]
    run_study(StudyRun(load(folder, Remote(uri)), two_workers))
    records = load(folder).records()
    assert [record.status for record in records] == ["complete", "complete"]
    assert without_clocks(records[0].reports) == without_clocks(expected.reports)
    assert held_resources() == (0.0, [])


def test_a_trial_at_a_uri_goes_on_with_several_workers_and_one_that_they_cannot_train_fails(
    cluster, bucket, store, tmp_path
):
    uri = remote.join(bucket, "broken off")
    start = [{"train.batch_size": 32, "optim.lr": 1e-3, "loss.kl": 1.0}, {"train.batch_size": 1}]
    space = RUN_SPACE | {"train.batch_size": {"choice": [32, 1]}, "start": start}
    folder = begin_study(tmp_path / "study", store, space=space, trials=2, epochs=3, seed=2)
    job, before = break_off(folder, uri, tmp_path)
    run_study(StudyRun(load(folder, Remote(uri)), Placement(Resources(2, 1.0, 0.0), 1, limit=1)))
    record, refused = load(folder).records()
    assert refused.status == "failed"
    assert refused.reason.startswith(
        "train.batch_size: 1 rows are too few for 1 micro-batches (train.accumulate) for each of 2 workers"
    )
    check_went_on(record, job, before, tmp_path)
    assert held_resources() == (0.0, [])
