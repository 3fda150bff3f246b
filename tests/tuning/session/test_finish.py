"""A study that finishes the job: confirm, a longer fit, combine, export; here without Ray."""

import contextlib
import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from raytune_emotion.data.prepare import prepare
from raytune_emotion.errors import Breakdown
from raytune_emotion.learn import export_folder
from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.learn.graphs import Ensemble
from raytune_emotion.learn.run_folder import HISTORY, LAST, read_history
from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.execution import cluster_nodes, worker_group
from raytune_emotion.tuning.execution.cluster_nodes import ClusterNode, fit_to_cluster
from raytune_emotion.tuning.execution.job import DiskFull, Job, TrialFailed, train_here
from raytune_emotion.tuning.execution.placement import Demand, Placement
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.session import finish, single_run
from raytune_emotion.tuning.session.finish import FINAL, FINISHED, STEPS, Step, finish_study
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
    open_confirmation,
    plan_confirmation,
)
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.remote_copy import DRIVER
from tests.support.cluster import DyingWorkers, joined_session
from tests.support.reports import without_clocks
from tests.support.studies import forget_last_ending, run_here, write_study

CPU = torch.device("cpu")


def confirm_here(request, **_):
    """Do what confirm does, without Ray: run what is left of a confirmation."""
    plan = plan_confirmation(request)
    with open_confirmation(request.study / CONFIRMED, plan.spec) as confirmation:
        run_here(enqueue_runs(confirmation, plan, request.seeds))


@pytest.fixture(autouse=True)
def confirmed_here(monkeypatch):
    monkeypatch.setattr(finish, "run_confirmation", confirm_here)


@pytest.fixture
def study(store, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "TOP", 1)
    monkeypatch.setattr(finish, "SEEDS", 1)
    write_study(tmp_path / "study", store, trials=1, epochs=1)
    return tmp_path / "study"


@pytest.fixture
def formats(monkeypatch):
    """Let an ensemble be exported without its graph, which `test_combination.py` has; note the formats asked for."""
    asked, write_ensemble = [], combined_export.write_ensemble_package

    def write_weights(*args, formats, **more):
        asked.append(formats)
        write_ensemble(*args, formats=[], **more)

    monkeypatch.setattr(combined_export, "write_ensemble_package", write_weights)
    monkeypatch.setattr(export_folder, "images_per_second", lambda *_: 1.0)
    return asked


def compared_models(monkeypatch):
    """Note the names of the models that a finish compares."""
    compared = []

    def read_all(trials, *found):
        compared.extend(name for name, _ in trials)
        return read_groups(trials, *found)

    monkeypatch.setattr(finish, "read_groups", read_all)
    return compared


def test_every_step_is_taken_once_and_stands_in_the_card(study, capsys):
    finish_study(Folder(study), None)
    assert [report["epoch"] for report in read_history(study / FINAL / "0000")] == [1, 2]
    metrics = json.loads((study / FINISHED / "metrics.json").read_text())
    assert 0 < metrics["val_js"] < 1
    card = (study / FINISHED / "README.md").read_text()
    for step in ("best trial of the search: 0.", "best of it and 1 confirmed run: 0.", "the final fit of trial 0000"):
        assert step in card
    for step in ("the soup of ", "the ensemble of "):
        assert step in card
    measured = "was made on one half of the validation set and measured on the other, both ways round. The trials, "
    measured += "their epochs and the confirmed winner were selected on the whole set."
    assert measured in card
    out = capsys.readouterr().out
    assert measured in out.replace("\n", " ")
    assert "gain, bits" in out
    *_, model, js, exported = out.splitlines()
    assert re.fullmatch(r"model       .*\bThis is .+ of the study study\.", model)
    assert model.removeprefix("model       ").split("This is ")[0] in card
    whole = f"{metrics['val_js']:.4f} bits on the whole validation set; the table has values of its halves"
    assert (js, exported) == (f"JS          {whole}", f"exported    {study / FINISHED}")
    steps = metrics[STEPS]
    assert len(steps) == 5
    assert [step["failure"] for step in steps] == [""] * 5
    assert steps[0]["gain"] is None
    for step, before in zip(steps[1:], (steps[0], steps[1], steps[2], steps[2]), strict=True):
        assert step["gain"] == before["js"] - step["js"]
        assert f"{step['step']}: {step['js']:.4f} (gain {step['gain']:.4f})" in card
    assert len(load(study / CONFIRMED).records()) == 1

    # The same again trains nothing anew.
    before = {file: file.read_bytes() for file in study.rglob("history.jsonl")}
    finish_study(Folder(study), None)
    assert {file: file.read_bytes() for file in study.rglob("history.jsonl")} == before


