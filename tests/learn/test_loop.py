import contextlib
import dataclasses
import gc
import math
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from raytune_emotion.data import loader
from raytune_emotion.errors import UserError
from raytune_emotion.learn import loop, step
from raytune_emotion.learn.checkpoint import Progress, read_best
from raytune_emotion.learn.evaluation import baseline, evaluate
from raytune_emotion.learn.loop import Divergence, fit, make_plan
from raytune_emotion.learn.model import build_model
from raytune_emotion.learn.origin import WeightsUnavailableError
from raytune_emotion.learn.run_folder import BEST, read_history
from tests.support.training import CPU, EVERYTHING, reports_of_run, run_config, same_tensors, shortened, state_of

# ---- reports


def test_reports_say_what_is_promised(store):
    reports = list(fit(run_config(train__evals_per_epoch=2), store, device=CPU))
    assert [report["report"] for report in reports] == [1, 2, 3, 4]
    assert [report["epoch"] for report in reports] == [0.5, 1, 1.5, 2]
    assert [report["finished"] for report in reports] == [False, False, False, True]
    assert all(type(value) in (int, float, bool) for report in reports for value in report.values())
    assert sorted(report["seconds"] for report in reports) == [report["seconds"] for report in reports]
    for number, report in enumerate(reports, 1):
        so_far = [earlier["val_js"] for earlier in reports[:number]]
        assert report["best_val_js"] == min(so_far)
        assert so_far[report["best_report"] - 1] == min(so_far)
    names = "js kl ce tvd mse l1 emd emd_va chebyshev clark canberra cosine intersection accuracy"
    assert [key for key in reports[0] if key.startswith("val_")] == [f"val_{name}" for name in names.split()]
    assert reports[0]["params_millions"] == pytest.approx(0.38, abs=0.02)
    assert reports[0]["images_per_second"] > 0


def test_training_learns(store):
    quick = {"optim__lr": 3e-3, "optim__schedule": "cosine", "model__dropout": 0.0, "train__batch_size": 8}
    reports = reports_of_run(run_config(**quick, train__epochs=8), store)
    assert reports[-1]["train_loss"] < 0.8 * reports[0]["train_loss"]
    assert reports[-1]["best_val_js"] < baseline(store)["js"]


def test_a_setting_that_an_older_version_did_not_know_had_its_default(store, tmp_path):
    config = run_config()
    known = {name: value for name, value in config.to_flat().items() if name != "augment.operations"}
    progress = Progress(known, store.fingerprint, (), {})
    loop.check_same_run(config, store, tmp_path, progress)
    with pytest.raises(UserError, match=r"the run there began with augment.operations = 0, not 2; keep that value"):
        loop.check_same_run(run_config(augment__operations=2), store, tmp_path, progress)


@pytest.mark.parametrize(
    ("rows", "evals", "batch_rows", "steps", "stops"),
    [(96, 1, 16, 6, (6,)), (96, 4, 16, 6, (2, 3, 5, 6)), (40, 2, 16, 2, (1, 2)), (7, 1, 7, 1, (1,))],
)
def test_a_plan_has_whole_batches_and_ends_epochs_with_a_report(store, rows, evals, batch_rows, steps, stops):
    plan = make_plan(run_config(train__evals_per_epoch=evals), shortened(store, rows), CPU)
    assert (plan.batch_rows, plan.steps_per_epoch, plan.stops) == (batch_rows, steps, stops)
    assert [plan.span(i)[:2] for i in (0, len(stops))] == [(0, 0), (1, 0)]


@pytest.mark.parametrize(("rows", "evals", "steps"), [(40, 9, 2), (7, 2, 1), (96, 10_000_000, 6)])
def test_more_evaluations_than_steps_are_refused(store, rows, evals, steps):
    with pytest.raises(
        UserError, match=f"^train.evals_per_epoch: {rows} rows in batches of 16 .*; choose at most {steps}"
    ):
        make_plan(run_config(train__evals_per_epoch=evals), shortened(store, rows), CPU)


def test_a_training_set_smaller_than_a_batch_is_one_step(store):
    assert len(reports_of_run(run_config(), shortened(store, 7))) == 2


# ---- the same numbers, however they are come by

