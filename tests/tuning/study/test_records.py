import contextlib
import dataclasses
import json
import os
import re
import subprocess

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from raytune_emotion.errors import UserError
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, PREDICTIONS
from raytune_emotion.tuning.policy.objective import BY_SIZE, JS_ALONE, OBJECTIVES
from raytune_emotion.tuning.study import records as records_module
from raytune_emotion.tuning.study import spec as spec_module
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.records import (
    KEPT,
    TrialRecord,
    best_first,
    copy_checkpoint,
    delete_weights,
    frontier,
    read_record,
    read_records,
    trials_to_strip,
    winner,
)
from raytune_emotion.tuning.study.spec import SPEC, read_spec, write_spec
from raytune_emotion.tuning.study.tables import CURVES, TRIALS, concatenate, curves_of, keep_two_reports, write_tables
from raytune_emotion.tuning.study.trials import trial_folder
from tests.support.reports import RECORDS, make_report
from tests.support.studies import spec_of, write_study


def test_a_commit_is_told_of_the_code_that_runs_alone(tmp_path, monkeypatch):
    code = tmp_path / "study.py"
    code.touch()
    monkeypatch.setattr(spec_module, "__file__", str(code))
    assert spec_module._commit() is None

    def git(*arguments):
        as_somebody = ["git", "-C", tmp_path, "-c", "user.name=S", "-c", "user.email=s@example.org"]
        return subprocess.run([*as_somebody, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "--message", "of something else")
    assert spec_module._commit() is None
    git("add", "study.py")
    git("commit", "--message", "of the code")
    assert spec_module._commit() == git("rev-parse", "HEAD")
    code.write_text("edited")
    assert spec_module._commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")  # no git
    assert spec_module._commit() is None


def test_the_spec_survives_its_file(tmp_path, store, monkeypatch):
    monkeypatch.delenv("RAYTUNE_EMOTION_COMMIT")  # the commit is asked of git
    spec = spec_of(store)
    write_spec(tmp_path, spec)
    assert read_spec(tmp_path) == spec
    text = (tmp_path / SPEC).read_text()
    for part in ("versions:", "torch:", "git_commit:", "created:", store.fingerprint):
        assert part in text
    old = text.replace(re.findall("created: .*", text)[0], "created: '2020-01-01T00:00:00+00:00'")
    (tmp_path / SPEC).write_text(old)
    write_spec(tmp_path, dataclasses.replace(spec, trials=99))
    assert "created: '2020-01-01T00:00:00+00:00'" in (tmp_path / SPEC).read_text()


def test_a_damaged_spec_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="not a study"):
        read_spec(tmp_path)
    (tmp_path / SPEC).write_text("name: only")
    with pytest.raises(UserError, match="damaged"):
        read_spec(tmp_path)


def test_every_wrong_value_of_a_spec_is_a_sentence(tmp_path, store):
    write_spec(tmp_path, spec_of(store))
    values = YAML(typ="safe").load(tmp_path / SPEC)
    values |= {"epochs": "many", "trials": 2.5, "objective": "beauty", "baseline": {"js": "low"}}
    YAML().dump(values, tmp_path / SPEC)
    with pytest.raises(UserError) as raised:
        read_spec(tmp_path)
    assert list(raised.value.faults) == [
        f"{tmp_path / SPEC}: damaged ({what}); restore it from a copy"
        for what in (
            "trials: Input should be a valid integer, got 2.5",
            "epochs: Input should be a valid integer, got 'many'",
            "baseline.js: Input should be a valid number, got 'low'",
        )
    ]
    YAML().dump(values | {"epochs": 1, "trials": 2, "baseline": {}}, tmp_path / SPEC)
    with pytest.raises(UserError, match=r"objective: expected one of .*, got 'beauty'"):
        read_spec(tmp_path)


ODD = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
)


