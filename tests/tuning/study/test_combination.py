"""Ensembles and soups of a study's trials, as exports."""

import json

import numpy as np
import pytest
import torch

from raytune_emotion.cli import command_main
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST, PREDICTIONS, read_best
from raytune_emotion.learn.combine import mean_weights, predict_whole
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.learn.graphs import predict_graph
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.study.combination import export_ensemble, export_soup, list_kept, read_candidates
from raytune_emotion.tuning.study.open_study import load
from tests.support.studies import write_study


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    """A study of three trials, all with their weights."""
    folder = tmp_path_factory.mktemp("results") / "three"
    write_study(folder, store, trials=3, epochs=1)
    return folder


def test_predictions_are_those_of_the_weights_whether_they_are_kept_or_not(study, store):
    records = load(study).records()
    kept = read_candidates(list_kept(study, records))
    assert len(kept.trial_ids) == 3
    file = study / "trials" / kept.trial_ids[1] / PREDICTIONS
    content = file.read_bytes()
    file.unlink()
    try:
        again = read_candidates(list_kept(study, records))
    finally:
        file.write_bytes(content)
    for first, second in zip(kept.predictions, again.predictions, strict=True):
        assert torch.allclose(first, second, atol=1e-3)


def test_an_ensemble_is_one_model_that_predicts_the_mean_of_its_members(study, store, tmp_path):
    chosen = export_ensemble(Folder(study), Folder(tmp_path / "best"), 3, ["pt2"])
    assert chosen.trial_ids
    images_NHWC = store.val.gather(np.arange(5))
    bests = [read_best(study / "trials" / trial_id / BEST) for trial_id in chosen.trial_ids]
    expected_NK = torch.stack([predict_whole(best, store.val)[:5] for best in bests]).mean(0)
    found_NK = predict_graph("pt2", tmp_path / "best" / "model.pt2", images_NHWC)
    assert np.allclose(found_NK, expected_NK, atol=1e-4)
    config, metrics = (json.loads((tmp_path / "best" / name).read_text()) for name in ("config.json", "metrics.json"))
    assert [member["trial"] for member in config["members"]] == chosen.trial_ids
    assert config["label_names"] == list(store.classes)
    assert metrics["unseen_js"] == chosen.gain.combined
    assert metrics["images_per_second_cpu"] > 0
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"JS {chosen.gain.combined:.4f} bits; the best single model {chosen.gain.single:.4f}" in card


def test_a_soup_is_a_model_of_timm_with_the_mean_weights(study, tmp_path):
    chosen = export_soup(Folder(study), Folder(tmp_path / "best"), ["timm"])
    backbones = {best.settings["model.backbone"] for best in chosen.candidates.bests}
    assert len(backbones) == 1
    weights = [read_best(study / "trials" / trial_id / BEST).weights for trial_id in chosen.trial_ids]
    package = load_package(tmp_path / "best")
    expected, found = mean_weights(weights), package.model.state_dict()
    # The temperature of an export is part of the last layer.
    body = [name for name in expected if not name.startswith(("fc.", "head."))]
    assert len(body) > 10
    assert all(torch.equal(found[name], expected[name]) for name in body)
    assert "The mean of the weights of the trials" in (tmp_path / "best" / "README.md").read_text()


def test_where_the_data_are_gone_nothing_can_be_chosen(study, monkeypatch):
    monkeypatch.setattr("raytune_emotion.tuning.study.combination.store_of", lambda trial: None)
    with pytest.raises(UserError, match="packed data of the run are not on this machine"):
        read_candidates(list_kept(study, load(study).records()))


def test_where_no_trial_has_weights_it_is_said(study):
    with pytest.raises(UserError, match="no ended trial has weights"):
        read_candidates([])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ensemble", "3", "--soup"], "--ensemble: stands beside --soup; name one of them"),
        (["--trial", "1", "--soup"], "--trial: stands beside --soup"),
        (["--ensemble", "2", "--format", "timm"], "--format timm: holds one network, and an ensemble is several"),
    ],
)
def test_options_that_do_not_go_together_are_refused(study, tmp_path, capsys, options, said):
    assert command_main("export", [str(study), str(tmp_path / "best"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "best").exists()


def test_the_command_exports_an_ensemble(study, tmp_path, capsys):
    assert command_main("export", [str(study), str(tmp_path / "best"), "--ensemble", "2"]) == 0
    assert (tmp_path / "best" / "model.pt2").is_file()
    assert "the ensemble of the trials 0" in capsys.readouterr().out
