"""The folder that is meant is named by every command, where another one is named."""

from pathlib import Path

import pytest

from raytune_emotion.storage.locations import Folder, parse_location
from raytune_emotion.storage.nearest import suggest_folder
from tests.support.commands import refusal

MEANT = "; did you mean ray_results/first?"
EXPORT = "; did you mean ray_results/first/best?"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A study with an export and one without, in the folder of studies that nobody has to name."""
    for name in ("first/study.yaml", "first/best/config.json", "affectnet/study.yaml"):
        file = tmp_path / "ray_results" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("named", ["first", "ray_results/frist", "ray_results/first/", "elsewhere/first"])
def test_the_nearest_name_is_meant(named, results):
    assert suggest_folder(Folder(Path(named)), "study.yaml") == MEANT


@pytest.mark.parametrize("named", ["first", "first/best", "ray_results/frist/best", "ray_results/first"])
def test_the_export_of_a_study_is_meant_also_where_the_study_is_named(named, results):
    assert suggest_folder(Folder(Path(named)), "config.json", ("best", "")) == EXPORT


def test_where_no_name_is_near_all_are_named(results):
    assert suggest_folder(Folder(Path("x")), "study.yaml") == "; choose one of ray_results/affectnet, ray_results/first"
    assert suggest_folder(Folder(Path("x")), "trials.csv") == ""
    assert suggest_folder(parse_location("s3://bucket/first"), "study.yaml") == ""


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["status", "first"], MEANT),
        (["report", "ray_results/frist"], MEANT),
        (["confirm", "first"], MEANT),
        (["export", "first", "dest"], MEANT),
        (["export", "first", "dest", "--trial", "3"], MEANT),
        (["export", "first", "dest", "--ensemble", "3"], MEANT),
        (["train", "--study", "first"], MEANT),
        (["search", "--warm-start", "first"], MEANT),
        (["search", "--resume", "--name", "frist"], "; did you mean first?"),
        (["predict", "first", "ray_results"], EXPORT),
        (["demo", "ray_results/first"], EXPORT),
    ],
)
def test_every_command_names_the_folder_that_is_meant(argv, meant, results, capsys):
    told = refusal(capsys, [results / "ray_results"], *argv)[0]
    assert told.endswith(meant)
    assert told.removeprefix("--warm-start ").startswith(("first: no such folder", "ray_results/fr", "ray_results/fi"))