RESUMED = {
    "adamw, plateau, accumulated": {
        "train__epochs": 3,  # of two the rate would not change
        "optim__plateau_patience": 0.5,
        "train__accumulate": 3,
        "optim__weight_decay": 0.1,
    },
    "adam, cosine, clipped, averaged": {
        "optim__name": "adam",
        "optim__schedule": "cosine",
        "optim__warmup_epochs": 0.7,
        "train__grad_clip": 0.5,
        "train__ema_decay": 0.9,
        "loss__kl": 0.5,
        "loss__js": 0.5,
    },
    "sgd, constant, bf16": {
        "optim__name": "sgd",
        "optim__schedule": "constant",
        "optim__lr": 0.05,
        "train__precision": "bf16",
    },
    "transformer": {"model__backbone": "test_vit", "optim__schedule": "cosine"},
    # Until the middle of a report.
    "frozen, clipped, averaged": {
        "model__freeze_epochs": 0.75,
        "optim__weight_decay": 0.1,
        "train__grad_clip": 0.5,
        "train__ema_decay": 0.9,
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_bit_for_bit(store, tmp_path, name):
    settings, store = run_config(**EVERYTHING | {"train__epochs": 2} | RESUMED[name]), shortened(store, 48)
    whole = reports_of_run(settings, store, tmp_path / "whole")
    parts = [reports_of_run(settings, store, tmp_path / "parts", stop=stop) for stop in (1, 2, None)]
    assert [len(part) for part in parts] == [1, 2, 2 * settings.train.epochs - 3]
    assert [report for part in parts for report in part] == whole
    assert same_tensors(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    if "plateau" in name:
        assert len({report["lr"] for report in whole}) > 1


def test_rows_that_live_on_the_device_give_the_same_numbers(store, monkeypatch):
    settings = run_config(train__epochs=1)
    from_files = reports_of_run(settings, store)
    monkeypatch.setattr(loader, "_room", lambda device: math.inf)
    assert reports_of_run(settings, store) == from_files


def test_seconds_go_on_where_they_were(store, tmp_path):
    first = next(fit(run_config(), store, device=CPU, folder=tmp_path))
    second = next(fit(run_config(), store, device=CPU, folder=tmp_path))
    assert second["seconds"] > first["seconds"]


def test_generators_are_left_as_they_were_found(store):
    before = torch.get_rng_state()
    for _ in fit(run_config(model__dropout=0.5), store, device=CPU):
        assert torch.equal(torch.get_rng_state(), before)


def test_micro_batches_make_the_gradient_of_the_whole_batch(store, tmp_path):
    """16 rows in 3 uneven parts, without BatchNorm and dropout."""
    plain = {"model__backbone": "test_vit", "model__dropout": 0.0, "optim__name": "sgd", "train__epochs": 1}
    for accumulate in (1, 3):
        reports_of_run(
            run_config(**plain, optim__lr=0.1, train__accumulate=accumulate), store, tmp_path / str(accumulate)
        )
    first, third = state_of(tmp_path / "1"), state_of(tmp_path / "3")
    for name in first:
        torch.testing.assert_close(first[name], third[name], rtol=1e-4, atol=1e-5)


def test_the_average_of_the_weights_is_validated_and_kept(store, tmp_path):
    settings = run_config(train__epochs=1, train__ema_decay=0.5)
    (report,) = reports_of_run(settings, store, tmp_path)
    last, kept = state_of(tmp_path), read_best(tmp_path / BEST).weights
    assert same_tensors(kept, {name: last[f"average.{name}"] for name in kept})
    assert not same_tensors(kept, {name: last[f"model.{name}"] for name in kept})
    model = build_model(settings)
    model.load_state_dict(kept)
    metrics = evaluate(model, store.val, classes=store.classes, device=CPU)
    assert metrics["js"] == pytest.approx(report["val_js"], rel=1e-5)
    # It changes nothing of how the weights themselves are trained.
    reports_of_run(run_config(train__epochs=1), store, tmp_path / "plain")
    assert same_tensors(
        state_of(tmp_path / "plain"), {name: last[name] for name in last if not name.startswith("average.")}
    )


def test_the_average_of_the_weights_contains_the_last_step(store, tmp_path):
    # So small a decay makes the average a copy of the weights at its last update.
    settings = run_config(train__epochs=1, train__ema_decay=1e-3, train__batch_size=16)
    reports_of_run(settings, shortened(store, 64), tmp_path)
    last = state_of(tmp_path)
    averaged = {name.removeprefix("average."): value for name, value in last.items() if name.startswith("average.")}
    assert averaged.keys() == {name.removeprefix("model.") for name in last if name.startswith("model.")} != set()
    for name, value in averaged.items():
        torch.testing.assert_close(value, last[f"model.{name}"], msg=name)


def test_each_report_is_of_another_average_of_the_weights(store):
    # Two steps lie between two reports.
    reports = reports_of_run(run_config(train__ema_decay=0.5, train__evals_per_epoch=3, train__epochs=1), store)
    assert len({report["val_js"] for report in reports}) == 3


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_scaled_gradients_of_fp16_make_the_steps_of_fp32(store, name):
    """As on a GPU: the first scales are too large, and their steps are left out."""
    settings = run_config(optim__name=name, optim__schedule="constant", train__accumulate=2, train__grad_clip=1.0)
    store = shortened(store, 48)
    plan = make_plan(settings, store, CPU)
    losses = {}
    for precision in ("fp32", "fp16"):
        half = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision=precision))
        training = loop.start(half, store, CPU, plan, fresh=True)
        if precision == "fp16":
            assert training.scaler.is_enabled()
            training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**40})
            began = {key: value.clone() for key, value in training.model.named_parameters()}
            loop.train_segment(dataclasses.replace(training, plan=dataclasses.replace(plan, stops=(1,))), [])
            assert all(torch.equal(value, began[key]) for key, value in training.model.named_parameters())
            training.scaler.update(2.0**10)
        losses[precision] = [loop.train_segment(training, [])[0] for _ in range(2)]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp32"][-1] < losses["fp32"][0]


