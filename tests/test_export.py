"""The command export, also on studies that are not as they should be."""

import shutil

import pytest

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.tuning.execution.job import Job, train_here
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.open_study import make_study
from tests.support.commands import exit_code, refusal
from tests.support.studies import spec_of, write_study


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("to export") / "study"
    write_study(folder, store, trials=2, epochs=1)
    return folder


@pytest.fixture
def study(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


def best_of(study) -> str:
    return (study / "trials.csv").read_text().splitlines()[1][:4]


def test_the_weights_of_the_trial_are_gone(study, tmp_path, capsys):
    best = best_of(study)
    (study / "trials" / best / "best.safetensors").unlink()
    other = "0001" if best == "0000" else "0000"
    (told,) = refusal(capsys, [tmp_path], "export", study, tmp_path / "x")
    assert told == (f"{study}: no weights of trial {best}, because only the best ones are kept; choose one of {other}")
    (told,) = refusal(capsys, [tmp_path], "export", study, tmp_path / "x", "--trial", "0009")
    assert told == f"{study}: no trial 0009; there are 0000, 0001"
    assert exit_code(["export", study, tmp_path / "x", "--trial", str(int(other))]) == 0


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_damaged_weights(study, tmp_path, capsys, keep):
    file = study / "trials" / best_of(study) / "best.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    (told,) = refusal(capsys, [tmp_path], "export", study, tmp_path / "x")
    assert told.startswith(f"{file}: a damaged checkpoint (")


def test_destinations_that_are_taken(study, tmp_path, capsys):
    (tmp_path / "file").touch()
    (told,) = refusal(capsys, [tmp_path], "export", study, tmp_path / "file")
    assert told == f"{tmp_path / 'file'}: exists already and is not a folder; name another destination"
    (told,) = refusal(capsys, [tmp_path], "export", study, tmp_path / "file" / "below")
    assert told.startswith(f"{tmp_path / 'file' / 'below'}: cannot be written (")
    (told,) = refusal(capsys, [tmp_path], "export", study, study)
    assert told.startswith(f"{study}: holds files that do not belong to an export (")


@pytest.mark.parametrize("dest", [".", "../here", "../../above"])
def test_the_current_folder_is_not_replaced(study, tmp_path, capsys, monkeypatch, dest):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (told,) = refusal(capsys, [tmp_path], "export", study, dest)
    assert told == f"{dest}: is or holds the current folder, which cannot be replaced; name another place"


def test_export_goes_to_a_uri_but_not_among_other_files(study, tmp_path, capsys):
    dest = tmp_path / "at a uri"
    assert exit_code(["export", study, dest.as_uri(), "--format", "timm, pt2", "--format", "timm"]) == 0
    assert (dest / "model.pt2").is_file()
    assert (dest / "README.md").read_text().count("model.safetensors differs") == 1
    assert capsys.readouterr().out == f"trial {best_of(study)} is exported to {dest.as_uri()}\n"
    assert exit_code(["export", study, dest.as_uri()]) == 0
    assert load_package(dest).image_size == 32
    assert not (dest / "model.pt2").exists()
    (dest / "thesis.tex").touch()
    (told,) = refusal(capsys, [tmp_path], "export", study, dest.as_uri())
    assert told.startswith(f"{dest.as_uri()}: holds files that do not belong to an export (thesis.tex)")


def test_data_at_a_uri_are_those_of_the_cache(study, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(store.path, tmp_path / "faces")
    uri = (tmp_path / "faces").as_uri()
    (study / "trials" / best_of(study) / "data.txt").write_text(uri + "\n")
    spec = (study / "study.yaml").read_text()
    assert str(store.path) in spec
    (study / "study.yaml").write_text(spec.replace(str(store.path), uri))
    away = "because the data of the run are not on this machine"
    assert exit_code(["export", study, tmp_path / "x"]) == 0
    assert away in (tmp_path / "x" / "README.md").read_text()
    open_store(uri)
    shutil.rmtree(tmp_path / "faces")
    assert exit_code(["export", study, tmp_path / "x"]) == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert away not in card
    assert "Means over all 33 validation images" in card


def test_data_that_were_moved_after_the_training_are_found(study, store, tmp_path):
    (study / "trials" / best_of(study) / "data.txt").write_text(f"{tmp_path / 'gone'}\n")
    assert exit_code(["export", study, tmp_path / "x"]) == 0
    assert "Means over all 33 validation images" in (tmp_path / "x" / "README.md").read_text()


def test_a_study_without_results(tmp_path, store, capsys):
    study = tmp_path / "begun"
    make_study(study, spec_of(store))
    (told,) = refusal(capsys, [tmp_path], "export", study, tmp_path / "x")
    assert told == f"{study}: no trial has a result yet: none has reported, or all that reported have failed"


@pytest.mark.parametrize("text", ["", "trial_id,status,best_val_js\n0000,complete,0.1\n0001,complete,0.2\n"])
def test_the_best_trial_is_read_from_the_record_and_not_from_its_table(study, tmp_path, text):
    """A search that was killed has left a table that is behind (C9)."""
    best = best_of(study)
    (study / "trials.csv").write_text(text if best != "0000" else text.replace("0000", "0001", 1))
    assert exit_code(["export", study, tmp_path / "x"]) == 0
    assert f"Trial {best} of the study" in (tmp_path / "x" / "README.md").read_text()


def test_a_run_of_train_is_exported_as_it_is(tmp_path, store, capsys):
    """Also one that was interrupted: its best weights until then."""
    settings = {"model.backbone": "test_resnet", "data.image_size": 32, "train.epochs": 1, "loss.kl": 1.0}
    run = tmp_path / "run"
    list(train_here(Job("run", str(run), str(store.path), RunConfig.from_flat(settings).to_flat(), Resources(1, 1, 0))))
    assert exit_code(["export", run, tmp_path / "x"]) == 0
    assert capsys.readouterr().out == f"the best weights of {run} are exported to {tmp_path / 'x'}\n"
    assert (tmp_path / "x" / "model.safetensors").is_file()
    (told,) = refusal(capsys, [tmp_path], "export", run, tmp_path / "y", "--trial", "2")
    assert told.startswith(f"--trial 2: {run} is a run of train, not a study")
    (run / "best.safetensors").unlink()
    (told,) = refusal(capsys, [tmp_path], "export", run, tmp_path / "y")
    command = "python -m raytune_emotion.train --resume --name run"
    assert told == f"{run}: the run has no evaluation yet; continue it with {command}, and its --results"


def test_the_studies_in_a_folder_are_named_where_one_was_meant(tmp_path, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").touch()
    (told,) = refusal(capsys, [tmp_path], "export", tmp_path, tmp_path / "x")
    what = "not a study, because it has no study.yaml"
    assert told == f"{tmp_path}: {what}; choose one of the studies in it: first, second"
