"""A study that finishes the job: confirm, a longer fit, combine, export; here without Ray."""

import dataclasses
import json

import pytest

from raytune_emotion.data.prepare import prepare
from raytune_emotion.learn.combine import Gain
from raytune_emotion.learn.run_folder import read_history
from raytune_emotion.tuning.execution.job import Job, job_of, train_here
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.session import finish
from raytune_emotion.tuning.session.finish import FINAL, FINISHED, finish_study
from raytune_emotion.tuning.session.single_run import Workers
from raytune_emotion.tuning.study import combined_export
from raytune_emotion.tuning.study.combination import (
    combine_ensemble,
    combine_soup,
    list_kept,
    read_candidates,
    read_groups,
)
from raytune_emotion.tuning.study.confirmation import (
    CONFIRMED,
    enqueue_runs,
    make_confirmation,
    plan_confirmation,
)
from raytune_emotion.tuning.study.open_study import load, open_study
from tests.support.studies import searcher_of, write_study


def confirm_here(request, **_):
    """Do what confirm does, without Ray: run what is left of a confirmation."""
    study = request.study.path
    plan = plan_confirmation(request, study)
    make_confirmation(study / CONFIRMED, plan.spec)
    with open_study(study / CONFIRMED) as confirmation:
        confirmation = enqueue_runs(confirmation, plan, request.seeds)
        searcher = searcher_of(confirmation.optuna, confirmation.space, seed=plan.spec.seed)
        while sum(record.ended for record in confirmation.records()) < confirmation.spec.trials:
            proposal = searcher.ask()
            for report in train_here(job_of(confirmation, Resources(1, 1, 0), proposal)):
                searcher.observe(proposal.trial_id, report)
            searcher.tell(proposal.trial_id, "complete")


@pytest.fixture(autouse=True)
def confirmed_here(monkeypatch):
    monkeypatch.setattr(finish, "run_confirmation", confirm_here)


@pytest.fixture
def study(store, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "TOP", 1)
    monkeypatch.setattr(finish, "SEEDS", 1)
    write_study(tmp_path / "study", store, trials=1, epochs=1)
    return tmp_path / "study"


def test_every_step_is_taken_once_and_stands_in_the_card(study, capsys):
    finish_study(study, None)
    assert [report["epoch"] for report in read_history(study / FINAL / "0000")] == [1, 2]
    metrics = json.loads((study / FINISHED / "metrics.json").read_text())
    assert 0 < metrics["val_js"] < 1
    card = (study / FINISHED / "README.md").read_text()
    for step in ("best trial of the search: 0.", "best of it and 1 confirmed run: 0.", "the final fit of trial 0000"):
        assert step in card
    for step in ("the soup of ", "the ensemble of "):
        assert step in card
    assert "exported" in capsys.readouterr().out
    assert len(load(study / CONFIRMED).records()) == 1

    # The same again trains nothing anew.
    before = {file: file.read_bytes() for file in study.rglob("history.jsonl")}
    finish_study(study, None)
    assert {file: file.read_bytes() for file in study.rglob("history.jsonl")} == before


def test_a_study_that_went_on_and_has_another_winner_is_finished_again(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish, "TOP", 2)
    monkeypatch.setattr(finish, "SEEDS", 1)
    study = tmp_path / "study"
    write_study(study, store, trials=2, epochs=1)
    finish_study(study, None)
    (before,) = (study / FINAL).iterdir()
    rank = finish.rank_confirmed
    monkeypatch.setattr(finish, "rank_confirmed", lambda *args: rank(*args)[::-1])
    capsys.readouterr()
    finish_study(study, None)
    (other,) = {*(study / FINAL).iterdir()} - {before}
    assert f"the final fit of trial {other.name}" in capsys.readouterr().out
    assert len(read_history(other)) == 2


def test_a_study_whose_data_have_moved_is_finished_with_them_where_they_are_now(study):
    finish_study(study, None)
    for told in study.rglob("data.txt"):  # where they were when the run was trained
        told.write_text("/gone\n")
    finish_study(study, None)


