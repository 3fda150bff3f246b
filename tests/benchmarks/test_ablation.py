"""The sums of the ablation, without its runs."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation
from benchmarks.ablation import BASE, CHANGES, UNCHANGED, Plan, mean_of, study
from benchmarks.finishing import Faces
from raytune_emotion.config import RunConfig


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_a_configuration(name):
    settings = {**BASE, **CHANGES[name]}
    config = RunConfig.from_flat(settings)
    assert config.loss.kl == 1
    assert name == UNCHANGED or config != RunConfig.from_flat(BASE)


def test_the_mean_prediction_is_taken_face_by_face():
    first, second = (
        {"a": np.array([1.0, 0.0]), "b": np.array([0.5, 0.5])},
        {"b": np.array([0.1, 0.9]), "a": np.zeros(2)},
    )
    mean = mean_of([first, second])
    assert mean["a"] == pytest.approx([0.5, 0.0])
    assert mean["b"] == pytest.approx([0.3, 0.7])


def test_differences_are_taken_within_a_seed(tmp_path, monkeypatch):
    """The JS of a run is its seed, plus a half if anything is changed, and a quarter of its number on top."""

    def train(plan, data, work, name, seed):
        return Path(name, str(seed))

    def predict(export, test, *options):
        changed = 0.5 if export.parts[0] != "unchanged" else 0.25 if options else 0.0
        seed = int(export.name)
        return {"face": np.array([seed + changed * (1 + seed)])}

    monkeypatch.setattr(ablation, "split_validation", lambda data, work: Faces(data, {}, tmp_path, {"face": 1}))
    monkeypatch.setattr(ablation, "_train", train)
    monkeypatch.setattr(ablation, "predict", predict)
    monkeypatch.setattr(ablation, "score", lambda predicted, targets: float(predicted["face"][0]))
    (table,) = study(Plan(tmp_path, None, 1, 32, [0, 1], [UNCHANGED, "drop path 0.1"], 2), tmp_path)
    assert table.notes == ["JS in bits on 1 faces of the test; 2 seeds."]
    rows = {name: rest for name, *rest in table.rows}
    assert rows["unchanged"] == [0.5, None, None]
    assert rows["drop path 0.1"] == [1.25, 0.75, pytest.approx(0.25)]
    assert rows["predicted with the mirror image"] == [0.875, 0.375, pytest.approx(0.125)]
    assert rows["mean prediction of the 2 seeds"] == [0.5, None, None]
