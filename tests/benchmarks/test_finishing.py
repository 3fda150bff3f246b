"""The split and the score of the benchmark of finished studies, without its runs."""

import subprocess

import numpy as np
import pytest

from benchmarks import finishing
from benchmarks.finishing import Plan, is_test, predict, score, split_validation, study
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.predictions import half_of

HAPPY, SAD = ([float(name == only) for name in EMOTIONS] for only in ("happy", "sad"))


@pytest.fixture
def faces(tmp_path):
    """A dataset of 40 validation faces; those of even number are happy, the others sad."""
    root = tmp_path / "data"
    for part in ("train_set", "val_set"):
        for kind in ("images", "annotations"):
            (root / part / kind).mkdir(parents=True)
        for number in range(40):
            (root / part / "images" / f"{number}.jpg").write_bytes(b"picture")
            line = ",".join(map(str, SAD if number % 2 else HAPPY))
            (root / part / "annotations" / f"{number}_prob_rank.txt").write_text(f"{line}\n")
    return root


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_each_validation_face_is_searched_on_or_tested(faces, tmp_path):
    searched, test = split_validation(faces, tmp_path / "work")
    assert names(searched / "train_set" / "images") == names(faces / "train_set" / "images")
    for kind in ("images", "annotations"):
        kept, taken = names(searched / "val_set" / kind), names(test / kind)
        assert sorted([*kept, *taken]) == names(faces / "val_set" / kind)
        assert len(kept) > 10
        assert len(taken) > 10
    assert {name.removesuffix(".jpg") for name in names(test / "images")} == {
        name.removesuffix("_prob_rank.txt") for name in names(test / "annotations")
    }


def test_the_halves_of_the_selection_are_others_than_the_test():
    ids = [str(number) for number in range(2000)]
    kept = [face_id for face_id in ids if not is_test(face_id)]
    assert abs(len(kept) - 1000) < 100
    assert 0.4 < np.mean(half_of(kept)) < 0.6


def test_the_score_is_the_mean_js_of_the_test_faces(faces, tmp_path):
    _, test = split_validation(faces, tmp_path / "work")
    ids = [name.removesuffix(".jpg") for name in names(test / "images")]
    wrong = sum(int(face_id) % 2 == 0 for face_id in ids)  # a disjoint distribution has a JS of one bit
    assert score(dict.fromkeys(ids, np.array(SAD)), test / "annotations") == pytest.approx(wrong / len(ids), abs=1e-5)
    with pytest.raises(ValueError, match="not the faces that were predicted"):
        score(dict.fromkeys(ids[1:], np.array(SAD)), test / "annotations")


def test_a_study_is_measured_before_and_after_it_is_finished(faces, tmp_path, monkeypatch):
    run: list[str] = []
    monkeypatch.setattr(finishing, "_run", lambda module: run.append(" ".join(map(str, module))) or 60.0)
    monkeypatch.setattr(
        finishing, "_measure_js", lambda export, test: {"best": 0.2, "finished": 0.18}.get(export.name, 0.19)
    )
    table = study(Plan(faces, None, "quick", 8, 2, 60, [3, 4], None), tmp_path / "a")
    assert table.rows == [(3, 0.2, 0.18, 1.0), (4, 0.2, 0.18, 1.0), ("mean", 0.2, 0.18, 1.0)]
    assert [("--seed 3" in line, "--finish" in line, "--weights-dir" in line) for line in run[:1]] == [
        (True, True, False)
    ]
    run.clear()
    table = study(Plan(faces, faces, "quick", 8, 2, 60, [0], 3), tmp_path / "b")
    assert table.rows[0] == (0, 0.2, 0.19, 2.0)
    assert "--finish" not in run[0]
    assert "--ensemble 3" in run[1]


def test_predictions_are_read_as_the_command_writes_them(faces, tmp_path, monkeypatch):
    _, test = split_validation(faces, tmp_path / "work")

    def run(command, **_):
        lines = [f"{test}/images/{name},{','.join(map(str, SAD))}" for name in names(test / "images")]
        return subprocess.CompletedProcess(command, 0, "\n".join(["image," + ",".join(EMOTIONS), *lines]))

    monkeypatch.setattr(subprocess, "run", run)
    predicted = predict(tmp_path / "best", test)
    assert {*map(tuple, predicted.values())} == {tuple(SAD)}
    assert 0 < score(predicted, test / "annotations") < 1
