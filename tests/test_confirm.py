"""The command confirm: what it refuses, and a confirmation that is interrupted, gone on with and extended."""

import contextlib
import dataclasses
import json
import re
import shutil
import statistics

import pandas as pd
import pytest

from raytune_emotion.learn.export_folder import load_package
from raytune_emotion.storage.atomic import LOCK
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution import placement
from raytune_emotion.tuning.execution.job import job_of, train_here
from raytune_emotion.tuning.execution.recorder import Recorder
from raytune_emotion.tuning.session import console_run
from raytune_emotion.tuning.session.run_confirmation import run_confirmation
from raytune_emotion.tuning.study import confirmation
from raytune_emotion.tuning.study.confirmation import (
    best_configurations,
    enqueue,
    open_confirmation,
    plan_confirmation,
    rank_confirmed,
)
from raytune_emotion.tuning.study.open_study import make_study
from raytune_emotion.tuning.study.optuna_study import load_study, study_lock
from raytune_emotion.tuning.study.records import TrialRecord, read_records
from raytune_emotion.tuning.study.request import ConfirmRequest
from raytune_emotion.tuning.study.spec import read_spec, write_spec
from tests.support.cluster import joined_session
from tests.support.commands import exit_code, refusal
from tests.support.reports import make_report
from tests.support.studies import searcher_of, spec_of, write_study


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "study"
    write_study(folder, store, trials=3, epochs=2)
    return folder


@pytest.fixture
def refused(study, tmp_path, capsys, monkeypatch):
    """Runs a confirmation that must be refused before Ray is started, of a copy of the study."""
    monkeypatch.setattr(cluster_module, "ray_session", lambda *_, **__: pytest.fail("nothing is refused"))
    shutil.copytree(study, tmp_path / "study")
    return lambda *argv, of="study": refusal(capsys, [tmp_path], "confirm", tmp_path / of, *argv)


def a_run(trial_id, confirms, js, status="complete"):
    return TrialRecord(trial_id, status, {}, "", (make_report(1, js),), confirms=confirms)


def test_configurations_stand_by_their_means_and_those_that_fail_come_later(store):
    spec = spec_of(store, confirms={"0003": 0.20, "0001": 0.21, "0007": 0.22, "0009": 0.23})
    records = [
        *(a_run(f"000{i}", "0003", js) for i, js in enumerate((0.30, 0.26, 0.34))),
        *(a_run(f"001{i}", "0001", js) for i, js in enumerate((0.27, 0.31, 0.28, 0.30))),
        a_run("0020", "0007", 0.1),
        a_run("0021", "0007", 0.1, "failed"),
        a_run("0030", "0009", 0.1, "running"),
    ]
    first, second, third, fourth = rank_confirmed(spec, records)
    assert [s.trial_id for s in (first, second, third, fourth)] == ["0001", "0003", "0007", "0009"]
    assert first.mean == pytest.approx(0.29)
    assert first.standard_error == pytest.approx(statistics.stdev((0.27, 0.31, 0.28, 0.30)) / 2)
    assert first.median.trial_id == "0013"  # of an even number, the worse in the middle
    assert second.median.trial_id == "0000"
    assert first.summary == "0.2900 ± 0.0091 bits (mean and standard error over 4 seeds)"
    assert (third.cells, third.summary) == (["0007", "0.1000", "", "1", "1", "0.2200"], "0.1000 bits (one seed)")
    assert fourth.cells == ["0009", "", "", "0", "0", "0.2300"]


def test_a_run_whose_history_was_lost_does_not_count(store):
    spec = spec_of(store, confirms={"0001": 0.20, "0002": 0.21})
    kept = [a_run(f"000{i}", "0001", js) for i, js in enumerate((0.28, 0.30))]
    lost = [
        dataclasses.replace(a_run(f"001{i}", trial_id, 0.1), reports=()) for i, trial_id in enumerate(spec.confirms)
    ]
    first, second = rank_confirmed(spec, [*kept, *lost])
    assert first.summary == "0.2900 ± 0.0100 bits (mean and standard error over 2 seeds)"
    assert second.cells == ["0002", "", "", "0", "0", "0.2100"]


def test_a_single_run_of_an_earlier_confirmation_does_not_beat_means_of_several(store):
    spec = spec_of(store, confirms={"0001": 0.20, "0002": 0.21, "0003": 0.22})
    lucky = a_run("0000", "0001", 0.2)
    assert [each.trial_id for each in rank_confirmed(spec, [lucky, a_run("0001", "0002", 0.3)])][:2] == ["0001", "0002"]
    several = [a_run(f"001{i}", "0002", js) for i, js in enumerate((0.28, 0.30))]
    assert [each.trial_id for each in rank_confirmed(spec, [lucky, *several])] == ["0002", "0001", "0003"]


