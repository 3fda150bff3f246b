"""What the report says of ways to use the kept trials."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest

from raytune_emotion.learn.combine import Gain
from raytune_emotion.tuning.report import combination_gain
from raytune_emotion.tuning.report.combination_gain import measure_combinations
from raytune_emotion.tuning.report.page import write_report
from raytune_emotion.tuning.study.open_study import load
from tests.support.studies import write_study


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "study"
    write_study(folder, store, trials=3, epochs=1)
    return folder


def test_the_report_shows_what_each_way_would_bring(study):
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
    assert "The 95 % interval of its JS over the validation images is 0." in page
    assert all(f"raytune-emotion confirm {study}" in page for _ in rivals)
    section = page[page.index('id="combine"') :]
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", section)]
    assert f"{ensemble.combined:.4f}" in cells
    assert f"raytune-emotion predict --mirror {study}/best FACE.jpg" in cells


def test_what_takes_long_is_left_out(study, monkeypatch):
    monkeypatch.setattr(combination_gain, "_MOST_SECONDS", 0.0)
    found = measure_combinations(study, load(study).records())
    assert [brought.measured_on for brought in found] == ["the half that did not choose, for each half"]


@pytest.mark.parametrize(("members", "command"), [((0, 1), "--ensemble 2"), ((0,), "")])
def test_an_ensemble_has_its_command_where_it_is_one(study, monkeypatch, members, command):
    chosen = SimpleNamespace(members=members, trial_ids=["0002", "0001"][: len(members)], gain=Gain(0.3, 0.2))
    monkeypatch.setattr(combination_gain, "combine_ensemble", lambda candidates, most: chosen)
    monkeypatch.setattr(combination_gain, "_MOST_SECONDS", 0.0)
    (found,) = measure_combinations(study, load(study).records())
    assert found.way == ("ensemble of 0002, 0001" if command else "ensemble: no other trial helps 0002")
    assert found.command == (command and f"raytune-emotion export {study} ensemble {command}")
    assert found.cost == ("2 times the time" if command else "")


def test_where_nothing_can_be_measured_nothing_is_shown(study, monkeypatch):
    assert measure_combinations(study, []) == []
    monkeypatch.setattr("raytune_emotion.tuning.study.combination.store_of", lambda trial: None)
    assert measure_combinations(study, load(study).records()) == []
