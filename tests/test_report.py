"""The command report, and the page that it draws."""

import base64
import dataclasses
import io
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from raytune_emotion.tuning.report.page import write_report
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.open_study import make_study
from raytune_emotion.tuning.study.optuna_study import Searcher, load_study
from raytune_emotion.tuning.study.records import TrialRecord
from raytune_emotion.tuning.study.spec import read_spec
from tests.test_search import exit_code, refusal, write_study
from tests.tuning.study.test_records import RECORDS, report, spec_of

MADE = ("trials.csv", "curves.parquet", "report.html", "curves.png", "progress.png", "settings.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("to report") / "study"
    write_study(folder, store)
    return folder


@pytest.fixture
def study(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


class Page(HTMLParser):
    """The cells of a page's table, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.pictures, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag == "img":
            name, data = dict(attrs)["alt"], dict(attrs)["src"].removeprefix("data:image/png;base64,")
            self.pictures.append((name, Image.open(io.BytesIO(base64.b64decode(data)))))
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and self.rows[-1] and self.lasttag in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")


def page_of(folder) -> Page:
    return Page((folder / "report.html").read_text())


def test_everything_that_is_made_is_made_again(study, capsys):
    assert exit_code(["report", study]) == 0
    assert capsys.readouterr() == (f"{study / 'report.html'}\n", "")
    table, curves = pd.read_csv(study / "trials.csv"), pd.read_parquet(study / "curves.parquet")
    shown = page_of(study)
    for name in MADE:
        (study / name).unlink()
    assert exit_code(["report", study]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(study / "trials.csv"), table)
    pd.testing.assert_frame_equal(pd.read_parquet(study / "curves.parquet"), curves)
    assert page_of(study).rows == shown.rows
    assert not [path.name for path in study.iterdir() if path.name.startswith(".")]


def test_the_page_shows_the_table(study):
    assert exit_code(["report", study]) == 0
    table, page = pd.read_csv(study / "trials.csv", dtype={"trial_id": str}), page_of(study)
    header, *rows = page.rows
    assert header[:7] == ["trial", "status", "epochs", "JS, bits", "KL, nats", "accuracy", "seconds"]
    assert set(header[7:]) == {"model.backbone", "optim.lr", "loss.kl", "loss.js"}
    assert [row[0] for row in rows] == list(table.trial_id)
    assert [float(row[3]) for row in rows] == pytest.approx(list(table.best_val_js), rel=1e-3)
    assert [name for name, _ in page.pictures] == ["curves", "progress", "settings"]
    assert all(min(picture.size) > 200 for _, picture in page.pictures)


def test_a_study_that_runs_can_be_reported(study):
    before = (study / "optuna.journal").read_bytes()
    search = Searcher(load_study(study), parse_space(read_spec(study).space), seed=0)
    search.ask()
    running = (study / "optuna.journal").read_bytes()
    assert running != before
    assert exit_code(["report", study]) == 0
    # Its record is read and not written.
    assert (study / "optuna.journal").read_bytes() == running
    table = pd.read_csv(study / "trials.csv", dtype={"trial_id": str})
    assert list(table.status) == ["complete", "complete", "complete", "running"]
    assert page_of(study).rows[-1][:4] == ["0003", "running", "", ""]


def test_a_study_that_has_just_begun_can_be_reported(tmp_path, store):
    folder = tmp_path / "study"
    make_study(folder, spec_of(store))
    assert exit_code(["report", folder]) == 0
    assert len(page_of(folder).rows) == 1
    assert len(pd.read_csv(folder / "trials.csv")) == 0


def test_a_folder_that_was_moved_can_be_reported(study, tmp_path):
    moved = study.rename(tmp_path / "elsewhere")
    assert exit_code(["report", moved]) == 0
    assert (moved / "report.html").exists()


class TestThePage:
    def test_every_ending_of_a_trial_has_its_row(self, tmp_path, store):
        write_report(tmp_path, spec_of(store), RECORDS)
        _, *rows = page_of(tmp_path).rows
        assert [row[:4] for row in rows] == [
            ["0001", "complete", "3", "0.3"],
            ["0000", "pruned", "1", "0.5"],
            ["0003", "running", "1", "0.6"],
            ["0002", "failed", "", ""],
        ]

    def test_small_models_that_no_smaller_one_betters_are_shown(self, tmp_path, store):
        sizes = ((0.20, 11.0), (0.25, 1.0), (0.22, 5.0), (0.23, 5.0), (0.3, 2.0))
        records = [
            TrialRecord(f"{number:04d}", "complete", {}, "", (report(1, js, params_millions=millions),))
            for number, (js, millions) in enumerate(sizes)
        ]
        write_report(tmp_path, spec_of(store), records)
        rows = page_of(tmp_path).rows
        assert [row[0] for row in rows[rows.index(next(r for r in rows if "backbone" in r)) + 1 :]] == [
            "0000", "0002", "0001",
        ]  # fmt: skip

    def test_names_are_shown_and_not_run(self, tmp_path, store):
        bad = "<script>alert(1)</script>"
        records = [
            TrialRecord(f"000{i}", "complete", {"model.backbone": name}, "", (report(1, 0.4),))
            for i, name in enumerate([bad, "test_vit"])
        ]
        write_report(tmp_path, dataclasses.replace(spec_of(store), name=bad, data=bad), records)
        assert "<script" not in (tmp_path / "report.html").read_text()
        assert bad in page_of(tmp_path).rows[1]

    @pytest.mark.parametrize(
        "values",
        [[1e-5, 1e-2], [0.0, 0.5], [32, 64], ["adam", "sgd"], [True, False], [None, "a"], [1, "a"], [0, 1e6], [-1, 50]],
    )
    def test_settings_of_every_kind_are_plotted(self, tmp_path, store, values):
        records = [
            TrialRecord(f"000{i}", "complete", {"some.setting": value}, "", (report(1, 0.4),))
            for i, value in enumerate(values)
        ]
        # A branch of the space in which the setting is absent.
        records.append(TrialRecord("0009", "complete", {"optim.lr": 1e-3}, "", (report(1, 0.4),)))
        write_report(tmp_path, spec_of(store), records)
        assert [name for name, _ in page_of(tmp_path).pictures] == ["curves", "progress", "settings"]

    def test_what_is_beyond_the_first_twenty_is_counted(self, tmp_path, store):
        records = [
            TrialRecord(f"{i:04d}", "pruned", {"optim.lr": 1e-3 * (i + 1)}, "", (report(1, 0.4 + i / 100),))
            for i in range(25)
        ]
        write_report(tmp_path, spec_of(store), records)
        page = page_of(tmp_path)
        assert len(page.rows) == 1 + 20
        assert any("5 more are in trials.csv" in text for text in page.texts)

    def test_it_needs_nothing_from_elsewhere(self, tmp_path, store):
        write_report(tmp_path, spec_of(store), RECORDS)
        text = (tmp_path / "report.html").read_text()
        assert not re.findall(r'(?:src|href)="(?!data:)', text)
        assert "http" not in re.sub(r"base64,[^\"]*", "", text)


class TestBadStudies:
    def test_what_is_no_study(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        for name in ("empty", "none"):
            (told,) = refusal(capsys, [tmp_path], "report", tmp_path / name)
            assert told.startswith(f"{tmp_path / name}: no study.yaml in it, so it is no study; name a folder that")

    def test_a_study_without_its_journal(self, study, capsys):
        (study / "optuna.journal").unlink()
        (told,) = refusal(capsys, [study], "report", study)
        assert told == f"{study}: no optuna.journal in it, so it is no study; name a folder that a search has made"

    @pytest.mark.parametrize("line", ["{", "{}", "[]", "3", '{"report": "one"}'])
    def test_a_damaged_history(self, study, capsys, line):
        file = study / "trials" / "0001" / "history.jsonl"
        file.write_text(f"{line}\n{file.read_text()}")
        (told,) = refusal(capsys, [study], "report", study)
        assert told.startswith(f"{file}: a damaged line")

    @pytest.mark.parametrize("text", ["", "[]", "name: [", "name: x\n", "\0", "3"])
    def test_a_damaged_description(self, study, capsys, text):
        (study / "study.yaml").write_text(text)
        (told,) = refusal(capsys, [study], "report", study)
        assert told.startswith(f"{study / 'study.yaml'}: damaged (")