def test_a_configuration_is_confirmed_once():
    def searched(trial_id, lr, js, status="complete"):
        return TrialRecord(trial_id, status, {"optim.lr": lr}, "", (make_report(1, js),))

    records = [
        searched("0000", 1e-3, 0.30), searched("0001", 1e-2, 0.25), searched("0002", 1e-3, 0.20),
        searched("0003", 1e-4, 0.10, "failed"), TrialRecord("0004", "running", {}, "", ()),
        searched("0005", 1e-5, 0.40, "pruned"),
    ]  # fmt: skip
    assert [r.trial_id for r in best_configurations(records, 2)] == ["0002", "0001"]
    assert [r.trial_id for r in best_configurations(records, 9)] == ["0002", "0001", "0005"]


def test_what_cannot_be_confirmed(refused, study, store, tmp_path, no_other_studies):
    assert refused(of="none") == [f"{tmp_path / 'none'}: no such folder; choose one of {tmp_path / 'study'}"]
    assert refused("--top=0")[0].startswith("--top: expected an integer")
    assert refused("--address=nonsense")[0].startswith("--address nonsense: no Ray cluster answers there")
    spec = read_spec(study)
    write_spec(tmp_path / "study", dataclasses.replace(spec, stores={32: "/gone"}))
    (told,) = refused()
    assert told.startswith("/gone: the packed data of the study are missing; name their folder with `python -m raytune")
    write_spec(tmp_path / "study", dataclasses.replace(spec, weights_dir="/gone"))
    (told,) = refused("--top=1")
    what, _, advice = told.partition("; name their folder with `")
    assert re.fullmatch(r"model.weights_dir: no file /gone/test_\w+\.safetensors", what)
    assert advice.startswith("python -m raytune_emotion.search --resume --results ")
    assert advice.endswith(" --name study --time-budget 1s --weights-dir DIR`"), "not: train all that is left"
    write_spec(tmp_path / "study", dataclasses.replace(spec, confirms={"0000": 0.3}))
    assert refused() == [f"{tmp_path / 'study'}: is a confirmation itself; name the study whose folder contains it"]
    write_spec(tmp_path / "study", spec)
    (tmp_path / "study" / "confirmed").mkdir()
    write_spec(tmp_path / "study" / "confirmed", dataclasses.replace(spec, epochs=1, confirms={}))
    (told,) = refused()
    assert "confirmed: its runs have 1 epochs, but trials of the study now have 2; move it away to confirm" in told
    begun = tmp_path / "begun"
    make_study(begun, spec)
    assert refused(of="begun") == [f"{begun}: no trial of this study has reported yet; search longer"]


def test_a_backbone_whose_folder_is_gone_is_not_looked_for_by_an_option(refused, tmp_path, monkeypatch):
    def of_a_folder(records, count):
        (best,) = best_configurations(records, 1)
        return [dataclasses.replace(best, settings={**best.settings, "model.backbone": "local-dir:/gone"})]

    monkeypatch.setattr(confirmation, "best_configurations", of_a_folder)
    write_spec(tmp_path / "study", dataclasses.replace(read_spec(tmp_path / "study"), weights_dir="/elsewhere"))
    assert refused() == [
        "model.backbone: no file /gone/model.safetensors; a backbone consists of it and config.json, as timm saves them"
    ]


def test_more_workers_than_a_batch_has_rows(refused):
    (told,) = refused("--workers-per-trial=33")
    assert told.startswith(
        "train.batch_size: 32 rows are too few for 1 micro-batches (train.accumulate) for each of 33 workers"
    )


def test_one_row_for_each_worker_where_a_model_has_batchnorm(refused):
    """Its runs would fail, and failed ones are not repeated."""
    (told,) = refused("--workers-per-trial=32")
    assert told.startswith(
        "train.batch_size: 32 rows make micro-batches of one row, 1 (train.accumulate) for each of 32 w"
    )
    assert "the BatchNorm layers of test_resnet see no variance" in told


def test_half_precision_where_there_is_no_gpu(refused, monkeypatch):
    def in_fp16(records, count):
        return [
            dataclasses.replace(record, settings={**record.settings, "train.precision": "fp16"})
            for record in best_configurations(records, count)
        ]

    monkeypatch.setattr(confirmation, "best_configurations", in_fp16)
    monkeypatch.setattr(placement, "local_node", lambda: {"CPU": 2.0, "GPU": 0.0})
    (told,) = refused()
    assert told.startswith("train.precision: fp16 needs a GPU, but trials on this machine get none; ")