@pytest.fixture(scope="module")
def values_of_spec(tmp_path_factory, store):
    """What the file of a study's spec says."""
    folder = tmp_path_factory.mktemp("spec")
    write_spec(folder, spec_of(store))
    return YAML(typ="safe").load(folder / SPEC)


@given(data=st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spec_is_read_or_refused_by_a_sentence(data, tmp_path, values_of_spec):
    values = values_of_spec.copy()
    name = data.draw(st.sampled_from(sorted(values)))
    if data.draw(st.booleans()):
        values[name] = data.draw(ODD | st.dictionaries(st.text(max_size=3) | st.integers(), ODD, max_size=2))
    else:
        del values[name]
    YAML(typ="safe").dump(values, tmp_path / SPEC)
    with contextlib.suppress(UserError):
        read_spec(tmp_path)


def test_a_file_is_no_study(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be read: Not a directory; name "):
        read_spec(tmp_path / "file")


def test_what_the_study_decides_wins_over_the_space(store):
    settings = spec_of(store, weights_dir="/w").settings({"optim.lr": 0.1, "train.seed": 99})
    assert settings["train.seed"] == 3
    assert settings["train.epochs"] == 2
    assert settings["data.image_size"] == store.image_size
    assert settings["model.weights_dir"] == "/w"
    assert settings["optim.lr"] == 0.1
    proposed = {"optim.lr": 0.1, "train.epochs": 1}  # before the study went on with more
    assert spec_of(store).settings_now(proposed) == {"optim.lr": 0.1, "train.epochs": 2}


def test_the_table_has_a_row_a_trial_best_first(tmp_path):
    write_tables(tmp_path, RECORDS)
    table = pd.read_csv(tmp_path / TRIALS, dtype={"trial_id": str})
    assert list(table["trial_id"]) == ["0001", "0000", "0003", "0002"]
    assert list(table.columns[:6]) == ["trial_id", "status", "epochs", "best_val_js", "val_js", "val_kl"]
    best = table.iloc[0]
    assert (best["best_val_js"], best["val_kl"], best["epochs"], best["best_epoch"]) == (0.3, 0.6, 3.0, 2.0)
    assert best["optim.lr"] == 1e-2
    assert table.iloc[3]["reason"] == "the loss is not a number"


def test_a_failed_trial_is_never_the_best():
    failed = TrialRecord("0009", "failed", {}, "out of memory", (make_report(1, 0.1),))
    paused = TrialRecord("0010", "paused", {}, "", (make_report(1, 0.2),))
    records = [failed, *RECORDS, paused]
    assert [r.trial_id for r in best_first(records)] == ["0010", "0001", "0000", "0003", "0009", "0002"]
    assert winner(records) == paused
    assert winner([failed, RECORDS[2]]) is None
    assert failed not in frontier(records, OBJECTIVES[BY_SIZE])


def test_the_curves_have_a_row_a_report(tmp_path):
    write_tables(tmp_path, RECORDS)
    curves = pd.read_parquet(tmp_path / CURVES)
    assert list(curves["trial_id"]) == ["0000", "0001", "0001", "0001", "0003"]
    assert list(curves["val_js"]) == [0.5, 0.4, 0.3, 0.35, 0.6]


def test_of_ended_trials_the_curves_and_two_reports_are_enough(tmp_path):
    whole, thin = tmp_path / "whole", tmp_path / "thin"
    whole.mkdir()
    thin.mkdir()
    write_tables(whole, RECORDS)
    curves = concatenate(curves_of([]), curves_of(RECORDS[:2]), curves_of(RECORDS[2:]))
    thinned_records = [keep_two_reports(record) for record in RECORDS]
    assert [len(record.reports) for record in thinned_records] == [1, 2, 0, 1]
    write_tables(thin, thinned_records, curves)
    assert (thin / TRIALS).read_bytes() == (whole / TRIALS).read_bytes()
    pd.testing.assert_frame_equal(pd.read_parquet(thin / CURVES), pd.read_parquet(whole / CURVES))


def test_tables_of_a_study_without_trials_can_be_read(tmp_path):
    write_tables(tmp_path, [])
    assert len(pd.read_csv(tmp_path / TRIALS)) == 0


def test_only_the_best_ended_trials_and_the_running_ones_keep_their_weights(tmp_path):
    many = [TrialRecord(f"{i:04d}", "complete", {}, "", (make_report(1, 0.9 - i / 100),)) for i in range(6)]
    many.append(TrialRecord("0006", "running", {}, "", (make_report(1, 0.99),)))
    for record in many:
        folder = trial_folder(tmp_path, record.trial_id)
        folder.mkdir(parents=True)
        for name in ("last.safetensors", "best.safetensors"):
            (folder / name).write_bytes(b"weights")
        (folder / "history.jsonl").write_text(json.dumps(record.reports[0]) + "\n")
    delete_weights(tmp_path, trials_to_strip(many, JS_ALONE))
    kept = {file.parent.name for file in tmp_path.rglob("*.safetensors")}
    assert kept == {"0005", "0004", "0003", "0006"}
    assert len(kept) == KEPT + 1
    assert len(list(tmp_path.rglob("history.jsonl"))) == 7


def test_a_trial_whose_record_is_not_whole_keeps_its_weights():
    many = [TrialRecord(f"{i:04d}", "complete", {}, "", (make_report(1, 0.5 + i / 100),), observed=1) for i in range(5)]
    many[3] = dataclasses.replace(many[3], observed=2)
    many[4] = dataclasses.replace(many[4], reports=())
    assert trials_to_strip(many, JS_ALONE) == []
    assert trials_to_strip([dataclasses.replace(record, observed=0) for record in many], JS_ALONE) == ["0003", "0004"]
    failed = [dataclasses.replace(record, status="failed") for record in many]
    assert trials_to_strip([*many[:3], *failed[3:]], JS_ALONE) == ["0003", "0004"], "these cannot be the best"


def test_a_trial_that_has_just_ended_on_another_machine_is_read_anew(tmp_path, store, monkeypatch):
    """A client of NFS misses a new file for up to a minute, unless the folder is opened."""
    write_study(tmp_path / "study", store)
    folder = trial_folder(tmp_path / "study", "0000")
    opened, scandir, read_history = [], os.scandir, records_module.read_history

    def open_folder(path):
        opened.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", open_folder)
    monkeypatch.setattr(
        records_module, "read_history", lambda path: read_history(path) if opened == [folder.parent, folder] else []
    )
    assert read_record(tmp_path / "study", load_study(tmp_path / "study"), "0000").reports
    opened.clear()
    assert read_records(tmp_path / "study", load_study(tmp_path / "study"))[0].reports


@pytest.mark.parametrize("names", [[HISTORY, PREDICTIONS, BEST, LAST], [HISTORY, BEST, LAST]])
def test_a_trial_goes_on_with_the_predictions_of_the_other_if_they_are_kept(tmp_path, names):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in names:
        (source / name).write_text(name)
    assert copy_checkpoint(source, target) == names
    assert {file.name: file.read_text() for file in target.iterdir()} == {name: name for name in names}


def test_a_front_keeps_its_weights():
    sizes = [0.5, 4.0, 2.0, 8.0, 1.0, 9.0]
    many = [
        TrialRecord(f"{i:04d}", "complete", {}, "", (make_report(1, 0.9 - i / 100, params_millions=size),))
        for i, size in enumerate(sizes)
    ]
    objective = OBJECTIVES[BY_SIZE]
    assert [record.trial_id for record in frontier(many, objective)] == ["0005", "0004", "0000"]
    # The three best, and the smallest; with JS alone, the three best.
    assert {*trials_to_strip(many, objective)} == {"0001", "0002"}
    assert {*trials_to_strip(many, JS_ALONE)} == {"0000", "0001", "0002"}
