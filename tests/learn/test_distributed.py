"""Two processes, gloo, on the CPU: they do the work of one."""

import json
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from raytune_emotion.config import RunConfig
from raytune_emotion.data.store import open_store
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import read_best, read_predictions
from raytune_emotion.learn.evaluation import evaluate, predict_share
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.run_folder import BEST, LAST
from tests.support.reports import CLOCKS
from tests.support.training import CPU, EVERYTHING, reports_of_run, run_config, same_tensors, state_of

# Without BatchNorm and dropout, and with plain gradients: numbers that do not depend on the number of workers. Shares
# of 8 and 7 rows, in micro-batches of 4, 4 and 4, 3. The backbone is frozen in some of the steps, in others not.
COMPARABLE = {
    "model__dropout": 0.0,
    "model__freeze_epochs": 0.3,
    "train__epochs": 1,
    "optim__name": "sgd",
    "optim__lr": 0.05,
    "train__batch_size": 15,
    "train__accumulate": 2,
    "train__ema_decay": 0.9,
    "augment__colour": 0.5,
    "augment__crop_scale": 0.6,
}
SHORT = EVERYTHING | {"train__epochs": 1, "model__freeze_epochs": 0.75}
BACKBONES = ("test_vit", "test_efficientnet_gn")  # the latter in channels-last memory, as all convolutions


def of_one_row(split):
    return type(split)(split.ids[:1], split.prob_NK[:1], (split.gather(np.arange(1)),))


def in_second(_, store_path, folder):
    """Be the second worker, in a fresh process; train alone before."""
    torch.set_num_threads(1)
    store = open_store(store_path)
    reports_of_run(run_config(**SHORT), store, folder / "alone")
    work(1, store, folder)


def work(rank, store, folder):
    """Be one of the two workers; leave what it found in a file."""
    meeting, patience = f"file://{folder}/meeting", timedelta(seconds=200)
    dist.init_process_group("gloo", init_method=meeting, timeout=patience, rank=rank, world_size=2)
    try:
        found = find(rank, store, folder)
    finally:
        dist.destroy_process_group()
    (folder / f"found{rank}.json").write_text(json.dumps(found))


def find(rank, store, folder):
    """Evaluate and train together with the other worker; return what came of it."""
    found = {}
    model = build_model(run_config())
    for name, split in (("odd", store.val), ("single", of_one_row(store.val))):
        found[name] = evaluate(model, split, classes=store.classes, device=CPU)
    for backbone in BACKBONES:
        found[backbone] = list(
            fit(
                run_config(**COMPARABLE, model__backbone=backbone),
                store,
                device=CPU,
                folder=folder / f"{backbone}{rank}",
            )
        )
    settings = run_config(**SHORT)
    found["whole"] = list(fit(settings, store, device=CPU, folder=folder / "whole"))
    first = fit(settings, store, device=CPU, folder=folder / "parts")
    found["parts"] = [next(first)]
    first.close()
    found["parts"] += fit(settings, store, device=CPU, folder=folder / "parts")
    found["again"] = list(fit(settings, store, device=CPU, folder=folder / "parts"))
    try:
        next(fit(settings, store, device=CPU, folder=folder / ("whole" if rank == 0 else "elsewhere")))
    except UserError as error:
        found["elsewhere"] = str(error)
    try:
        next(fit(run_config(train__batch_size=1), store, device=CPU))
    except UserError as error:
        found["too small"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    """The folder of what two workers have found. The first is this process: to import PyTorch takes seconds."""
    folder = tmp_path_factory.mktemp("workers")
    second = torch.multiprocessing.spawn(in_second, (store.path, folder), join=False)
    work(0, store, folder)
    assert second.join(60)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["odd", "single"])
def test_two_processes_measure_what_one_does(found, store, name):
    split = store.val if name == "odd" else of_one_row(store.val)
    assert len(split) % 2 == 1
    expected = evaluate(build_model(run_config()), split, classes=store.classes, device=CPU)
    assert found[0][name] == found[1][name] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_two_workers_train_what_one_does(found, folder, store, tmp_path, backbone):
    alone = reports_of_run(run_config(**COMPARABLE, model__backbone=backbone), store, tmp_path)
    for report, expected in zip(found[0][backbone], alone, strict=True):
        own = {key: value for key, value in report.items() if key not in CLOCKS}
        assert own == pytest.approx({**expected, "workers": 2}, abs=1e-5)
    together, expected = load_file(folder / f"{backbone}0" / LAST), state_of(tmp_path)
    assert together.keys() == expected.keys()
    start = build_model(run_config(**COMPARABLE, model__backbone=backbone)).state_dict()
    apart, moved = (
        sum((ending[f"model.{name}"] - other[name]).square().sum().item() for name in start) ** 0.5
        for ending, other in ((together, {name: expected[f"model.{name}"] for name in start}), (expected, start))
    )
    assert apart < 1e-3 * moved


def test_all_workers_yield_the_same_reports_and_the_first_alone_writes(found, folder):
    for name in ("odd", "single", *BACKBONES, "whole", "parts"):
        assert found[0][name] == found[1][name]
    for backbone in BACKBONES:
        assert (folder / f"{backbone}0" / LAST).exists()
        assert not (folder / f"{backbone}1").exists()


def test_workers_resume_bit_for_bit_too(found, folder):
    for part, whole in zip(found[0]["parts"], found[0]["whole"], strict=True):
        assert {**part, **dict.fromkeys(CLOCKS)} == {**whole, **dict.fromkeys(CLOCKS)}
    assert same_tensors(state_of(folder / "parts"), state_of(folder / "whole"))
    assert found[0]["again"] == found[1]["again"] == []


def test_the_statistics_of_batchnorm_are_those_of_all_workers(found, folder, store):
    """The checkpoint that the first worker wrote has the metrics that all of them measured together."""
    model = build_model(run_config(**SHORT))
    last = load_file(folder / "whole" / LAST)
    model.load_state_dict({key[6:]: value for key, value in last.items() if key.startswith("model.")})
    metrics = evaluate(model, store.val, classes=store.classes, device=CPU)
    assert metrics["js"] == pytest.approx(found[1]["whole"][-1]["val_js"], rel=1e-5)


def test_predictions_of_all_workers_are_kept_in_the_order_of_the_rows(folder, store):
    best = read_best(folder / "whole" / BEST)
    model = build_model(run_config(**SHORT))
    model.load_state_dict(best.weights)
    logits_NK, _ = predict_share(model, store.val, device=CPU)
    assert torch.allclose(read_predictions(folder / "whole", best), logits_NK.double().softmax(-1), atol=1e-3)


def test_what_workers_cannot_do_together_is_said_by_all(found):
    for mine in found:
        assert "do not see the same checkpoint" in mine["elsewhere"]
        assert mine["too small"].startswith("train.batch_size: 1 rows")


def test_a_run_is_the_same_in_a_fresh_process_and_after_others(folder, store, tmp_path):
    """Dropout and augmentation on: neither may depend on what the process did before."""
    torch.manual_seed(77)
    reports_of_run(
        RunConfig.from_flat({**run_config().to_flat(), "train.seed": 5, "model.backbone": "test_vit"}), store
    )
    reports_of_run(run_config(**SHORT), store, tmp_path)
    assert same_tensors(state_of(tmp_path), state_of(folder / "alone"))