def test_what_an_earlier_confirmation_has_left_to_run_is_checked_too(refused, tmp_path, monkeypatch):
    """It runs also where fewer configurations are asked for now."""
    study, folder = tmp_path / "study", tmp_path / "study" / "confirmed"
    plan = plan_confirmation(ConfirmRequest(Folder(study)))
    with open_confirmation(Folder(folder), plan.spec):
        pass
    left = {**plan.chosen[-1].settings, "train.precision": "fp16", "train.batch_size": 2}
    enqueue(load_study(folder), [dataclasses.replace(plan.chosen[-1], settings=left)], [7])
    monkeypatch.setattr(placement, "local_node", lambda: {"CPU": 2.0, "GPU": 0.0})
    (told,) = refused("--top=1")
    assert told.startswith("train.precision: fp16 needs a GPU, but trials on this machine get none; ")
    (told,) = refused("--top=1", "--workers-per-trial=3")
    assert told.startswith("train.batch_size: 2 rows are too few for 1 micro-batches (train.accumulate) for each of 3")


def test_an_export_that_could_not_be_written_at_the_end(refused, tmp_path):
    folder = tmp_path / "study" / "confirmed" / "best"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    (told,) = refused()
    assert told.startswith(f"{folder}: holds files that do not belong to an export (thesis.tex)")


def test_one_that_is_at_work(refused, tmp_path):
    folder = tmp_path / "study" / "confirmed"
    folder.mkdir()
    with study_lock(folder):
        assert refused() == [f"{folder}: another process is using it; wait until it ends, or end it"]


