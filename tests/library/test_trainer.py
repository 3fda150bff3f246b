import math
import pickle

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from raytune_emotion import (
    MetricsCalculator,
    create_loaders,
    create_model,
    create_trainer,
    get_loss_function,
    load_checkpoint,
)
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.library.trainer import Checkpoint


class Linear(nn.Module):
    """A model without BatchNorm or dropout, so that batches do not depend on each other."""

    def __init__(self, value=0.01):
        super().__init__()
        self.layer = nn.Linear(12, 13)
        nn.init.constant_(self.layer.weight, value)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images):
        return self.layer(images.flatten(1)).softmax(-1)


def data(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(n, 3, 2, 2, generator=generator), torch.rand(n, 13, generator=generator).mul(4).softmax(-1))
        for n in sizes
    ]


def cut(batches, size):
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return list(zip(images.split(size), targets.split(size), strict=True))


@pytest.fixture
def make(tmp_path):
    def made(train=None, model=None, optimizer=None, loss="kl", **options):
        model = model or Linear()
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        batches = train or data(8, 8, 8)
        folders = (tmp_path / "checkpoints", tmp_path / "logs")
        val = data(6, 5, seed=1)
        return create_trainer(model, batches, val, get_loss_function(loss), optimizer, *folders, **options)

    return made


def test_a_model_learns_and_the_history_tells(make):
    history = make().train(4)
    assert {len(values) for values in history.values()} == {4}
    assert history["epoch"] == [1, 2, 3, 4]
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert {"val_loss", "val_js", "val_kl", "val_tvd", "val_accuracy", "lr", "seconds"} <= history.keys()
    assert len(pd.DataFrame(history)) == 4


def test_the_history_has_the_numbers_of_the_metrics_over_all_rows(make):
    trainer = make(loss="kl")
    history = trainer.train(1)
    images, targets = (torch.cat(parts) for parts in zip(*data(6, 5, seed=1), strict=True))
    with torch.inference_mode():
        expected = MetricsCalculator().compute_all(trainer.model(images), targets)
    for name, value in expected.items():
        assert history[f"val_{name}"] == [pytest.approx(value, abs=1e-6)]
    assert history["val_loss"] == [pytest.approx(expected["kl"], abs=1e-6)]


@pytest.mark.parametrize("sizes", [(8, 8), (7, 8), (5, 8, 3)], ids=str)
def test_accumulated_gradients_are_those_of_the_whole_batch(make, sizes):
    whole, parts = Linear(), Linear()
    batches = data(*sizes)
    make(train=cut(batches, sum(sizes)), model=whole).train(2)
    make(train=batches, model=parts, gradient_accumulation_steps=len(sizes)).train(2)
    torch.testing.assert_close(parts.layer.weight, whole.layer.weight, rtol=0, atol=1e-6)


def test_the_last_step_of_an_epoch_may_have_fewer_batches(make):
    whole, parts = Linear(), Linear()
    batches = data(4, 4, 4)
    make(train=[*cut(batches[:2], 8), batches[2]], model=whole).train(2)
    make(train=batches, model=parts, gradient_accumulation_steps=2).train(2)
    torch.testing.assert_close(parts.layer.weight, whole.layer.weight, rtol=0, atol=1e-6)


def test_training_stops_when_the_validation_loss_no_longer_falls(make):
    model = Linear()
    trainer = make(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert len(trainer.train(20, early_stopping_patience=3)["epoch"]) == 4
    assert len(trainer.train(20, early_stopping_patience=3)["epoch"]) == 4
    assert len(trainer.train(20, early_stopping_patience=None)["epoch"]) == 24


def test_schedulers_set_the_learning_rate_of_the_next_epoch(make):
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    assert make(model=model, optimizer=optimizer).train(3, scheduler=scheduler)["lr"] == [0.4, 0.2, 0.1]
    flat = torch.optim.SGD(model.parameters(), lr=0.0)
    flat.param_groups[0]["lr"] = 1e-9
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(flat, factor=0.5, patience=0, threshold=0.9, eps=0.0)
    history = make(model=model, optimizer=flat).train(3, scheduler=plateau)
    assert history["lr"] == [1e-9, 1e-9, 5e-10]
    assert plateau.best == history["val_loss"][0]


def test_the_checkpoint_is_of_the_lowest_validation_loss(make, tmp_path):
    trainer = make()
    history = trainer.train(6, early_stopping_patience=None)
    model = Linear(0.5)
    epoch, best_loss = load_checkpoint(tmp_path / "checkpoints" / "best.safetensors", model)
    assert best_loss == min(history["val_loss"])
    assert epoch == history["val_loss"].index(best_loss) + 1
    with torch.inference_mode():
        losses = [get_loss_function("kl")(model(x), p).item() * len(x) for x, p in data(6, 5, seed=1)]
    assert sum(losses) / 11 == pytest.approx(best_loss, abs=1e-6)


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam], ids=lambda kind: kind.__name__
)
def test_a_training_goes_on_from_a_checkpoint_as_if_it_had_not_been_left(make, tmp_path, kind):
    def made(model):
        optimizer = kind(model.parameters(), lr=0.002)
        return make(model=model, optimizer=optimizer), optimizer

    through, resumed = Linear(), Linear()
    made(through)[0].train(4, early_stopping_patience=None)
    made(resumed)[0].train(2)
    other = Linear(0.7)
    trainer, optimizer = made(other)
    assert load_checkpoint(tmp_path / "checkpoints", other, optimizer).epoch == 2
    trainer.train(2)
    torch.testing.assert_close(other.layer.weight, through.layer.weight, rtol=0, atol=1e-6)


