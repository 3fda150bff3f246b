"""The command status: on folders and at URIs, in lines and as JSON, once and again and again."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys

import pytest

from raytune_emotion.storage.atomic import exclusive_lock
from raytune_emotion.storage.locations import Folder
from raytune_emotion.terminal import plain_console
from raytune_emotion.tuning.report.conclusion import conclude
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.report.summary import describe, rate_text, sparkline, summarize
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.commands import exit_code, refusal
from tests.support.folders import tree
from tests.support.studies import run_here, spec_of, write_study

KEYS = [
    "study", "objective", "finished", "trials_planned", "trials", "best", "baseline_js", "started", "elapsed_seconds",
    "active_seconds", "trials_per_hour", "seconds_since_evaluation", "best_js_by_time",
    "expected_gain", "expected_gain_per_hour",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("status") / "study"
    write_study(folder, store)
    return folder


@pytest.fixture
def running(finished, tmp_path):
    """A study whose last trial is at work: its ending is missing in the journal, and half a report is written."""
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    journal = folder / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    history = folder / "trials" / "0002" / "history.jsonl"
    history.write_text(history.read_text()[:-20])
    return folder


def json_of(capsys, *argv):
    capsys.readouterr()
    assert exit_code(["status", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_finished_study_is_summed_up(finished, capsys):
    told = json_of(capsys, finished)
    records = load(finished).records()
    lowest = min(report["val_js"] for record in records for report in record.reports)
    assert list(told) == KEYS
    assert told["finished"] is True
    assert told["trials"] == {"complete": 3, "pruned": 0, "failed": 0, "running": 0, "paused": 0}
    assert told["best"]["val_js"] == lowest == told["best_js_by_time"][-1][1]
    assert told["best"]["settings"] == next(r.settings for r in records if r.trial_id == told["best"]["trial_id"])
    assert told["trials_per_hour"] == pytest.approx(3 * 3600 / told["active_seconds"])
    assert 0 < told["active_seconds"] <= told["elapsed_seconds"] + 1e-6


def test_a_running_study_is_read_without_its_lock_and_left_as_it_is(running, capsys):
    before = tree(running)
    with exclusive_lock(running):  # as the process that works on it
        before |= tree(running)
        told = json_of(capsys, running)
        assert exit_code(["status", running]) == 0
    assert tree(running) == before
    assert told["finished"] is False
    assert told["trials"]["complete"] == 2
    assert told["trials"]["running"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("trials      2 complete, 1 running, of 3, ")
    assert any(line.startswith("best JS     0.") for line in lines)


def test_the_best_trial_has_the_settings_that_it_was_trained_with(finished, tmp_path, capsys):
    """A trial that continues another has more epochs than it was proposed with."""
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    best = json_of(capsys, folder)["best"]
    assert best["settings"]["train.epochs"] == 2
    params = folder / "trials" / best["trial_id"] / "params.json"
    params.write_text(json.dumps({**json.loads(params.read_text()), "train.epochs": 3}))
    for place in (folder, f"file://{folder}"):
        assert json_of(capsys, place)["best"]["settings"] == {**best["settings"], "train.epochs": 3}
    assert StudyProgress(load(folder)).snapshot().summary.best.settings["train.epochs"] == 3


def test_a_study_at_a_uri_is_read_as_a_folder_is(finished, capsys):
    here, there = json_of(capsys, finished), json_of(capsys, f"file://{finished}")
    changing = ("study", "seconds_since_evaluation")
    assert {k: v for k, v in here.items() if k not in changing} == {k: v for k, v in there.items() if k not in changing}


def test_a_study_without_an_evaluation_says_so(finished):
    summary = summarize(load(finished), [], now=0.0)
    assert describe(summary)[-1] == "best JS     no evaluation yet"
    assert summary.trials_per_hour is None
    assert not summary.finished


def test_the_settings_of_the_best_trial_take_few_lines_and_none_is_broken(finished):
    study = load(finished)
    told = describe(summarize(study, study.records(), now=0.0))
    start = next(n for n, line in enumerate(told) if line.startswith("settings    "))
    settings = " ".join(line.removeprefix("settings").strip() for line in told[start:]).split(", ")
    assert [each.split(" ")[0] for each in settings] == list(study.records()[0].settings)
    assert all(len(each.split(" ")) == 2 for each in settings)
    assert len(told) - start <= 3
    assert max(map(len, told)) <= 100


def test_time_without_a_trial_in_work_does_not_count_for_the_rate(finished):
    study = load(finished)
    now, later = (summarize(study, study.records()[:2], now=seconds) for seconds in (2e9, 2e9 + 3600))
    assert later.trials_per_hour == now.trials_per_hour
    assert later.elapsed_seconds == now.elapsed_seconds + 3600


def test_a_day_between_two_sessions_does_not_count_for_the_rate_though_trials_go_on(finished):
    study = load(finished)
    records = study.records()
    before = summarize(study, records, now=2e9)
    day = 24 * 3600.0
    later = [
        dataclasses.replace(
            record, reports=(*record.reports[:1], *({**r, "time": r["time"] + day} for r in record.reports[1:]))
        )
        for record in records
    ]
    assert any(len(record.reports) > 1 for record in later)
    after = summarize(study, later, now=2e9)
    assert before.active_seconds <= after.active_seconds < before.active_seconds + 300
    assert after.elapsed_seconds > before.elapsed_seconds + day - 60


def test_a_study_whose_space_has_no_more_configurations_is_finished(tmp_path, store, capsys, no_plots):
    space = {"model.backbone": "test_resnet", "train.batch_size": {"choice": [32, 64]}}
    make_study(tmp_path / "study", spec_of(store, space=space, trials=5, epochs=1))
    assert not json_of(capsys, tmp_path / "study")["finished"]
    run_here(load(tmp_path / "study"))
    study = load(tmp_path / "study")
    assert study.is_over()
    assert json_of(capsys, tmp_path / "study")["finished"]
    assert exit_code(["status", tmp_path / "study"]) == 0
    told = capsys.readouterr().out
    assert "2 complete, of 5" in told
    assert "; every configuration of the space has been tried\n" in told
    console = plain_console()
    conclude(console, study, Folder(tmp_path), None)
    told = capsys.readouterr().out
    assert told.startswith("2 complete; every configuration of the space has been tried\n")
    assert told.endswith(" --name study --epochs 2\n")


def test_characters_that_the_terminal_lacks_are_escaped(finished, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert exit_code(["status", finished]) == 0
    assert "\\u2581" in written.getvalue().decode()
    assert sys.stdout.errors == "strict", "it is another program's, too"


def test_a_clock_that_is_behind_makes_no_negative_times(finished):
    study = load(finished)
    records = study.records()
    first = min(report["time"] for record in records for report in record.reports)
    told = summarize(study, records[:2], now=first - 3600)
    assert (told.elapsed_seconds, told.seconds_since_evaluation) == (0.0, 0.0)
    assert "time        0 s since the start, last evaluation 0 s ago" in describe(told)


def test_a_rate_is_written_as_people_read_it():
    assert [rate_text(rate) for rate in (0.123, 4.56, 99.4, 100, 1468.2)] == ["0.123", "4.56", "99.4", "100", "1,468"]


def test_the_sparkline_falls_with_the_best_js():
    assert sparkline([(1.0, 0.8), (2.0, 0.1), (4.0, 0.1)], width=4) == "█▁▁▁"
    assert sparkline([(2.0, 0.5), (4.0, 0.5)], width=4) == " ▁▁▁"
    assert sparkline([(0.0, 0.5)], width=2) == "▁▁"
    assert sparkline([(1.0, 0.5), (2.0, 0.25), (3.0, 0.375)], width=3) == "█▁▅", "a study's best trial may fail"


def test_what_is_no_study_is_refused(tmp_path, capsys):
    (sentence,) = refusal(capsys, [tmp_path], "status", tmp_path)
    assert "no study" in sentence


def test_watching_goes_on_until_ctrl_c(finished, request):
    command = [sys.executable, "-m", "raytune_emotion.status", finished, "--watch", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    request.addfinalizer(process.kill)  # else it goes on for ever where it does not end by itself
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert told[0]["best"] == told[1]["best"]
