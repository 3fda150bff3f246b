"""What the report says of ways to use the kept trials."""

import dataclasses
import html
import math
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

from raytune_emotion.data.store import open_store
from raytune_emotion.learn.run_folder import PREDICTIONS
from raytune_emotion.storage.locations import Remote
from raytune_emotion.tuning.report import combination_gain
from raytune_emotion.tuning.report.combination_gain import measure_combinations
from raytune_emotion.tuning.report.page import write_report
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.records import best_first
from raytune_emotion.tuning.study.spec import read_spec, write_spec
from tests.support.studies import forget_last_ending, write_study


@pytest.fixture(autouse=True)
def all_ways(monkeypatch):
    """Leave no way out because this machine is busy."""
    monkeypatch.setattr(combination_gain, "_MOST_SECONDS", math.inf)


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "study"
    write_study(folder, store)
    return folder


def test_the_report_shows_what_each_way_would_bring(study, store, no_plots):
    records = load(study).records()
    rivals = write_report(study, load(study).spec, records)
    assert set(rivals) < {record.trial_id for record in records}
    table = pd.read_csv(study / "combinations.csv")
    best = min(record.best["val_js"] for record in records)
    mirror = table[table.way.str.startswith("mirror image")].iloc[0]
    assert mirror.single == pytest.approx(best, abs=1e-3)
    assert mirror.combined != mirror.single
    ensemble = table[table.way.str.startswith("ensemble")].iloc[0]
    assert 0 < ensemble.combined < 1
    page = (study / "report.html").read_text()
    images = len(store.val)
    assert f"The 95 % interval of its JS over {images} of the {images} validation images is 0." in page
    assert (f"raytune-emotion confirm {study}" in page) == bool(rivals)
    section = page[page.index('id="combine"') :]
    cells = [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<td.*?</td>", section)]
    assert f"{ensemble.combined:.4f}" in cells
    (trial_id,) = {record.trial_id for record in records if record.best["val_js"] == best}
    dest = f"trial_{trial_id}"
    command = (
        f"raytune-emotion export {study} {dest} --trial {trial_id} && raytune-emotion predict --mirror {dest} FACE.jpg"
    )
    assert command in cells


def test_what_takes_long_is_not_measured_and_says_so_with_its_command(study, combined, monkeypatch):
    monkeypatch.setattr(combination_gain, "_MOST_SECONDS", 0.0)
    ensemble, soup, mirror = measure_combinations(study, load(study).records())
    assert ensemble.measured_on == "the half that did not choose, for each half"
    for found in (soup, mirror):
        assert found.measured_on == "not measured: would take longer than 0 s"
        assert found.cells[2:5] == ["", "", ""]
    assert soup.command == f"raytune-emotion export {study} soup --soup"
    assert mirror.command.endswith(" FACE.jpg")


def test_a_page_shows_what_is_not_measured(study, combined, monkeypatch, no_plots):
    monkeypatch.setattr(combination_gain, "_MOST_SECONDS", 0.0)
    write_report(study, load(study).spec, load(study).records())
    assert "not measured: would take longer than 0 s" in (study / "report.html").read_text()
    assert list(pd.read_csv(study / "combinations.csv").combined.isna()) == [False, True, True]


def test_a_trial_that_was_left_before_its_end_counts(study, tmp_path):
    """As by a time budget. `best/` may be it."""
    shutil.copytree(study, tmp_path / "study")
    forget_last_ending(tmp_path / "study")
    records = load(tmp_path / "study").records()
    *_, mirror = measure_combinations(tmp_path / "study", records)
    best, *_ = best_first(records)
    assert (mirror.way, records[-1].status) == (f"mirror image, trial {best.trial_id}", "running")
    alone = [dataclasses.replace(record, status="paused") for record in records if record.trial_id == best.trial_id]
    (mirror,) = measure_combinations(tmp_path / "study", alone)
    assert mirror.way == f"mirror image, trial {best.trial_id}"


def test_data_at_a_uri_are_those_of_the_cache(study, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(study, tmp_path / "study")
    shutil.copytree(store.path, tmp_path / "faces")
    uri, records = (tmp_path / "faces").as_uri(), load(study).records()
    write_spec(tmp_path / "study", dataclasses.replace(read_spec(study), stores={32: uri}))
    assert measure_combinations(tmp_path / "study", records) == []
    open_store(uri)
    shutil.rmtree(tmp_path / "faces")
    assert measure_combinations(tmp_path / "study", records)


@pytest.mark.parametrize(("members", "command"), [((0, 1), "--ensemble 2"), ((0,), "")])
def test_an_ensemble_has_its_command_where_it_is_one(study, monkeypatch, members, command):
    chosen = SimpleNamespace(members=members, trial_ids=["0002", "0001"][: len(members)], single=0.3, combined=0.2)
    monkeypatch.setattr(combination_gain, "combine_ensemble", lambda candidates, most: chosen)
    monkeypatch.setattr(combination_gain, "_MOST_SECONDS", 0.0)
    found, *_ = measure_combinations(study, load(study).records())
    assert found.way == ("ensemble of 0002, 0001" if command else "ensemble: no other trial helps 0002")
    assert found.command == (command and f"raytune-emotion export {study} ensemble {command}")
    assert found.cost == ("2 times the time" if command else "")
    assert (found.single, found.combined) == (0.3, 0.2 if command else 0.3)


def two_members(candidates, most=2):
    return SimpleNamespace(members=(0, 1), trial_ids=["0000", "0001"], single=0.3, combined=0.2, candidates=candidates)


@pytest.fixture
def combined(monkeypatch):
    """Let two trials always be the best combination."""
    monkeypatch.setattr(combination_gain, "combine_ensemble", two_members)
    monkeypatch.setattr(combination_gain, "combine_soup", lambda candidates, device: (two_members(candidates), None))
    monkeypatch.setattr(combination_gain, "list_compatible", lambda bests: list(range(len(bests))))


@pytest.mark.parametrize(("mixed", "has_command"), [(3, True), (2, False)])
def test_a_soup_has_its_command_where_the_export_would_choose_among_the_same(
    study, combined, monkeypatch, mixed, has_command
):
    monkeypatch.setattr(combination_gain, "_MIXED", mixed)
    _, soup, _ = measure_combinations(study, load(study).records())
    assert soup.command == (f"raytune-emotion export {study} soup --soup" if has_command else "")


def test_a_command_that_would_choose_among_other_trials_is_not_named(study, combined):
    records = load(study).records()
    assert measure_combinations(study, records)[0].command
    (worst,) = sorted(records, key=lambda record: record.best["val_js"])[2:]
    file = study / "trials" / worst.trial_id / PREDICTIONS
    content = file.read_bytes()
    file.unlink()
    try:
        found = measure_combinations(study, records)
    finally:
        file.write_bytes(content)
    assert [bool(brought.command) for brought in found] == [False, False, True]


def test_the_commands_of_a_study_at_a_uri_name_it(study, combined):
    found = measure_combinations(study, load(study).records(), Remote("s3://bucket/first"))
    assert all(brought.command.startswith("raytune-emotion export s3://bucket/first ") for brought in found)


def test_where_nothing_can_be_measured_nothing_is_shown(study, monkeypatch):
    assert measure_combinations(study, []) == []
    monkeypatch.setattr(combination_gain, "find_store", lambda spec, fingerprint, fetch: None)
    assert measure_combinations(study, load(study).records()) == []