def test_a_training_that_goes_on_counts_on_and_keeps_a_better_checkpoint(make, tmp_path):
    make().train(4, early_stopping_patience=None)
    kept = (tmp_path / "checkpoints" / "best.safetensors").read_bytes()
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = load_checkpoint(tmp_path / "checkpoints", model)
    worse = Linear(3.0)
    trainer = make(model=worse, optimizer=torch.optim.SGD(worse.parameters(), lr=0.0), start=start)
    history = trainer.train(3, early_stopping_patience=2)
    assert history["epoch"] == [start.epoch + 1, start.epoch + 2]
    assert (tmp_path / "checkpoints" / "best.safetensors").read_bytes() == kept
    same = make(model=model, optimizer=optimizer, start=Checkpoint(start.epoch, 9.0))
    same.train(1)
    assert load_checkpoint(tmp_path / "checkpoints", Linear()) == pytest.approx((start.epoch + 1, start.best_loss))


def test_the_optimizer_gets_the_learning_rate_of_the_checkpoint(make, tmp_path):
    make().train(1)
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    load_checkpoint(tmp_path / "checkpoints", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_an_optimizer_of_other_groups_is_refused_before_anything_is_loaded(make, tmp_path):
    make().train(1)
    model = Linear()
    weights = model.layer.weight.clone()
    groups = [{"params": [model.layer.weight]}, {"params": [model.layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    with pytest.raises(UserError, match="the groups of its optimizer have 2 parameters, those of this optimizer 1, 1"):
        load_checkpoint(tmp_path / "checkpoints", model, optimizer)
    assert torch.equal(model.layer.weight, weights)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_of_another_kind_is_refused_before_anything_is_loaded(make, tmp_path, kind):
    make().train(1)
    model = Linear()
    weights = model.layer.weight.clone()
    optimizer = kind(model.parameters(), lr=0.125)
    with pytest.raises(UserError, match=f"its optimizer is SGD, not {kind.__name__}; make it as for the training"):
        load_checkpoint(tmp_path / "checkpoints", model, optimizer)
    assert torch.equal(model.layer.weight, weights)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_the_learning_rate_may_be_a_tensor(make, tmp_path):
    model = Linear()
    make(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))).train(1)
    other = torch.optim.AdamW(model.parameters(), lr=torch.tensor(123.0))
    load_checkpoint(tmp_path / "checkpoints", model, other)
    assert torch.equal(other.param_groups[0]["lr"], torch.tensor(0.25))
    number = torch.optim.AdamW(model.parameters(), lr=123.0)
    load_checkpoint(tmp_path / "checkpoints", model, number)
    assert number.param_groups[0]["lr"] == 0.25


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "best.safetensors").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "model.pt")
    for name in ("best.safetensors", "model.pt"):
        with pytest.raises(UserError, match="not a checkpoint in safetensors"):
            load_checkpoint(tmp_path / name, Linear())
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_is_missing_or_of_something_else_is_refused(make, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path, Linear())
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors", Linear())
    make().train(1)
    with pytest.raises(UserError, match="do not match the model; make the model with which it was trained") as raised:
        load_checkpoint(tmp_path / "checkpoints", nn.Linear(2, 2))
    assert "delete" not in str(raised.value)


def test_tensorboard_has_every_epoch(make, tmp_path):
    history = make().train(3)
    read = EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert [event.step for event in read.Scalars("val/js")] == [1, 2, 3]
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(history["train_loss"])
    assert {"val/loss", "lr"} <= set(read.Tags()["scalars"])


def test_a_loss_that_is_no_number_ends_the_training(make):
    model = Linear(math.nan)
    with pytest.raises(Breakdown, match="epoch 1: the training loss is nan"):
        make(model=model).train(2)


class Halves(Linear):
    """A model of two classes."""

    def forward(self, images):
        return super().forward(images)[:, :2].softmax(-1)


@pytest.mark.parametrize("given", ["argument", "model"])
def test_metrics_are_those_of_other_classes_than_the_emotions(tmp_path, given):
    model, options = Halves(), {"classes": ["calm", "glad"]} if given == "argument" else {}
    model.classes = ("calm", "glad") if given == "model" else ("sad",)
    batches = [(images, targets[:, :2].softmax(-1)) for images, targets in data(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_trainer(model, batches, batches, get_loss_function("kl"), optimizer, tmp_path, tmp_path, **options)
    history = trainer.train(1)
    assert "val_js" in history
    assert "val_emd_va" not in history


def test_numbers_out_of_range_are_told_at_once(make):
    with pytest.raises(UserError) as refused:
        make(gradient_accumulation_steps=0, grad_clip=-1.0)
    assert len(refused.value.faults) == 2
    with pytest.raises(UserError, match="early_stopping_patience: expected a positive integer, got 0; None"):
        make().train(1, early_stopping_patience=0)


def test_loaders_model_and_trainer_fit_together(store, tmp_path):
    train, val = create_loaders(store.path, batch_size=32)
    model = create_model("test_resnet", pretrained=False, image_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = create_trainer(
        model, train, val, get_loss_function("js"), optimizer, tmp_path / "checkpoints", tmp_path / "logs"
    )
    history = trainer.train(2)
    assert history["val_js"] == pytest.approx(history["val_loss"], abs=1e-6)
    load_checkpoint(tmp_path / "checkpoints", create_model("test_resnet", pretrained=False, image_size=32))