def test_clipped_gradients_take_small_steps(store, tmp_path):
    clipped = {"optim__name": "sgd", "optim__momentum": 0.0, "optim__schedule": "constant", "train__epochs": 1}
    reports_of_run(run_config(**clipped, optim__lr=1.0, train__grad_clip=1e-3), store, tmp_path)
    start, end = dict(build_model(run_config()).named_parameters()), state_of(tmp_path)
    moved = math.sqrt(sum((end[f"model.{name}"] - value).square().sum().item() for name, value in start.items()))
    assert 0 < moved <= 6 * 1e-3 * 1.001  # steps, each of at most lr times the norm


ALL = {
    "augment__crop_scale": 0.8,
    "augment__colour": 0.3,
    "augment__grey": 0.2,
    "augment__erase": 0.3,
    "augment__mixup": 0.4,
    "augment__cutmix": 0.4,
    "train__accumulate": 2,
    "train__grad_clip": 5,
}


@pytest.fixture
def like_cuda(monkeypatch):
    """A GPU whose tensors have no values, so that an operation over two devices fails, and so does reading a number.

    What needs a driver is left out: pinned memory, generators, the average of weights and gradients, which are zero.
    """
    device = torch.device("cuda", 0)

    def on_device(split):
        pixels = torch.empty((len(split), 32, 32, 3), dtype=torch.uint8, device=device)
        return loader.DeviceSplit(pixels, torch.empty(split.prob_NK.shape, device=device))

    monkeypatch.setattr(loop, "cache_on_device", lambda store, device: (on_device(store.train), on_device(store.val)))
    monkeypatch.setattr(loop, "_randomness", lambda *key: contextlib.nullcontext())
    monkeypatch.setattr(nn.Module, "to", lambda model, *args, **kwargs: model)  # it is there from the beginning
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        yield device


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("changes", [{}, ALL], ids=["plain", "all"])
def test_no_step_on_a_gpu_waits_for_it(store, like_cuda, monkeypatch, changes):
    settings, store = run_config(optim__name="adamw", loss__kl=0.5, loss__js=0.5, **changes), shortened(store, 32)
    running = loop.start(settings, store, like_cuda, make_plan(settings, store, like_cuda), fresh=True)
    steps = []

    def backward(loss):
        for parameter in running.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(running.scaler, "update", lambda: steps.append(len(steps)))
    with pytest.raises(DataDependentOutputException):
        loop.train_segment(running, [])
    assert len(steps) == running.plan.steps_per_epoch > 1


def test_on_a_gpu_smaller_micro_batches_are_smaller_evaluations_too(store, like_cuda):
    running = loop.start(run_config(), store, like_cuda, make_plan(run_config(), store, like_cuda), fresh=True)
    halved = dataclasses.replace(running, config=run_config(train__accumulate=2))
    assert [loop.rows_to_evaluate(run) for run in (running, halved)] == [16, 8]
    assert loop.rows_to_evaluate(dataclasses.replace(halved, device=CPU)) == 128


# ---- transfer


def test_only_the_head_learns_until_the_backbone_is_freed(store, tmp_path):
    settings = run_config(model__freeze_epochs=1, train__epochs=2, optim__name="adamw", optim__weight_decay=0.1)
    start = build_model(settings).state_dict()
    reports = fit(settings, store, device=CPU, folder=tmp_path)
    for freed in (False, True):
        next(reports)
        moved = {
            name.removeprefix("model.")
            for name, value in state_of(tmp_path).items()
            if name.startswith("model.") and not torch.equal(value, start[name.removeprefix("model.")])
        }
        assert {"fc.weight", "fc.bias"} <= moved
        assert ("conv1.0.weight" in moved) == freed
        assert {name for name in start if name.endswith(("running_mean", "running_var"))} <= moved