@pytest.mark.usefixtures("without_ray", "no_plots")
@pytest.mark.long
def test_one_at_a_uri_is_interrupted_and_gone_on_with_on_another_machine(study, tmp_path, monkeypatch, capsys):
    shutil.copytree(study, tmp_path / "place" / "study", ignore=shutil.ignore_patterns(LOCK, "confirmed"))
    place = Remote((tmp_path / "place" / "study").as_uri())
    command = ["confirm", place, "--top", 1, "--seeds", 1, "--concurrency", 1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one machine"))

    def interrupt(console, run):
        raise KeyboardInterrupt

    def interrupt_after_an_epoch(console, run):
        recorder = Recorder(run.study, run.watch)
        with contextlib.closing(train_here(job_of(run.study, run.placement.resources, recorder.next()))) as reports:
            next(reports)
        recorder.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(console_run, "run_with_progress", interrupt)
        assert exit_code(command) == 130
        assert (place / "confirmed").find("*") == [], "it had not begun there"
        interrupted.setattr(console_run, "run_with_progress", interrupt_after_an_epoch)
        assert exit_code(command) == 130
    said = capsys.readouterr().out
    assert f"the same command continues: python -m raytune_emotion.confirm {place} --top 1 --seeds 1" in said
    before = place.read("confirmed/trials/0000/history.jsonl")
    assert before.count(b"\n") == 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert exit_code(command) == 0
    assert f"exported    {place / 'confirmed' / 'best'}, the median run (0000)" in capsys.readouterr().out
    assert place.read("confirmed/trials/0000/history.jsonl").startswith(before)
    folder = tmp_path / "place" / "study" / "confirmed"
    names = {path.name for path in folder.iterdir() if path.suffix not in (".png", ".csv")}
    written = {"study.yaml", "optuna.journal", "curves.parquet", "report.html", "trials", "best", "driver", "journal"}
    assert names == written
    (row,) = pd.read_csv(folder / "confirmed.csv").itertuples()
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    assert metrics["confirmed_mean_js"] == metrics["val_js"] == pytest.approx(row.mean_js)
    assert load_package(folder / "best").image_size == 32
    card = (folder / "best" / "README.md").read_text()
    assert f"trial {row.trial_id:04d} of the study study, the best of 1 with new seeds" in card
    # The page of the study shows it, too.
    assert exit_code(["report", place]) == 0
    page = (tmp_path / "place" / "study" / "report.html").read_text()
    assert f"<b>{row.mean_js:.4f}</b>JS, bits: mean over 1 seed, trial {row.trial_id:04d} of the search" in page
    (told,) = refusal(capsys, [folder], "search", "--resume", "--results", place, "--name", "confirmed")
    assert told.endswith(f"is a confirmation; continue it with `python -m raytune_emotion.confirm {place}`")


def test_one_that_is_broken_off_within_a_finish_leaves_the_advice_to_it(study, tmp_path, monkeypatch, capsys, no_plots):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr("raytune_emotion.tuning.execution.cluster_nodes.fit_to_cluster", lambda demand: "2 at once")
    monkeypatch.setattr(console_run, "run_with_progress", interrupted)
    shutil.copytree(study, tmp_path / "study")
    with pytest.raises(KeyboardInterrupt):
        run_confirmation(ConfirmRequest(Folder(tmp_path / "study")), advise=False)
    assert (tmp_path / "study" / "confirmed" / "confirmed.csv").exists()
    assert "confirm " not in capsys.readouterr().out


@pytest.mark.usefixtures("without_ray", "no_plots")
def test_a_confirmation_is_interrupted_gone_on_with_and_extended(study, tmp_path, capsys, monkeypatch):
    study = shutil.copytree(study, tmp_path / "study")
    folder = study / "confirmed"

    def run_one_epoch(console, run):
        proposal = searcher_of(run.study.optuna, run.study.space, seed=run.study.spec.seed).ask()
        with contextlib.closing(train_here(job_of(run.study, run.placement.resources, proposal))) as reports:
            next(reports)
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(console_run, "run_with_progress", run_one_epoch)
        assert exit_code(["confirm", study, "--top", 2, "--seeds", 1, "--concurrency", 1]) == 130
    assert "the same command continues" in capsys.readouterr().out
    begun = {file.parent.name: file.read_bytes() for file in folder.glob("trials/*/history.jsonl")}
    assert len(begun) == 1
    assert not (folder / "best").exists()

    assert exit_code(["confirm", study, "--top", 2, "--seeds", 2, "--concurrency", 1]) == 0
    out = capsys.readouterr().out
    searched = {r.trial_id: r for r in read_records(study, load_study(study))}
    records = read_records(folder, load_study(folder))
    assert all((folder / "trials" / id_ / "history.jsonl").read_bytes().startswith(text) for id_, text in begun.items())
    top = sorted(searched.values(), key=lambda r: r.best["val_js"])[:2]
    for record in records:
        assert (record.status, len(record.reports)) == ("complete", 2), "nothing is stopped"
        seed = record.settings["train.seed"]
        assert record.settings == {**searched[record.confirms].settings, "train.seed": seed}
        trained = json.loads((folder / "trials" / record.trial_id / "params.json").read_text())
        assert (trained["train.seed"], trained["train.epochs"]) == (seed, 2)
        assert (folder / "trials" / record.trial_id / "best.safetensors").exists()
    asked = [(r.confirms, r.settings["train.seed"]) for r in records]
    # Seed by seed, none of them the study's own.
    assert asked == [(r.trial_id, seed) for seed in (1, 2) for r in top]
    assert len({r.best["val_js"] for r in records}) == 4

    table = pd.read_csv(folder / "confirmed.csv", dtype={"trial_id": str})
    assert set(table.trial_id) == {r.trial_id for r in top}
    winner = table.iloc[0]
    runs = sorted((r for r in records if r.confirms == winner.trial_id), key=lambda r: r.best["val_js"])
    assert winner.mean_js == pytest.approx(statistics.fmean(r.best["val_js"] for r in runs))
    assert winner.mean_js == table.mean_js.min()
    assert winner.searched_js == searched[winner.trial_id].best["val_js"]
    exported = json.loads((folder / "best" / "metrics.json").read_text())
    assert exported["val_js"] == runs[1].best["val_js"], "the median run"
    assert (exported["confirmed_mean_js"], exported["confirmed_seeds"]) == (winner.mean_js, 2)
    (told,) = refusal(capsys, [], "export", folder, folder.parent / "exported")
    assert told == f"{folder}: the winner is in {folder / 'best'}; name another run with --trial"
    words = f"{winner.mean_js:.4f} ± {winner.standard_error:.4f} bits (mean and standard error over 2 seeds)"
    assert words in (folder / "best" / "README.md").read_text()
    assert f"best mean   {words}, trial {winner.trial_id} of the search" in out
    assert load_package(folder / "best").image_size == 32
    page = (folder / "report.html").read_text()
    assert "<h1>study, confirmed</h1>" in page
    assert f"<b>{winner.mean_js:.4f} <small>± {winner.standard_error:.4f}</small></b>JS, bits: mean and" in page
    assert f"standard error over 2 seeds, trial {winner.trial_id} of the search" in page
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", page)]
    place = cells.index(f"{winner.mean_js:.4f}")
    assert cells[place - 1 : place + 2] == [winner.trial_id, f"{winner.mean_js:.4f}", f"{winner.standard_error:.4f}"]

    # The record says it all again.
    before = (folder / "confirmed.csv").read_bytes()
    (folder / "confirmed.csv").unlink()
    assert exit_code(["report", folder]) == 0
    assert (folder / "confirmed.csv").read_bytes() == before
    (told,) = refusal(capsys, [study], "search", "--resume", "--results", study, "--name", "confirmed")
    assert told == f"{folder}: is a confirmation; continue it with `python -m raytune_emotion.confirm {study}`"
    # Nothing is left to do, and nothing is done.
    assert exit_code(["confirm", study, "--top", 1, "--seeds", 1]) == 0
    assert read_records(folder, load_study(folder)) == records
