"""The split and the score of the benchmark of finished studies, without its runs."""

import argparse
import itertools
import os
import subprocess

import numpy as np
import pytest

from benchmarks import finishing
from benchmarks.finishing import Plan, faces_folder, is_test, predict, score, split_validation, study
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.predictions import half_of
from tests.support.faces import picture, write_row

HAPPY, SAD = ([float(name == only) for name in EMOTIONS] for only in ("happy", "sad"))


@pytest.fixture
def faces(tmp_path):
    """A dataset of 40 validation faces; those of even number are happy, the others sad."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(40):
            line = ",".join(map(str, SAD if number % 2 else HAPPY))
            write_row(root, split, number, text=f"{line}\n", suffix="jpg")
    return root


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_each_validation_face_is_searched_on_or_tested(faces, tmp_path):
    split = split_validation(faces, tmp_path)
    for kind in ("images", "annotations"):
        assert names(split.searched / "train_set" / kind) == names(faces / "train_set" / kind)
    kept, taken = names(split.searched / "val_set" / "images"), names(split.test)
    assert sorted([*kept, *taken]) == names(faces / "val_set" / "images")
    assert len(kept) > 10
    assert len(taken) > 10
    for images, targets in ((kept, split.searched_targets), (taken, split.targets)):
        assert {name.removesuffix(".jpg") for name in images} == targets.keys()
        assert all(list(target) == (SAD if int(face_id) % 2 else HAPPY) for face_id, target in targets.items())
    assert names(split.searched / "val_set" / "annotations") == sorted(
        name.replace(".jpg", "_prob_rank.txt") for name in kept
    )


def test_what_is_no_good_row_is_left_out_and_named(faces, tmp_path, capsys):
    """A real folder holds other annotations, images without one, the reverse, and images that are not whole."""
    whole = split_validation(faces, tmp_path / "whole")
    images, annotations = faces / "val_set" / "images", faces / "val_set" / "annotations"
    (annotations / "5_exp.txt").write_text("3\n")
    picture(1).save(images / "unlabelled.jpg")
    write_row(faces, "val", "lost")
    (images / "lost.png").unlink()
    write_row(faces, "val", "odd", text="much\n")
    broken = sorted(whole.targets)[0], sorted(whole.searched_targets)[0]
    for face_id in broken:
        (images / f"{face_id}.jpg").write_bytes(b"no picture")
    capsys.readouterr()
    split = split_validation(faces, tmp_path / "work")
    assert split.targets.keys() == whole.targets.keys() - {*broken}
    assert split.searched_targets.keys() == whole.searched_targets.keys() - {*broken}
    assert {name.removesuffix(".jpg") for name in names(split.test)} == split.targets.keys()
    told = capsys.readouterr().err
    for name in ("unlabelled.jpg", "lost_prob_rank.txt", "odd_prob_rank.txt", *(f"{name}.jpg" for name in broken)):
        assert name in told
    assert "5_exp.txt" not in told


def test_a_split_is_kept_for_the_next_time_unless_the_data_have_changed(faces, tmp_path):
    first = split_validation(faces, tmp_path)
    before = first.searched.stat()
    again = split_validation(faces, tmp_path)
    assert (again.searched, again.targets.keys()) == (first.searched, first.targets.keys())
    assert os.path.samestat(before, again.searched.stat())
    write_row(faces, "train", "more")
    assert split_validation(faces, tmp_path).searched != first.searched


def test_a_folder_of_another_layout_is_refused(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="not a folder in the layout of AffectNetFused"):
        faces_folder(str(tmp_path))


def test_the_halves_of_the_selection_are_others_than_the_test():
    ids = [str(number) for number in range(2000)]
    kept = [face_id for face_id in ids if not is_test(face_id)]
    assert abs(len(kept) - 1000) < 100
    assert 0.4 < np.mean(half_of(kept)) < 0.6


def test_the_score_is_the_mean_of_a_metric_over_the_faces():
    targets = {str(number): np.array(SAD if number % 2 else HAPPY) for number in range(5)}
    # A disjoint distribution has a JS of one bit: those of even numbers are three of five.
    assert score(dict.fromkeys(targets, np.array(SAD)), targets) == pytest.approx(3 / 5, abs=1e-5)
    assert score(dict.fromkeys(targets, np.array(SAD)), targets, "accuracy") == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="not the faces that were predicted: 1 others, such as 0"):
        score(dict.fromkeys(list(targets)[1:], np.array(SAD)), targets)


@pytest.fixture
def run(monkeypatch):
    """The commands that are run, each in a minute, without what they do."""
    commands: list[str] = []
    monkeypatch.setattr(finishing, "_run", lambda module: commands.append(" ".join(map(str, module))) or 60.0)
    monkeypatch.setattr(
        finishing, "_measure_js", lambda export, faces: {"best": 0.2, "finished": 0.18}.get(export.name, 0.19)
    )
    return commands


def test_a_study_is_measured_before_and_after_it_is_finished(faces, tmp_path, run):
    tables = list(study(Plan(faces, None, "quick", 8, 2, 60, [3, 4], None), tmp_path / "a"))
    rows = [(3, 0.2, 0.18, 1.0), (4, 0.2, 0.18, 1.0)]
    mean = ("mean", 0.2, 0.18, 1.0)
    assert [table.rows for table in tables] == [[rows[0], mean], [*rows, mean]]
    assert ["--seed 3" in run[0], "--finish" in run[0], "--weights-dir" in run[0]] == [True, True, False]
    run.clear()
    (table,) = study(Plan(faces, faces, "quick", 8, 2, 60, [0], 3), tmp_path / "b")
    assert table.rows[0] == (0, 0.2, 0.19, 2.0)
    assert "--finish" not in run[0]
    assert "--ensemble 3" in run[1]


def test_what_was_interrupted_goes_on_and_what_has_ended_is_not_run_again(faces, tmp_path, monkeypatch, run):
    plan = Plan(faces, None, "quick", 8, 2, 60, [0, 1, 2], None)
    first = list(itertools.islice(study(plan, tmp_path), 1))
    assert len(first[0].rows) == 2
    # Seed 1 has begun, and the next has not.
    (tmp_path / "seed1").mkdir()
    (tmp_path / "seed1" / "study.yaml").touch()
    run.clear()
    *_, table = study(plan, tmp_path)
    assert [("--seed 1" in line, "--seed 2" in line, "--resume" in line) for line in run] == [
        (True, False, True),
        (False, True, False),
    ]
    assert table.rows == [
        (0, 0.2, 0.18, 1.0),
        (1, 0.2, 0.18, None),
        (2, 0.2, 0.18, 1.0),
        ("mean", pytest.approx(0.2), pytest.approx(0.18), 1.0),
    ]
    assert table.notes[1:] == ["Seed 1 was interrupted, and its search may have had more than its time."]
    run.clear()
    *_, again = study(plan, tmp_path)
    assert run == []
    assert again.rows[1][-1] is None


def test_predictions_are_read_as_the_command_writes_them(faces, tmp_path, monkeypatch):
    split = split_validation(faces, tmp_path / "work")

    def run(command, **_):
        lines = [f"{split.test}/{name},{','.join(map(str, SAD))}" for name in names(split.test)]
        return subprocess.CompletedProcess(command, 0, "\n".join(["image," + ",".join(EMOTIONS), *lines]))

    monkeypatch.setattr(subprocess, "run", run)
    predicted = predict(tmp_path / "best", split.test)
    assert {*map(tuple, predicted.values())} == {tuple(SAD)}
    assert 0 < score(predicted, split.targets) < 1