def test_a_run_that_is_smoothed_balanced_and_decayed_by_layer_goes_on_as_if_it_had_not_been_stopped(store, tmp_path):
    settings = run_config(train__smoothing=0.1, train__balance=0.5, optim__layer_decay=0.7, model__freeze_epochs=0.5)
    whole = reports_of_run(settings, store)
    parts = reports_of_run(settings, store, tmp_path, stop=1) + reports_of_run(settings, store, tmp_path)
    assert parts == whole
    assert whole != reports_of_run(run_config(), store)


def test_a_backbone_without_blocks_to_skip_is_named(store):
    with pytest.raises(UserError, match=r"model\.drop_path: .* has no blocks to skip"):
        build_model(run_config(model__drop_path=0.1, model__backbone="vgg11", data__image_size=64))
    build_model(run_config(model__drop_path=0.1, model__backbone="test_vit"))


# ---- compiling


@pytest.mark.parametrize(
    ("device", "when", "batch_rows", "compiled"),
    [
        ("cuda", "auto", 10**6, True),
        ("cuda", "auto", 10**5, False),
        ("cuda", "never", 10**6, False),
        ("cpu", "auto", 10**6, False),
        ("cpu", "always", 16, True),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(device, when, batch_rows, compiled):
    settings = run_config(train__compile=when, data__image_size=224)
    plan = loop.Plan(batch_rows, steps_per_epoch=1, stops=(1,), epochs=2, rank=0, workers=1)
    assert loop.is_compiled(settings, torch.device(device), plan) == compiled
    smaller = run_config(train__compile=when, data__image_size=112)
    assert loop.is_compiled(smaller, torch.device(device), plan) == (compiled and when == "always")


def test_several_workers_train_the_compiled_model(store, monkeypatch):
    wrapped = []

    class Wrapper(torch.nn.Module):
        def __init__(self, net, **options):
            super().__init__()
            wrapped.append(net)

    compiled = torch.nn.Identity()
    monkeypatch.setattr(loop, "compile_model", lambda model: compiled)
    monkeypatch.setattr(step, "DistributedDataParallel", Wrapper)
    settings = run_config(train__compile="always", train__batch_size=32)
    plan = dataclasses.replace(make_plan(settings, store, CPU), workers=2)
    loop.start(settings, store, CPU, plan, fresh=True)
    assert wrapped == [compiled]


def test_a_compiled_run_learns_what_another_does(store, monkeypatch):
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: torch_compile(model, dynamic=dynamic, backend=backend))
    store = shortened(store, 32)
    reports = [reports_of_run(run_config(train__compile=when, train__epochs=1), store) for when in ("never", "always")]
    assert traced
    assert reports[0] == reports[1]


def test_a_compiled_backbone_learns_once_it_is_freed(store, tmp_path, monkeypatch):
    """What is compiled while it is frozen has no backward pass."""
    compiled, torch_compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def compile_first_layer(features, dynamic):
        """Compile what is looked at below: the whole model takes five times as long."""
        first = features.__self__.conv1
        first.forward = torch_compile(first.forward, dynamic=dynamic, backend=backend)
        return features

    monkeypatch.setattr(torch, "compile", compile_first_layer)
    settings, store = run_config(train__compile="always", model__freeze_epochs=1), shortened(store, 16)
    start = build_model(settings).state_dict()
    reports = fit(settings, store, device=CPU, folder=tmp_path)
    for freed in (False, True):
        next(reports)
        assert torch.equal(state_of(tmp_path)["model.conv1.0.weight"], start["conv1.0.weight"]) != freed
    assert len(compiled) > 1


# ---- endings


def test_a_finished_run_yields_nothing_and_goes_on_with_more_epochs(store, tmp_path):
    first = reports_of_run(run_config(optim__schedule="constant"), store, tmp_path)
    assert reports_of_run(run_config(optim__schedule="constant"), store, tmp_path) == []
    more = reports_of_run(run_config(optim__schedule="constant", train__epochs=3), store, tmp_path)
    assert [report["report"] for report in first + more] == [1, 2, 3]
    assert len(read_history(tmp_path)) == 3
    once = reports_of_run(run_config(optim__schedule="constant", train__epochs=3), store)
    assert [report["val_js"] for report in first + more] == [report["val_js"] for report in once]


def test_patience_is_counted_in_epochs(store, tmp_path):
    """Steps too small to change anything: only the first report is a best one."""
    idle = {"optim__name": "sgd", "optim__lr": 1e-30, "model__backbone": "test_vit", "train__epochs": 9}
    reports = reports_of_run(run_config(**idle, train__evals_per_epoch=2, train__patience=1.5), store, tmp_path)
    assert len(reports) == 1 + 3
    assert reports[-1]["finished"]
    assert reports_of_run(run_config(**idle, train__evals_per_epoch=2, train__patience=1.5), store, tmp_path) == []


class TurnsToNaN(nn.Module):
    """A model whose outputs are NaN from some call on, in training or in evaluation."""

    def __init__(self, inner, *, training, after):
        super().__init__()
        self.inner, self.when, self.left = inner, training, after
        self.pretrained_cfg = inner.pretrained_cfg

    def forward(self, x):
        if self.training == self.when:
            self.left -= 1
        return self.inner(x) * (math.nan if self.left < 0 else 1)


@pytest.mark.parametrize(("training", "after", "what"), [(True, 8, "training loss"), (False, 1, "js")])
def test_a_run_that_diverges_says_so_and_keeps_its_checkpoints(store, tmp_path, monkeypatch, training, after, what):
    build = loop.build_model
    monkeypatch.setattr(
        loop,
        "build_model",
        lambda *args, **options: TurnsToNaN(build(*args, **options), training=training, after=after),
    )
    reports = fit(run_config(), store, device=CPU, folder=tmp_path)
    next(reports)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(Divergence, match=rf"report 2 \(step 12\): the {what} is nan; choose a smaller"):
        next(reports)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ending", ["closed", "diverged"])
def test_nothing_outlives_a_run(store, monkeypatch, ending):
    built = []
    build = loop.build_model

    def watched(*args, **options):
        model = build(*args, **options)
        built.append(weakref.ref(model))
        return TurnsToNaN(model, training=True, after=8) if ending == "diverged" else model

    monkeypatch.setattr(loop, "build_model", watched)
    threads = set(threading.enumerate())
    reports = fit(run_config(), store, device=CPU)
    next(reports)
    if ending == "closed":
        reports.close()
    else:
        with pytest.raises(Divergence):
            next(reports)
    gc.collect()
    assert built[0]() is None
    assert set(threading.enumerate()) <= threads


# ---- what the user can mend


def test_all_that_does_not_fit_is_said_at_once(store):
    wrong = run_config(data__image_size=64, data__classes=["a", "b"], train__precision="fp16", train__accumulate=12)
    with pytest.raises(UserError) as caught:
        next(fit(wrong, shortened(store, 10), device=CPU))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "data.image_size",
        "data.classes",
        "train.precision",
        "train.batch_size",
    ]


