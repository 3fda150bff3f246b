import dataclasses
import errno
import json
import os

import pytest
import torch

from raytune_emotion.config import RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn import checkpoint
from raytune_emotion.learn.checkpoint import DamagedCheckpointError, read_best, read_predictions, read_progress
from raytune_emotion.learn.evaluation import evaluate, predict_share
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, PREDICTIONS, read_history

CPU = torch.device("cpu")


def config(**changes):
    flat = {
        "data.image_size": 32,
        "model.backbone": "test_resnet",
        "train.batch_size": 32,
        "train.epochs": 2,
        "loss.kl": 1.0,
    }
    return RunConfig.from_flat(flat | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """The files of a finished run, and its reports."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    reports = list(fit(config(), store, device=CPU, folder=folder))
    return {file.name: file.read_bytes() for file in folder.iterdir()}, reports


@pytest.fixture
def run(finished, tmp_path):
    for name, content in finished[0].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def reports(finished):
    return finished[1]


def test_a_folder_holds_what_was_reported_and_nothing_more(run, reports):
    assert sorted(file.name for file in run.iterdir()) == [BEST, HISTORY, LAST, PREDICTIONS]
    assert read_history(run) == list(read_progress(run).history) == reports
    assert read_best(run / BEST).report == min(reports, key=lambda report: report["val_js"])


def test_files_get_the_mode_that_the_umask_leaves(store, tmp_path):
    before = os.umask(0o027)
    try:
        next(fit(config(), store, device=CPU, folder=tmp_path))
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / LAST, tmp_path / BEST)} == {
        LAST: 0o640,
        BEST: 0o640,
    }


def test_a_report_is_on_the_disk_before_it_is_yielded(store, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def note(fd):
        file = os.fstat(fd)
        synced.add((file.st_ino, file.st_size))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    for _ in fit(config(), store, device=CPU, folder=tmp_path):
        for name in (HISTORY, LAST, BEST, PREDICTIONS):
            file = (tmp_path / name).stat()
            assert (file.st_ino, file.st_size) in synced, name
    assert len(read_history(tmp_path)) == 2


def test_the_best_weights_rebuild_the_model_and_its_metrics(run, store):
    best = read_best(run / BEST)
    rebuilt = RunConfig.from_flat(best.settings)
    assert rebuilt == config()
    assert best.fingerprint == store.fingerprint
    model = build_model(rebuilt, weights=False)
    model.load_state_dict(best.weights)
    for name, value in evaluate(model, store.val, classes=rebuilt.data.classes, device=CPU).items():
        assert best.report[f"val_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_predictions_of_the_best_weights_are_kept(run, store):
    best = read_best(run / BEST)
    model = build_model(RunConfig.from_flat(best.settings), weights=False)
    model.load_state_dict(best.weights)
    logits_NK, _ = predict_share(model, store.val, device=CPU)
    kept_NK = read_predictions(run, best)
    assert kept_NK.shape == store.val.prob_NK.shape
    # Relative metrics of an ensemble need small probabilities, too.
    assert torch.allclose(kept_NK, logits_NK.double().softmax(-1), rtol=1e-5, atol=0)


def test_there_is_no_progress_before_the_first_report(tmp_path):
    assert read_progress(tmp_path) is None


def test_predictions_of_another_report_are_not_taken(run):
    best = read_best(run / BEST)
    other = dataclasses.replace(best, report={**best.report, "report": best.report["report"] + 1})
    assert read_predictions(run, other) is None
    (run / PREDICTIONS).write_bytes(b"torn")
    assert read_predictions(run, best) is None
    (run / PREDICTIONS).unlink()
    assert read_predictions(run, best) is None


@pytest.mark.parametrize(
    "found", ["missing", "torn", "line missing", "line beyond", "of another run", "no text"], ids=lambda found: found
)
def test_history_is_mended_from_the_last_checkpoint(run, reports, store, found):
    lines = [json.dumps(report) + "\n" for report in reports]
    (run / HISTORY).write_text(
        {
            "missing": "",
            "no text": "\xff",
            "torn": "".join(lines)[:-5],
            "line missing": lines[0],
            "line beyond": "".join(lines) + lines[-1].replace('"report": 2', '"report": 3'),
            "of another run": '{"report": 1}\n' * 2,
        }[found],
        encoding="latin-1",
    )
    if found == "missing":
        (run / HISTORY).unlink()
    assert list(fit(config(), store, device=CPU, folder=run)) == []
    assert read_history(run) == reports


@pytest.mark.parametrize("found", ["missing", "damaged", "older"])
def test_the_best_weights_are_mended_from_the_last_checkpoint(tmp_path, store, found):
    """As after a death between the two: the newest report is the best."""
    older = b""
    for report in fit(
        config(train__epochs=20, optim__lr=3e-3, train__ema_decay=0.5), store, device=CPU, folder=tmp_path
    ):
        if report["best_report"] == report["report"] > 1:
            break
        older = (tmp_path / BEST).read_bytes()
    whole = read_best(tmp_path / BEST)
    assert whole.report == report
    if found == "missing":
        (tmp_path / BEST).unlink()
    else:
        (tmp_path / BEST).write_bytes(older[:1000] if found == "damaged" else older)
    checkpoint.repair_from_last(tmp_path, read_progress(tmp_path))
    mended = read_best(tmp_path / BEST)
    assert mended.report == whole.report
    assert all(torch.equal(mended.weights[name], whole.weights[name]) for name in whole.weights)


def test_what_a_killed_writer_left_is_removed(run, store):
    (run / f".{LAST}.123.tmp").write_bytes(b"half")
    (run / "events").write_bytes(b"not ours")
    list(fit(config(), store, device=CPU, folder=run))
    assert sorted(file.name for file in run.iterdir()) == [BEST, "events", HISTORY, LAST, PREDICTIONS]


@pytest.mark.parametrize("name", [LAST, BEST])
@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "foreign", "a bit of a weight", "a digit of a setting"])
def test_a_damaged_checkpoint_is_named(run, store, name, damage):
    whole = (run / name).read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[:-7],
        "garbage": b"\xff" * 64,
        "foreign": (10).to_bytes(8, "little") + b"{}        ",
        "a bit of a weight": whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:],
        "a digit of a setting": whole.replace(b'\\"train.seed\\": 0', b'\\"train.seed\\": 8', 1),
    }[damage]
    assert damaged != whole
    (run / name).write_bytes(damaged)
    with pytest.raises(UserError, match=f"{name}: a damaged checkpoint .* delete"):
        read_best(run / BEST) if name == BEST else next(fit(config(train__epochs=3), store, device=CPU, folder=run))


def test_a_missing_best_is_said(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_best(tmp_path / BEST)


def test_tensors_that_do_not_fit_the_settings_are_no_damage(run, store):
    model = build_model(config(model__backbone="test_efficientnet"))
    with pytest.raises(UserError, match="do not match the model; make the model") as raised:
        checkpoint.load_state(run / LAST, model, torch.optim.AdamW(model.parameters()))
    assert not isinstance(raised.value, DamagedCheckpointError), "a study would delete it and begin anew"


def test_parameter_that_layers_share_is_kept_and_loaded(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters())
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint.save_with_header(tmp_path / BEST, model, optimizer, {"epoch": 3})
    with torch.no_grad():
        model[0].weight.zero_()
    assert checkpoint.read_header(tmp_path / BEST, "epoch") == [3]
    checkpoint.load_state(tmp_path / BEST, model, optimizer)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_damage_is_not_called_so(run, monkeypatch):
    """Nobody is to delete a checkpoint because a device is full, or a server away for a while."""
    model = build_model(config())
    optimizer = torch.optim.AdamW(model.parameters())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def away(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(model, "load_state_dict", full)
        with pytest.raises(torch.OutOfMemoryError):
            checkpoint.load_state(run / LAST, model, optimizer)
    monkeypatch.setattr(checkpoint, "safe_open", away)
    for read in (
        lambda: checkpoint.load_state(run / LAST, model, optimizer),
        lambda: read_progress(run),
        lambda: read_best(run / BEST),
    ):
        with pytest.raises(OSError, match="Stale"):
            read()


def test_without_a_last_checkpoint_the_run_starts_anew(run, reports, store):
    (run / LAST).unlink()
    again = next(fit(config(), store, device=CPU, folder=run))
    assert again["report"] == 1
    assert again["val_js"] == reports[0]["val_js"]
    assert read_history(run) == [again]
