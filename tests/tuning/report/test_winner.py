"""What the winner of a study predicts, and where it is wrong."""

import dataclasses
import shutil

import numpy as np
import pytest

from raytune_emotion.data.store import Split, open_store
from raytune_emotion.learn.predictions import Predictions, class_errors
from raytune_emotion.tuning.report.winner import (
    confusion,
    errors_by_entropy,
    extreme_faces,
    js_interval,
    predict_winner,
    predictions_table,
    rivals_of,
)
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.records import TrialRecord, read_records, winner
from raytune_emotion.tuning.study.spec import read_spec
from tests.support.reports import make_report
from tests.support.studies import write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("winner") / "study"
    write_study(folder, store)
    return folder


@pytest.fixture
def predictions():
    true_NK = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    predicted_NK = np.array([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4], [0.2, 0.8]])
    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    split = Split(("a", "b", "<b>c", "d"), true_NK.astype(np.float32), (images,))
    js_N = np.array([0.05, 0.0, 0.6, 0.0])
    return Predictions(("happy", "sad"), split.ids, true_NK, predicted_NK, js_N, np.arange(4), split)


def test_it_finds_the_numbers_that_training_has_reported(study):
    best = winner(read_records(study, load_study(study)))
    found, reason = predict_winner(study, read_spec(study), best.trial_id)
    assert reason == ""
    assert len(found.ids) == len(found.split)
    assert found.js_N.mean() == pytest.approx(best.best["val_js"], abs=1e-6)
    assert np.allclose(found.predicted_NK.sum(axis=1), 1)
    majority = np.trace(confusion(found)) / len(found.ids)
    assert majority == pytest.approx(best.best["val_accuracy"], abs=1e-6)
    assert list(predictions_table(found)["image"]) == [found.ids[i] for i in np.argsort(-found.js_N, kind="stable")]


def test_rivals_are_other_settings_within_the_interval_of_the_best_trial(predictions):
    low, high = js_interval(predictions)
    mean = predictions.js_N.mean()
    assert low < mean < high

    def trial(trial_id, js, lr, status="complete"):
        return TrialRecord(trial_id, status, {"optim.lr": lr}, "", (make_report(1, js),))

    best = trial("0000", 0.2, 0.1)
    margin = high - mean
    near = [trial("0002", 0.2 + 0.9 * margin, 0.2), trial("0003", 0.2 + 0.5 * margin, 0.3)]
    others = [
        trial("0001", 0.2 + 0.1 * margin, 0.1),  # the same settings, which the best trial continues
        trial("0004", 0.2 + 1.1 * margin, 0.4),
        trial("0005", 0.2, 0.5, "failed"),
    ]
    assert rivals_of(best, [best, *near, *others], predictions) == ["0003", "0002"]
    assert rivals_of(best, [best, *others], predictions) == []


def test_why_it_cannot_be_done_is_said(study, tmp_path):
    spec = read_spec(study)
    trial_id = winner(read_records(study, load_study(study))).trial_id
    predictions, reason = predict_winner(study, spec, "0099")
    assert predictions is None
    assert "no such checkpoint" in reason
    gone = dataclasses.replace(spec, stores={32: str(tmp_path / "gone")})
    assert predict_winner(study, gone, trial_id) == (
        None,
        "the data of 32 px that the study was trained on are not on this machine",
    )
    away = dataclasses.replace(spec, stores={32: "s3://bucket/faces"})
    assert predict_winner(study, away, trial_id) == (
        None,
        "the data of 32 px that the study was trained on are not on this machine",
    )


def test_data_at_a_uri_are_those_of_the_cache(study, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(store.path, tmp_path / "faces")
    uri, trial_id = (tmp_path / "faces").as_uri(), winner(read_records(study, load_study(study))).trial_id
    spec = dataclasses.replace(read_spec(study), stores={32: uri})
    assert predict_winner(study, spec, trial_id) == (
        None,
        "the data of 32 px that the study was trained on are not on this machine",
    )
    open_store(uri)
    shutil.rmtree(tmp_path / "faces")
    (cached, _), (here, _) = (predict_winner(study, its, trial_id) for its in (spec, read_spec(study)))
    assert cached.ids == here.ids


def test_errors_of_classes(predictions):
    happy, sad = class_errors(predictions)
    assert (happy.name, happy.mean_target, happy.mean_prediction) == (
        "happy",
        pytest.approx(0.425),
        pytest.approx(0.55),
    )
    assert happy.mean_absolute_error == pytest.approx(0.7 / 4)
    assert happy.calibration_error == pytest.approx((0.1 + 0.0 + 0.6 + 0.0) / 4)
    assert (happy.majority_images, happy.majority_found) == (2, 1.0)
    assert (sad.majority_images, sad.majority_found) == (2, 0.5)
    assert [b.count for b in happy.bins] == [1, 1, 1, 1]


def test_a_class_that_is_never_the_likeliest_has_no_share(predictions):
    never = dataclasses.replace(predictions, true_NK=np.array([[1.0, 0.0]] * 4))
    assert class_errors(never)[1].majority_found is None


def test_confusion_counts_target_by_prediction(predictions):
    assert confusion(predictions).tolist() == [[2, 0], [1, 1]]


def test_entropy_is_in_bits_and_groups_go_from_clear_to_mixed(predictions):
    assert predictions.target_entropy == pytest.approx([0, 1, 0, 0.7219], abs=1e-4)
    (group,) = errors_by_entropy(predictions)
    assert (group.count, group.y) == (4, pytest.approx(0.1625))
    many = dataclasses.replace(
        predictions,
        true_NK=np.repeat(predictions.true_NK, 10, axis=0),
        js_N=np.repeat(predictions.js_N, 10),
    )
    groups = errors_by_entropy(many)
    assert [group.count for group in groups] == [5] * 8
    assert [group.x for group in groups] == sorted(group.x for group in groups)


def test_faces_are_the_most_extreme_ones_with_both_distributions(predictions):
    best, worst = extreme_faces(predictions)
    assert [face.image_id for face in worst] == ["<b>c", "a"]
    assert [face.image_id for face in best] == ["b", "d"]
    assert worst[0].rows == (("sad", 1.0, 0.4), ("happy", 0.0, 0.6))
