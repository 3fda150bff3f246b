"""The page of a study, as a file."""

import dataclasses
import json
import math
import re

import pytest
from PIL import Image

from raytune_emotion.learn.run_folder import HISTORY
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.report import page
from raytune_emotion.tuning.report.page import OPTIONAL, report_files, write_report
from raytune_emotion.tuning.report.plots import draw_parallel, draw_settings
from raytune_emotion.tuning.report.publication import publish_report
from raytune_emotion.tuning.study.confirmation import CONFIRMED, CONFIRMED_TABLE, enqueue
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.trials import PARAMS, trial_folder
from tests.support.pages import Page
from tests.support.reports import RECORDS, make_report
from tests.support.studies import searcher_of, spec_of, write_study


@pytest.fixture(scope="module")
def written(tmp_path_factory, store):
    """The folder of a study with its report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, spec_of(store), RECORDS, gain=Gain(0.00123, 492.0))
    return folder


def test_every_ending_of_a_trial_has_its_row(written):
    _, *rows = Page(written).tables["trials"]
    assert [row[:4] for row in rows] == [
        ["0001", "complete", "3", "0.3"],
        ["0000", "pruned", "1", "0.5"],
        ["0003", "running", "1", "0.6"],
        ["0002", "failed", "", ""],
    ]


def test_expected_gain_has_its_tile_where_it_is_known(written, tmp_path, store, no_plots):
    assert "0.0012 bits expected of 8 min 12 s more training (0.009 an hour)" in Page(written).text
    write_report(tmp_path, spec_of(store), RECORDS)
    assert "bits an hour" not in Page(tmp_path).text
    write_report(tmp_path, spec_of(store), RECORDS, gain=Gain(0.0, 0.0))
    assert "0 bits more expected of further training" in Page(tmp_path).text


def test_the_contents_have_the_words_of_the_headings(written):
    text = (written / "report.html").read_text()
    contents = re.findall(r'<a href="#(\w+)">(.*?)</a>', text)
    assert len(contents) > 8
    for anchor, name in contents:
        assert re.search(rf'<section id="{anchor}">\s*<h2>{name}(<|:)', text), anchor


def test_small_plots_leave_little_room_empty():
    columns = {13: 5, 12: 4, 9: 3, 10: 5, 7: 4, 1: 3}
    assert {count: page._columns_of_plots(count) for count in columns} == columns


def test_failures_stand_with_their_reasons(written):
    assert Page(written).tables["failures"][1:] == [["0002", "0", "the loss is not a number"]]


def test_text_from_outside_is_shown_and_is_no_markup_and_numbers_that_are_none_are_not_plotted(tmp_path, store):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)> [/x] {{ 7 * 7 }}"
    records = [
        TrialRecord(f"000{i}", status, {"model.backbone": name}, bad, (make_report(1, 0.4, val_kl=math.inf),))
        for i, (name, status) in enumerate([(bad, "complete"), ("test_vit", "failed")])
    ]
    write_report(tmp_path, dataclasses.replace(spec_of(store), name=bad, data=bad), records)
    shown = Page(tmp_path)
    assert [tag for tag, _ in shown.tags].count("script") == 4  # the data, two libraries, and what draws
    assert not [
        tag for tag, attributes in shown.tags if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    assert bad in shown.text
    assert shown.tables["failures"][1][2] == bad
    assert shown.data["trials"][0]["settings"]["model.backbone"] == bad
    assert shown.data["trials"][0]["kl"] is None


def test_the_winner_has_the_settings_that_it_was_trained_with(tmp_path, store, no_plots):
    """A trial that continues another has more epochs than it was proposed with, and the study more than its space."""
    settings = {"optim.lr": 1e-2, "train.epochs": 2}
    records = [TrialRecord("0000", "complete", settings, "", (make_report(3, 0.3),), continues="0001")]
    trial_folder(tmp_path, "0000").mkdir(parents=True)
    (trial_folder(tmp_path, "0000") / PARAMS).write_text('{"optim.lr": 0.01, "train.epochs": 3, "train.seed": 3}')
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "train.epochs": 2, "augment.flip": 0.5}
    write_report(tmp_path, spec_of(store, space=space, epochs=3), records)
    text = Page(tmp_path).text
    assert "optim.lr: 0.01 train.epochs: 3 Results" in text
    assert "train.epochs: 2" not in text
    assert "1 setting equal in every trial augment. flip 0.5" in text
    head, row = Page(tmp_path).tables["trials"]
    assert dict(zip(head, row, strict=True))["continues"] == "0001"


def test_a_front_is_shown_where_the_study_is_after_one(tmp_path, store, no_plots):
    sizes = ((0.20, 11.0), (0.25, 1.0), (0.22, 5.0), (0.23, 5.0), (0.3, 2.0))
    records = [
        TrialRecord(f"{number:04d}", "complete", {}, "", (make_report(1, js, params_millions=millions),))
        for number, (js, millions) in enumerate(sizes)
    ]
    write_report(tmp_path, spec_of(store), records)
    assert "front" not in Page(tmp_path).tables
    assert Page(tmp_path).data["fronts"]["params"] == ["0000", "0002", "0001"]
    write_report(tmp_path, spec_of(store, objective="val_js, params_millions"), records)
    assert [row[0] for row in Page(tmp_path).tables["front"][1:]] == ["0000", "0002", "0001"]


@pytest.fixture
def settings_alone(monkeypatch):
    """Draw the two plots of the settings, and no other: each takes a part of a second."""

    def draw_settings_alone(data, _):
        yield "settings", draw_settings(data)
        yield "parallel", draw_parallel(data)

    monkeypatch.setattr(page, "draw_all", draw_settings_alone)


@pytest.mark.parametrize(
    "values",
    [[1e-5, 1e-2], [0.0, 0.5], [32, 64], ["adam", "sgd"], [True, False], [None, "a"], [1, "a"], [0, 1e6], [-1, 50]],
)
def test_settings_of_every_kind_are_plotted(tmp_path, store, values, settings_alone):
    records = [
        TrialRecord(f"000{i}", "complete", {"some.setting": value}, "", (make_report(1, 0.4),))
        for i, value in enumerate(values)
    ]
    # A branch of the space in which the setting is absent.
    records.append(TrialRecord("0009", "complete", {"optim.lr": 1e-3}, "", (make_report(1, 0.4),)))
    write_report(tmp_path, spec_of(store), records)
    axis = next(axis for axis in Page(tmp_path).data["axes"] if axis["name"] == "some.setting")
    drawn = [trial["settings"]["some.setting"] for trial in Page(tmp_path).data["trials"][:2]]
    for value in drawn:
        assert value in axis["choices"] if axis["kind"] == "choice" else axis["low"] <= value <= axis["high"]
    with Image.open(tmp_path / "settings.png") as picture:
        assert min(picture.size) > 200


def test_a_range_without_round_numbers_is_plotted(tmp_path, store, settings_alone):
    space = {"optim.lr": {"log_uniform": [6e-4, 9e-4]}, "loss": "kl"}
    records = [
        TrialRecord(f"000{i}", "complete", {"optim.lr": value}, "", (make_report(1, 0.4),))
        for i, value in enumerate((6.5e-4, 8.5e-4))
    ]
    write_report(tmp_path, spec_of(store, space=space), records)
    assert (tmp_path / "settings.png").exists()


def test_a_confirmation_has_one_winner_everywhere(tmp_path, store, no_plots):
    """The run in the middle of the best configuration, and not the one that was luckiest."""
    runs = [("0000", "7", 0.20), ("0001", "7", 0.30), ("0002", "7", 0.31), ("0003", "5", 0.10), ("0004", "5", 0.90)]
    records = [
        TrialRecord(trial_id, "complete", {"optim.lr": 1e-3}, "", (make_report(1, js),), confirms=confirms)
        for trial_id, confirms, js in runs
    ]
    write_report(tmp_path, spec_of(store, confirms={"7": 0.2, "5": 0.1}), records)
    page = Page(tmp_path)
    assert page.data["winner"] == "0001"
    assert "The winner: trial 0001" in page.text
    assert "0.3000 validation JS of the median run, bits (trial 0001)" in " ".join(page.text.split())
    assert "best validation JS" not in page.text


def test_one_is_singular(tmp_path, store, no_plots):
    record = TrialRecord("0000", "complete", {"optim.lr": 1e-3}, "", (make_report(1, 0.4),))
    write_report(tmp_path, spec_of(store, trials=1, epochs=1), [record])
    text = Page(tmp_path).text
    assert "1 trial of at most 1 epoch on faces. Objective: the lowest validation JS." in text
    assert "After 1 epoch." in text
    assert not re.search(r"\b1 (trials|epochs|seeds|settings)\b", text)


def test_time_of_training_counts_once_where_a_trial_went_on_from_another(tmp_path, store, no_plots):
    taken_over = tuple(make_report(step, 0.4) for step in (1, 2))  # 3 seconds
    records = [
        TrialRecord("0000", "complete", {"optim.lr": 1e-3}, "", taken_over),
        TrialRecord(
            "0001", "complete", {"optim.lr": 1e-3}, "", (*taken_over, make_report(3, 0.4, seconds=7.0)), "0000"
        ),
        # The checkpoint of the other was gone.
        TrialRecord("0002", "complete", {"optim.lr": 1e-3}, "", (make_report(1, 0.4, seconds=13.0),), "0000"),
    ]
    write_report(tmp_path, spec_of(store), records)
    assert "20 s of training, all trials together" in Page(tmp_path).text


def test_a_confirmed_winner_has_its_mean_and_standard_error(tmp_path, store, no_plots):
    """They are read from the record: people open the table in programs that write it in another way."""
    folder = tmp_path / CONFIRMED
    make_study(folder, spec_of(store, trials=4, confirms={"0000": 0.5, "0001": 0.3}))
    confirmation = load(folder)
    enqueue(confirmation.optuna, RECORDS[:2], seeds=[4, 5])
    searcher = searcher_of(confirmation.optuna, confirmation.space)
    for js in (0.5, 0.25, 0.6, 0.26):  # seed by seed
        proposal = searcher.ask()
        trial_folder(folder, proposal.trial_id).mkdir(parents=True)
        report = make_report(1, js)
        (trial_folder(folder, proposal.trial_id) / HISTORY).write_text(json.dumps(report) + "\n")
        searcher.observe(proposal.trial_id, report)
        searcher.tell(proposal.trial_id, "complete")
    (folder / CONFIRMED_TABLE).write_text("trial_id;mean_js\n1;0,2\n")
    write_report(tmp_path, spec_of(store), RECORDS)
    told = "0.2550 ± 0.0050 JS, bits: mean and standard error over 2 seeds, trial 0001 of the search"
    assert told in Page(tmp_path).text
    write_report(tmp_path, spec_of(store, epochs=spec_of(store).epochs + 1), RECORDS)
    assert "over 2 seeds" not in Page(tmp_path).text, "its runs had fewer epochs than the study has now"


def test_why_the_winner_is_not_looked_at_more_closely_is_said(written):
    assert "Not shown: " in Page(written).text
    assert "no such checkpoint" in Page(written).text


def test_files_of_an_earlier_winner_are_deleted_where_they_cannot_be_made_again(tmp_path, store, no_plots):
    write_study(tmp_path / "study", store)
    study = load(tmp_path / "study")
    publish_report(study, study.records())
    of_winner = {name for name in OPTIONAL if name.endswith(".csv") and name != "importance.csv"}
    assert of_winner <= set(report_files(study.folder))
    for best in study.folder.glob("trials/*/best.safetensors"):
        best.unlink()
    publish_report(study, study.records())
    assert not of_winner & set(report_files(study.folder))


def test_what_is_pushed_are_the_page_the_pictures_and_the_tables(written):
    assert {"report.html", "curves.png", "cost.png", "results.csv"} <= set(report_files(written))
    assert set(report_files(written)) == {path.name for path in written.iterdir()}


def test_the_page_is_one_file_of_less_than_six_megabytes_that_asks_for_nothing(tmp_path, store, no_plots):
    records = [
        TrialRecord(
            f"{i:04d}", "pruned", {"optim.lr": 1e-4 * (1 + i / 6)}, "", tuple(make_report(e, 0.4) for e in range(1, 9))
        )
        for i in range(500)
    ]
    write_report(tmp_path, spec_of(store), records)
    assert (tmp_path / "report.html").stat().st_size < 6e6
    tags = Page(tmp_path).tags
    assert not [tag for tag, attributes in tags if {"src", "href"} & set(attributes) and tag not in ("a", "img")]
    policy = next(a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy.partition("script-src")[2]
