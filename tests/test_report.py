"""The command report, and the page that it draws."""

import json
import shutil

import pandas as pd
import pytest

from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.tuning.report.page import write_report
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.open_study import make_study
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.spec import read_spec
from tests.support.commands import exit_code, refusal
from tests.support.pages import Page
from tests.support.studies import searcher_of, spec_of, write_study

MADE = (
    "trials.csv", "curves.parquet", "report.html", "results.csv", "progress.csv", "classes.csv", "calibration.csv",
    "confusion.csv", "entropy.csv", "predictions.csv", *(f"{name}.png" for name in (
        "curves", "progress", "settings", "parallel", "simplex", "cost", "calibration", "confusion", "entropy", "faces",
    )),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("to report") / "study"
    write_study(folder, store)
    return folder


@pytest.fixture
def study(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


@pytest.mark.long
def test_everything_that_is_made_is_made_again(study, capsys, monkeypatch):
    with monkeypatch.context() as plotless:
        plotless.setattr("raytune_emotion.tuning.report.page.draw_all", lambda *_: ())
        assert exit_code(["report", study]) == 0
    assert capsys.readouterr() == (f"{study / 'report.html'}\n", "")
    table, curves = pd.read_csv(study / "trials.csv"), pd.read_parquet(study / "curves.parquet")
    shown = Page(study)
    for name in MADE:
        (study / name).unlink(missing_ok=True)
    assert exit_code(["report", study]) == 0
    assert [name for name in MADE if not (study / name).exists()] == []
    pd.testing.assert_frame_equal(pd.read_csv(study / "trials.csv"), table)
    pd.testing.assert_frame_equal(pd.read_parquet(study / "curves.parquet"), curves)
    assert Page(study).tables == shown.tables
    assert not [path.name for path in study.iterdir() if path.name.startswith(".") and path.name != LOCK]


def test_the_page_of_a_study_at_a_uri_has_what_that_of_a_folder_has(study, tmp_path, no_plots):
    assert exit_code(["report", study]) == 0
    here = Page(study)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(study, elsewhere)
    (elsewhere / "report.html").unlink()
    assert exit_code(["report", elsewhere.as_uri()]) == 0
    there = Page(elsewhere)
    assert there.data["analysis"] == here.data["analysis"] is not None
    assert there.tables.keys() == here.tables.keys()
    assert (elsewhere / "predictions.csv").read_text() == (study / "predictions.csv").read_text()


def test_links_in_the_study_of_a_stranger_lead_nowhere(study, tmp_path, no_plots):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    before = sorted(tmp_path.iterdir())
    for name in MADE:
        (study / name).unlink(missing_ok=True)
        (study / name).symlink_to(victim)
    assert exit_code(["report", study]) == 0
    assert exit_code(["export", study, study / "exported"]) == 0
    assert victim.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == before
    assert not (study / "report.html").is_symlink()


def test_the_page_shows_the_table(study, no_plots):
    assert exit_code(["report", study]) == 0
    table, page = pd.read_csv(study / "trials.csv", dtype={"trial_id": str}), Page(study)
    header, *rows = page.tables["trials"]
    assert header == [
        "trial",
        "status",
        "epochs",
        "JS, bits",
        "KL, nats",
        "accuracy",
        "seconds",
        "loss",
        "backbone",
        "lr",
    ]
    assert [row[0] for row in rows] == list(table.trial_id)
    assert [float(row[3]) for row in rows] == pytest.approx(list(table.best_val_js), rel=1e-3)
    assert page.data["winner"] == table.trial_id[0]


def test_a_study_that_runs_can_be_reported(study, no_plots):
    before = (study / "optuna.journal").read_bytes()
    search = searcher_of(load_study(study), parse_space(read_spec(study).space), seed=0)
    search.ask()
    running = (study / "optuna.journal").read_bytes()
    assert running != before
    assert exit_code(["report", study]) == 0
    # Its record is read and not written.
    assert (study / "optuna.journal").read_bytes() == running
    table = pd.read_csv(study / "trials.csv", dtype={"trial_id": str})
    assert list(table.status) == ["complete", "complete", "complete", "running"]
    assert Page(study).tables["trials"][-1][:4] == ["0003", "running", "", ""]


def test_the_report_of_a_study_that_ends_meanwhile_is_that_of_its_end(study, no_plots, monkeypatch):
    """The search may have written its own last report before, which this one replaces."""
    search = searcher_of(load_study(study), parse_space(read_spec(study).space), seed=0)
    running = [search.ask().trial_id]

    def write(*args, **named):
        write_report(*args, **named)
        if running:
            search.tell(running.pop(), "pruned")

    monkeypatch.setattr("raytune_emotion.tuning.report.publication.write_report", write)
    assert exit_code(["report", study]) == 0
    assert Page(study).tables["trials"][-1][:2] == ["0003", "pruned"]
    assert list(pd.read_csv(study / "trials.csv").status)[-1] == "pruned"


def test_a_study_that_has_just_begun_can_be_reported(tmp_path, store):
    folder = tmp_path / "study"
    make_study(folder, spec_of(store))
    assert exit_code(["report", folder]) == 0
    assert len(Page(folder).tables["trials"]) == 1
    assert len(pd.read_csv(folder / "trials.csv")) == 0


def test_a_folder_that_was_moved_can_be_reported(study, tmp_path, no_plots):
    moved = study.rename(tmp_path / "elsewhere")
    assert exit_code(["report", moved]) == 0
    assert (moved / "report.html").exists()


class TestBadStudies:
    def test_what_is_no_study(self, tmp_path, capsys, no_other_studies):
        (tmp_path / "empty").mkdir()
        for name, what in (("empty", "not a study, because it has no study.yaml"), ("none", "no such folder")):
            (told,) = refusal(capsys, [tmp_path], "report", tmp_path / name)
            assert told == f"{tmp_path / name}: {what}; name a folder that a search has made"

    def test_a_study_without_its_journal(self, study, capsys):
        (study / "optuna.journal").unlink()
        (told,) = refusal(capsys, [study], "report", study)
        assert told == f"{study}: not a study, because it has no optuna.journal; name a folder that a search has made"

    @pytest.mark.parametrize("line", ["{", "{}", "[]", "3", '{"report": "one"}', {"epoch": True}, {"finished": 1}])
    def test_a_damaged_history(self, study, capsys, line):
        file = study / "trials" / "0001" / "history.jsonl"
        if isinstance(line, dict):
            line = json.dumps({**json.loads(file.read_text().splitlines()[0]), **line})
        file.write_text(f"{line}\n{file.read_text()}")
        (told,) = refusal(capsys, [study], "report", study)
        assert told.startswith(f"{file}: a damaged line")

    @pytest.mark.parametrize("text", ["", "[]", "name: [", "name: x\n", "\0", "3"])
    def test_a_damaged_description(self, study, capsys, text):
        (study / "study.yaml").write_text(text)
        (told,) = refusal(capsys, [study], "report", study)
        assert told.startswith(f"{study / 'study.yaml'}: damaged (")