@pytest.mark.usefixtures("formats")
@pytest.mark.long
def test_a_study_at_a_uri_is_finished_as_one_in_a_folder_also_on_another_machine(study, tmp_path, monkeypatch, capsys):
    shutil.copytree(study, tmp_path / "place" / "study", ignore=shutil.ignore_patterns(LOCK))
    finish_study(Folder(study), None)
    place = Remote((tmp_path / "place" / "study").as_uri())

    def interrupted(job):
        yield next(train_here(job))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(single_run, "train_here", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish_study(place, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with (place / FINISHED).write("model.pt2") as file:
        file.write_text("of another combination, which was the best before")
    capsys.readouterr()
    finish_study(place, None)
    assert capsys.readouterr().out.endswith(f"exported    {place / FINISHED}\n")

    models = {FINAL, CONFIRMED, FINISHED}
    here, there = ({name for name in its.find("*") if name.split("/")[0] in models} for its in (Folder(study), place))
    events = {name for name in here | there if ".tfevents." in name}
    marks = {f"{runs}/{name}" for runs in (f"{FINAL}/0000", CONFIRMED) for name in (LOCK, DRIVER)}
    marks |= {name for name in there if name.startswith(f"{CONFIRMED}/journal/")}
    assert here - events - marks == there - events - marks
    for name in (f"{CONFIRMED}/trials/0000", f"{FINAL}/0000"):
        with (place / name).copy_here(HISTORY, LAST) as copy:
            assert without_clocks(read_history(copy)) == without_clocks(read_history(study / name))
            trained, expected = load_file(copy / LAST), load_file(study / name / LAST)
        assert trained.keys() == expected.keys()
        assert all(torch.equal(trained[key], expected[key]) for key in expected)
    expected, found = (json.loads(its.read(f"{FINISHED}/metrics.json")) for its in (Folder(study), place))
    assert found[STEPS] == expected[STEPS]


@pytest.mark.usefixtures("formats")
def test_a_study_that_went_on_and_has_another_winner_is_finished_again(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish, "TOP", 2)
    monkeypatch.setattr(finish, "SEEDS", 1)
    study = tmp_path / "study"
    write_study(study, store, trials=2, epochs=1)
    finish_study(Folder(study), None)
    (before,) = (study / FINAL).iterdir()
    rank = finish.rank_confirmed
    monkeypatch.setattr(finish, "rank_confirmed", lambda *args: rank(*args)[::-1])
    capsys.readouterr()
    compared = compared_models(monkeypatch)
    finish_study(Folder(study), None)
    (other,) = {*(study / FINAL).iterdir()} - {before}
    assert f"the final fit of trial {other.name}" in " ".join(capsys.readouterr().out.split())
    assert len(read_history(other)) == 2
    assert {f"{FINAL}/{before.name}", f"{FINAL}/{other.name}"} < {*compared}


@pytest.mark.usefixtures("formats")
def test_a_study_whose_data_have_moved_is_finished_with_them_where_they_are_now(study):
    finish_study(Folder(study), None)
    metrics = (study / FINISHED / "metrics.json").read_text()
    told = [*study.rglob("data.txt")]  # where they were when the run was trained
    assert len(told) == 3, "a trial of the search, a confirmed run and the final fit"
    for file in told:
        file.write_text("/gone\n")
    finish_study(Folder(study), None)
    assert (study / FINISHED / "metrics.json").read_text() == metrics


def test_models_of_all_image_sizes_are_compared(study, store, faces):
    larger = prepare(faces, image_size=48)
    settings = {"data.image_size": 48, "model.backbone": "test_resnet", "train.epochs": 1}
    run = study / "larger"
    list(train_here(Job("larger", str(run), str(larger.path), settings, Resources(1, 1, 0))))
    trials = [*list_kept(study, load(study).records()), ("larger", run)]
    groups = read_groups(trials, {its.fingerprint: its for its in (store, larger)}.get, CPU)
    assert sorted(group.store.image_size for group in groups) == [32, 48]
    best = groups[0].bests[0].report["val_js"]
    assert groups[1].bests[0].report["val_js"] >= best
    other = groups[1].trial_ids[0]
    assert finish._unseen_js(groups, {other}) == pytest.approx(groups[1].bests[0].report["val_js"], abs=0.02)


@pytest.mark.usefixtures("formats")
def test_a_trial_that_was_left_before_its_end_counts(study):
    """As by a time budget: the record then says that it runs."""
    forget_last_ending(study)
    assert [record.status for record in load(study).records()] == ["running"]
    finish_study(Folder(study), None)
    assert "best trial of the search: 0." in (study / FINISHED / "README.md").read_text()


def node(cpus, gpus, *, draining=False):
    return ClusterNode("node", {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}, draining)


@pytest.mark.parametrize(
    ("nodes", "grows", "share", "of_trial", "expected"),
    [
        ([node(8, 2)], False, None, 1, Workers(2, None, "auto")),
        ([node(8, 2)], False, 0.25, 1, Workers(2, 1.0, "auto")),
        # Of a batch of 32 rows, 16 each.
        ([node(64, 64)], False, 1.0, 1, Workers(2, 1.0, "auto")),
        # As many as a trial has had may have fewer rows.
        ([node(64, 64)], False, 1.0, 4, Workers(4, 1.0, "auto")),
        # A GPU counts if a worker fits there.
        ([node(8, 1), node(0, 1)], False, None, 1, Workers(1, None, "auto")),
        ([node(8, 1), node(8, 1, draining=True)], False, None, 1, Workers(1, None, "auto")),
        # The nodes with GPUs are still to come.
        ([node(2, 0)], True, 1.0, 1, Workers(1, 1.0, "auto")),
        ([node(2, 0)], True, 1.0, 2, Workers(2, 1.0, "auto")),
        ([], True, 1.0, 2, Workers(2, 1.0, "auto")),
        # On cores, as many as a trial has.
        ([node(8, 2), node(4, 0)], False, 0.0, 1, Workers(1, 0.0, "auto")),
        ([node(8, 0), node(8, 0)], False, None, 4, Workers(4, None, "auto")),
        ([node(8, 2)], False, 0.0, 4, Workers(4, 0.0, "auto")),
    ],
)
def test_final_fit_has_workers_as_the_cluster_and_the_trials_suggest(
    study, monkeypatch, nodes, grows, share, of_trial, expected
):
    asked = []
    monkeypatch.setattr(finish, "_LEAST_ROWS", 16)
    monkeypatch.setattr(finish, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(cluster_nodes, "list_nodes", lambda: dict(enumerate(nodes)))
    monkeypatch.setattr(cluster_nodes, "has_autoscaler", lambda: grows)
    monkeypatch.setattr(finish, "train_single", lambda *args, **_: asked.append(args[3]))
    opened = load(study)
    spec = dataclasses.replace(opened.spec, gpus_per_worker=share, workers_per_trial=of_trial)
    assert finish._fit_longer(dataclasses.replace(opened, spec=spec), "0000", 2, "auto") == ""
    assert asked == [expected]
    # The final fit itself accepts what was counted.
    fit_to_cluster(Demand(expected.count, expected.gpus_per_worker, concurrency=1))


def test_final_fit_with_a_small_batch_has_one_gpu(study, monkeypatch):
    """Each of two GPUs launches as many kernels as one, which need not launch them one by one."""
    asked = []
    monkeypatch.setattr(finish, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(cluster_nodes, "list_nodes", lambda: {0: node(8, 2)})
    monkeypatch.setattr(cluster_nodes, "has_autoscaler", lambda: False)
    monkeypatch.setattr(finish, "train_single", lambda *args, **_: asked.append(args[3]))
    assert finish._fit_longer(load(study), "0000", 2, "auto") == ""
    assert asked == [Workers(1, None, "auto")]


def test_final_fit_on_the_cores_of_this_machine_is_one_process(study, monkeypatch):
    asked = []
    monkeypatch.setattr(finish, "train_single", lambda *args, **_: asked.append(args[3]))
    opened = load(study)
    spec = dataclasses.replace(opened.spec, gpus_per_worker=0.0, workers_per_trial=2)
    assert finish._fit_longer(dataclasses.replace(opened, spec=spec), "0000", 2, None) == ""
    assert asked == [Workers(1, 0.0, None)]


@pytest.mark.parametrize("step", [1, 2])
def test_a_finish_exports_nothing_of_a_study_that_another_process_has_taken_over(study, monkeypatch, step):
    checked = []

    def check():
        checked.append(True)
        if len(checked) == step:
            raise Breakdown("another process has taken over")

    fitted = []
    monkeypatch.setattr(finish, "train_single", lambda *_, **__: fitted.append(True))
    with pytest.raises(Breakdown, match="taken over"):
        finish_study(Folder(study), None, check=check)
    assert len(fitted) == step - 1
    assert not (study / FINISHED).exists()


@pytest.mark.usefixtures("formats")
def test_an_interrupted_final_fit_goes_on(study, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finish, "train_single", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish_study(Folder(study), None)
    assert not (study / FINISHED).exists()
    finish_study(Folder(study), None)
    assert (study / FINISHED / "config.json").is_file()


@pytest.mark.usefixtures("formats")
def test_a_final_fit_that_fails_is_noted_and_the_finish_goes_on(study, monkeypatch, capsys):
    def diverge(job):
        raise TrialFailed("diverged before report 1")

    monkeypatch.setattr(single_run, "train_here", diverge)
    finish_study(Folder(study), None)
    assert not (study / FINAL / "0000").exists()
    metrics = json.loads((study / FINISHED / "metrics.json").read_text())
    _, confirmed, fit, *_ = metrics[STEPS]
    assert (fit["failure"], fit["js"], fit["gain"]) == ("diverged before report 1", confirmed["js"], 0.0)
    said = "the final fit of trial 0000 (2 epochs): failed (diverged before report 1)"
    assert said in (study / FINISHED / "README.md").read_text()
    assert "failed (diverged before report 1)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("formats")
def test_a_final_fit_whose_workers_die_again_and_again_is_noted_and_the_finish_goes_on(study, monkeypatch):
    place = Placement(Resources(2, 1.0, 0.0), 2)
    monkeypatch.setattr(worker_group, "Workers", DyingWorkers)
    for module in (finish, single_run):
        monkeypatch.setattr(module, "ray_session", joined_session)
        monkeypatch.setattr(module, "fit_to_cluster", lambda demand: place)
    finish_study(Folder(study), "auto")
    metrics = json.loads((study / FINISHED / "metrics.json").read_text())
    failure = metrics[STEPS][2]["failure"]
    assert failure == "its workers died 4 times without a new report (OSError: the actor died)"


@pytest.mark.usefixtures("formats")
def test_a_final_fit_that_fails_after_a_report_counts_until_then(study, monkeypatch):
    def diverge_later(job):
        reports = train_here(job)
        yield next(reports)
        reports.close()
        raise TrialFailed("diverged before report 2")

    monkeypatch.setattr(single_run, "train_here", diverge_later)
    compared = []
    monkeypatch.setattr(
        finish, "read_groups", lambda trials, *found: compared.extend(trials) or read_groups(trials, *found)
    )
    finish_study(Folder(study), None)
    assert (f"{FINAL}/0000", study / FINAL / "0000") in compared


@pytest.mark.usefixtures("formats")
def test_a_final_fit_that_broke_off_goes_on_when_it_is_called_again(study, monkeypatch):
    def break_off(job):
        raise DiskFull("no space left on the disk")

    with monkeypatch.context() as patched:
        patched.setattr(single_run, "train_here", break_off)
        with pytest.raises(Breakdown, match="no space left"):
            finish_study(Folder(study), None)
    finish_study(Folder(study), None)
    assert [report["epoch"] for report in read_history(study / FINAL / "0000")] == [1, 2]


@pytest.fixture
def candidates(study, store):
    return read_candidates(list_kept(study, load(study).records()), {store.fingerprint: store}.get, CPU)


@pytest.fixture
def choose(candidates, monkeypatch):
    """Let the choices be these members of the one trial, whose JS alone is 0.30, with these JS."""

    def choose(ensemble, soup):
        (members, js), (mixed_members, mixed_js) = ensemble, soup
        chosen = dataclasses.replace(combine_ensemble(candidates, 2), members=members, single=0.30, combined=js)
        mixed, best = combine_soup(candidates, CPU)
        mixed = dataclasses.replace(mixed, members=mixed_members, single=0.30, combined=mixed_js)
        monkeypatch.setattr(finish, "combine_ensemble", lambda candidates, most: chosen)
        monkeypatch.setattr(finish, "combine_soup", lambda candidates, device: (mixed, best))
        monkeypatch.setattr(export_folder, "images_per_second", lambda *_: 1.0)

    return choose


BEFORE = Step("best single model", 0.30)
#: Twice the same trial: one alone is no combination.
TWO, ONE = (0, 0), (0,)


@pytest.mark.parametrize(
    ("ensemble", "soup", "said"),
    [
        ((TWO, 0.20), (TWO, 0.25), "an ensemble of"),
        ((TWO, 0.25), (TWO, 0.20), "The mean of the weights of the trials"),
        ((TWO, 0.35), (TWO, 0.31), "Neither soup nor ensemble helps"),
        ((TWO, 0.30), (TWO, 0.30), "Neither soup nor ensemble helps"),
        # The halves have chosen combinations, and the whole set one member: that is a single model.
        ((TWO, 0.29), (ONE, 0.20), "an ensemble of"),
        ((ONE, 0.20), (TWO, 0.29), "The mean of the weights of the trials"),
        ((TWO, 0.35), (ONE, 0.20), "Neither soup nor ensemble helps"),
        ((ONE, 0.20), (ONE, 0.20), "Neither soup nor ensemble helps"),
    ],
)
def test_what_is_exported_is_the_best_of_what_can_be(tmp_path, candidates, choose, formats, ensemble, soup, said):
    choose(ensemble, soup)
    finished = finish._export(tmp_path / "dest", candidates, "study", [BEFORE], CPU)
    assert [step.js for step in finished.steps] == [
        0.30,
        *(js if members == TWO else 0.30 for members, js in (soup, ensemble)),
    ]
    assert said in (tmp_path / "dest" / "README.md").read_text()
    model = {
        "an ensemble of": "This is the ensemble of ",
        "The mean of the weights of the trials": "This is the soup of ",
    }
    assert finished.model.startswith(model.get(said, said))
    assert finished.js == pytest.approx(json.loads((tmp_path / "dest" / "metrics.json").read_text())["val_js"])
    assert formats == ([["pt2"]] if said == "an ensemble of" else [])


@pytest.mark.usefixtures("formats")
def test_card_says_how_the_export_was_chosen_also_if_an_earlier_step_has_a_lower_js(tmp_path, candidates, choose):
    """The final fit may be chosen by one half, and be worse on the other."""
    choose((TWO, 0.35), (TWO, 0.31))
    single = Step("best of these and the final fit of trial 0000 (2 epochs)", 0.30, 0.28)
    finish._export(tmp_path / "dest", candidates, "study", [Step("best trial of the search", 0.28), single], CPU)
    card = " ".join((tmp_path / "dest" / "README.md").read_text().split())
    assert f"Neither soup nor ensemble helps. This is {candidates.trial_ids[0]} of the study study." in card
    assert (
        "The better one of soup and ensemble is exported if its JS is lower than that of the best single model after "
        "the final fit; otherwise the single model that is best on the whole validation set." in card
    )
    assert "lowest of these" not in card


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (None, "there are too few validation images"),
        (0.30, "the image sizes have different validation images"),
    ],
)
@pytest.mark.usefixtures("formats")
def test_nothing_is_said_to_help_or_not_that_was_not_measured(tmp_path, candidates, choose, monkeypatch, measured, why):
    choose((TWO, measured), (TWO, measured))
    chosen = finish.combine_ensemble(candidates, 2)
    monkeypatch.setattr(finish, "combine_ensemble", lambda *_: dataclasses.replace(chosen, single=measured))
    finish._export(tmp_path / "dest", candidates, "study", [Step("best single model", None)], CPU)
    card = " ".join((tmp_path / "dest" / "README.md").read_text().split())
    assert f"Whether a soup or an ensemble helps was not measured: {why}. This is {candidates.trial_ids[0]} of" in card
    assert "Neither soup nor ensemble" not in card


def test_an_ensemble_that_cannot_be_traced_is_exported_as_weights(tmp_path, candidates, choose, monkeypatch):
    def fail(*args):
        raise RuntimeError("a loop that depends on data\nand a page of code")

    choose((TWO, 0.20), (ONE, 0.30))
    monkeypatch.setattr(export_folder, "write_graph", fail)
    *_, pt2 = finish._export(tmp_path / "dest", candidates, "study", [BEFORE], CPU).steps
    backbone = candidates.bests[0].settings["model.backbone"]
    reason = f"an ensemble of {backbone} cannot be exported as pt2 (RuntimeError: a loop that depends on data)"
    assert (pt2.name, pt2.failure) == ("the ensemble as pt2", reason)
    assert isinstance(load_package(tmp_path / "dest").model, Ensemble)
    assert not (tmp_path / "dest" / "model.pt2").exists()
    metrics = json.loads((tmp_path / "dest" / "metrics.json").read_text())
    assert metrics[STEPS][-1] == {"step": pt2.name, "js": None, "gain": None, "failure": reason}
    card = (tmp_path / "dest" / "README.md").read_text()
    assert f"the ensemble as pt2: failed ({reason})" in card
    assert "```python" not in card, "there is no format to show the use of"


def test_an_interrupted_export_is_no_failed_step(tmp_path, candidates, choose, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    choose((TWO, 0.20), (ONE, 0.30))
    monkeypatch.setattr(export_folder, "write_graph", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finish._export(tmp_path / "dest", candidates, "study", [BEFORE], CPU)
    assert not (tmp_path / "dest").exists()