def test_batchnorm_over_one_row_is_refused(store):
    store = shortened(store, 16)
    with pytest.raises(UserError, match="BatchNorm"):
        next(fit(run_config(train__accumulate=16), store, device=CPU))
    next(fit(run_config(train__accumulate=16, model__backbone="test_vit"), store, device=CPU))


@pytest.mark.parametrize(("refusals", "served"), [(0, True), (2, True), (3, False)])
def test_a_hub_that_refuses_for_a_moment_is_asked_again(store, monkeypatch, refusals, served):
    """Else every trial that begins at that moment would end its study."""
    asked = []

    def build(config, *, weights, description):
        asked.append(weights)
        if len(asked) <= refusals:
            raise WeightsUnavailableError("429 Too Many Requests")
        return build_model(config, weights=weights, description=description)

    monkeypatch.setattr(loop, "build_model", build)
    monkeypatch.setattr(loop, "_WAITS", (0, 0))
    with contextlib.nullcontext() if served else pytest.raises(WeightsUnavailableError):
        next(fit(run_config(), store, device=CPU))
    assert asked == [True] * min(refusals + 1, 3)


def test_a_folder_is_resumed_with_its_own_settings_and_data_only(store, tmp_path):
    next(fit(run_config(), store, device=CPU, folder=tmp_path))
    with pytest.raises(UserError) as caught:
        next(fit(run_config(optim__lr=0.5, train__seed=1, train__epochs=5), store, device=CPU, folder=tmp_path))
    assert len(caught.value.faults) == 2
    assert all(str(tmp_path) in fault for fault in caught.value.faults)
    with pytest.raises(UserError, match="other data"):
        next(fit(run_config(), dataclasses.replace(store, fingerprint="other"), device=CPU, folder=tmp_path))