def test_models_of_all_image_sizes_are_compared(study, store, faces):
    larger = prepare(faces, image_size=48)
    settings = {"data.image_size": 48, "model.backbone": "test_resnet", "train.epochs": 1}
    run = study / "larger"
    list(train_here(Job("larger", str(run), str(larger.path), settings, Resources(1, 1, 0))))
    trials = [*list_kept(study, load(study).records()), ("larger", run)]
    groups = read_groups(trials, [store, larger])
    assert sorted(group.store.image_size for group in groups) == [32, 48]
    best = groups[0].bests[0].report["val_js"]
    assert groups[1].bests[0].report["val_js"] >= best
    other = groups[1].trial_ids[0]
    assert finish._unseen_js(groups, {other}) == pytest.approx(groups[1].bests[0].report["val_js"], abs=0.02)


def test_a_trial_that_was_left_before_its_end_counts(study):
    """As by a time budget: the record then says that it runs."""
    journal = study / "optuna.journal"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    assert [record.status for record in load(study).records()] == ["running"]
    finish_study(study, None)
    assert "best trial of the search: 0." in (study / FINISHED / "README.md").read_text()


@pytest.mark.parametrize(
    ("share", "gpus", "expected"),
    [
        (None, 4, Workers(4, None, "auto")),
        (0.25, 4, Workers(4, 1.0, "auto")),
        (0.0, 4, Workers(1, 0.0, "auto")),
        # The nodes with GPUs are still to come.
        (1.0, 0, Workers(1, 1.0, "auto")),
        # Two of 32 rows each.
        (1.0, 64, Workers(16, 1.0, "auto")),
    ],
)
def test_final_fit_has_gpus_as_the_trials_had(study, monkeypatch, share, gpus, expected):
    asked = []
    monkeypatch.setattr(finish, "_count_gpus", lambda address: gpus)
    monkeypatch.setattr(finish, "train_single", lambda *args, **_: asked.append(args[3]))
    opened = load(study)
    spec = dataclasses.replace(opened.spec, gpus_per_worker=share)
    finish._fit_longer(dataclasses.replace(opened, spec=spec), "0000", "auto")
    assert asked == [expected]


def test_an_interrupted_final_fit_goes_on(study, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finish, "train_single", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish_study(study, None)
    assert not (study / FINISHED).exists()
    finish_study(study, None)
    assert (study / FINISHED / "config.json").is_file()


@pytest.mark.parametrize(
    ("ensemble", "soup", "of_soup", "said"),
    [
        (0.20, 0.25, 0.30, "an ensemble of"),
        (0.25, 0.20, 0.30, "The mean of the weights of the trials"),
        (0.35, 0.31, 0.30, "Neither soup nor ensemble helps"),
        (0.30, 0.30, 0.30, "Neither soup nor ensemble helps"),
        # The soup is of a worse backbone: it gains more, and is worse.
        (0.29, 0.35, 0.40, "an ensemble of"),
        (0.35, 0.35, 0.40, "Neither soup nor ensemble helps"),
    ],
)
def test_what_is_exported_is_what_helps_on_unseen_images(
    study, store, tmp_path, monkeypatch, ensemble, soup, of_soup, said
):
    candidates = read_candidates(list_kept(study, load(study).records()), [store])
    # Twice the same trial: one alone is no combination.
    chosen = dataclasses.replace(combine_ensemble(candidates, 2), members=(0, 0), gain=Gain(0.30, ensemble))
    mixed, best = combine_soup(candidates)
    mixed = dataclasses.replace(mixed, members=(0, 0), gain=Gain(of_soup, soup))
    monkeypatch.setattr(finish, "combine_ensemble", lambda candidates, most: chosen)
    monkeypatch.setattr(finish, "combine_soup", lambda candidates: (mixed, best))
    asked, write_model = [], combined_export.write_model

    def write_weights(*args, formats, **more):
        """Leave out the graph, which `test_combination.py` has."""
        asked.append(formats)
        write_model(*args, formats=["timm"], **more)

    monkeypatch.setattr(combined_export, "write_model", write_weights)
    monkeypatch.setattr(combined_export, "images_per_second", lambda *_: 1.0)
    steps = finish._export(tmp_path / "dest", candidates, load(study), [])
    assert [step.js for step in steps] == [soup, ensemble]
    assert said in (tmp_path / "dest" / "README.md").read_text()
    assert asked == ([["timm", "pt2"]] if said.startswith("an ensemble") else [])
