import contextlib
import dataclasses
import errno
import json
import platform
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raytune_emotion.config import RunConfig
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn import loop
from raytune_emotion.learn.origin import WeightsUnavailableError
from raytune_emotion.learn.run_folder import HISTORY
from raytune_emotion.tuning.execution import job
from raytune_emotion.tuning.execution.job import (
    DiskFull,
    GpuTaken,
    InvalidForRun,
    Job,
    OutOfMemory,
    TrialFailed,
    _training_errors,
    newest_report,
    train_here,
    train_on,
    train_with_retry,
    with_smaller_micro_batches,
)
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.study.remote_copy import DRIVER, TAKEN_OVER
from raytune_emotion.tuning.study.trials import DATA, PARAMS

JOB = Job("name", "folder", "store", {"train.batch_size": 4}, Resources(1, 1.0, 0.0))


def caused(cause):
    error = UserError("cannot be read")
    error.__cause__ = cause
    return error


class Tensors:
    """What an attempt has on its device."""


def test_the_second_attempt_has_the_memory_of_the_first():
    alive, accumulated = [], []

    def attempt(job):
        accumulated.append(job.settings.get("train.accumulate", 1))
        if not alive:
            tensors = Tensors()
            alive.append(weakref.ref(tensors))
            raise OutOfMemory("out of memory")
        yield {"freed": alive[0]() is None}

    assert list(train_with_retry(JOB, attempt)) == [{"freed": True}]
    assert accumulated == [1, 2]


@pytest.mark.parametrize("refusal", [OutOfMemory("out of memory"), InvalidForRun(("a micro-batch of one row",))])
def test_micro_batches_are_halved_until_they_fit_or_have_one_row(refusal):
    """A trial may begin on a card with little memory."""
    accumulated = []

    def attempt(job):
        accumulated.append(job.accumulate)
        if job.accumulate < fitting:
            raise OutOfMemory("out of memory") if job.accumulate < 4 else refusal
        yield {}

    fitting = 4
    assert list(train_with_retry(JOB, attempt)) == [{}]
    fitting = 8
    with pytest.raises(OutOfMemory, match="out of memory"):
        list(train_with_retry(JOB, attempt))
    assert accumulated == [1, 2, 4] * 2


@pytest.mark.parametrize("refusal", [None, InvalidForRun(("a micro-batch of one row",))])
def test_a_trial_that_lacks_the_memory_that_other_processes_hold_may_continue_later(refusal):
    taken = GpuTaken("gpu-7: out of memory; other processes hold 42 % of what a trial may use of this GPU")

    def attempt(job):
        raise taken if job.accumulate == 1 or refusal is None else refusal
        yield {}

    with pytest.raises(Breakdown, match="gpu-7: out of memory; other processes hold 42 %"):
        list(train_with_retry(JOB, attempt))


@pytest.mark.parametrize(
    ("free", "own", "share", "error"),
    [
        (0.5, 79.0, 1.0, OutOfMemory),  # all others are CUDA's own
        (0.5, 19.0, 0.25, OutOfMemory),
        (40.0, 10.0, 1.0, OutOfMemory),  # others hold 30 GiB, but 50 should be enough
        (20.0, 10.0, 1.0, GpuTaken),  # others hold 50 GiB
        (1.0, 7.0, 0.25, GpuTaken),  # of 20 GiB, others hold 12
        (None, 0.0, 1.0, GpuTaken),  # there is no room for CUDA itself
    ],
)
def test_a_lack_of_memory_is_the_fault_of_others_who_hold_much_of_it(monkeypatch, tmp_path, free, own, share, error):
    def mem_get_info(device):
        if free is None:
            raise RuntimeError("CUDA error: out of memory")
        return int(free * 2**30), 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(own * 2**30))
    with pytest.raises(TrialFailed) as raised, _training_errors(tmp_path, torch.device("cuda"), share):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    assert type(raised.value) is error
    assert "out of memory on the device: CUDA out of memory" in str(raised.value)


def test_a_lack_of_main_memory_is_no_fault_of_others_on_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 2**30))
    with pytest.raises(TrialFailed) as raised, _training_errors(tmp_path, torch.device("cuda"), 1.0):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")
    assert type(raised.value) is OutOfMemory


@pytest.mark.parametrize(("usable", "why"), [(False, "it finds none"), (True, "it has no code for Tesla V100")])
def test_a_machine_whose_gpu_cannot_be_used_fails_no_trial(tmp_path, monkeypatch, usable, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(job, "gpu_fault", lambda: "")
    monkeypatch.setattr(job, "code_fault", lambda gpu: "it has no code for Tesla V100")
    on_gpu = dataclasses.replace(JOB, folder=str(tmp_path / "0"), resources=Resources(1, 1.0, 1.0))
    with pytest.raises(Breakdown, match=rf"cannot use the GPU of a trial \({why}\); repair it, hide it with"):
        next(train_here(on_gpu))


def test_denormal_numbers_are_zero_while_a_trial_trains(store, tmp_path):
    def denormal():
        return (torch.full((), 1e-38) * 0.1).item()

    settings = {"data.image_size": 32, "model.backbone": "test_vit", "train.epochs": 1}
    reports = train_here(dataclasses.replace(JOB, folder=str(tmp_path / "0"), store=store.address, settings=settings))
    assert denormal() > 0
    next(reports)
    assert denormal() == 0
    reports.close()
    assert denormal() > 0


@pytest.mark.parametrize(
    ("found", "raised"),
    [
        (UserError("it does not fit"), TrialFailed),
        (caused(OSError(errno.EIO, "Input/output error")), OSError),
        (caused(OSError(errno.ENOSPC, "No space left on device")), DiskFull),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.ESTALE, "Stale file handle"), OSError),
    ],
)
def test_only_what_would_end_alike_again_fails_a_trial(tmp_path, monkeypatch, found, raised):
    def broken(*_):
        raise found

    for name in ("write_text", "open_store"):
        # Data that are not there are no fault of the trial.
        expected = Breakdown if name == "open_store" and raised is TrialFailed else raised
        with monkeypatch.context() as patched:
            patched.setattr(job, name, broken)
            with pytest.raises(expected):
                next(train_here(dataclasses.replace(JOB, folder=str(tmp_path / "trial"))))


def test_halving_ends_at_one_row():
    job, accumulated = JOB, []
    while (job := with_smaller_micro_batches(job)) is not None:
        accumulated.append(job.settings["train.accumulate"])
    assert accumulated == [2, 4]


def test_a_smaller_attempt_leaves_the_images_in_their_files():
    assert JOB.resident
    assert not with_smaller_micro_batches(JOB).resident


def job_at(folder, store, **settings):
    config = RunConfig.from_flat({"data.image_size": 32, "model.backbone": "test_resnet", **settings})
    return Job("a", str(folder), str(store.path), config.to_flat(), Resources(1, 1.0, 0.0))


def test_workers_wait_for_the_data_and_for_the_weights_of_all_before_they_share_anything(store, tmp_path, monkeypatch):
    """A step waits for minutes only. A machine may fetch data and weights for longer, or read images from a disk."""
    did = []
    for module, name in (
        (job, "open_store"),
        (loop, "build_model"),
        (loop, "cache_on_device"),
        (loop, "_dtype"),
        (loop, "Step"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: (did.append(name), real(*a, **k))[1])
    settings = {"data.image_size": 32, "model.backbone": "test_resnet", "train.epochs": 1}
    here = Job("a", str(tmp_path / "a"), str(store.path), settings, Resources(1, 1.0, 0.0))
    reports = train_on(here, torch.device("cpu"), wait_for_all=lambda: did.append("wait"))
    with contextlib.closing(reports):
        next(reports)
    assert did == ["open_store", "wait", "build_model", "cache_on_device", "wait", "_dtype", "Step"]


def test_weights_that_a_machine_does_not_see_are_no_fault_of_the_trial(store, tmp_path):
    with pytest.raises(Breakdown) as raised:
        next(train_here(job_at(tmp_path, store, **{"model.weights_dir": "/gone"})))
    what, _, advice = str(raised.value).partition("; ")
    assert what == "model.weights_dir: no file /gone/test_resnet.safetensors"
    assert advice.endswith(f"; put the weights where {platform.node()} can read them, such as a shared folder")


def test_results_that_a_machine_does_not_see_are_no_fault_of_the_trial_and_no_folder_is_made(store, tmp_path):
    """What is written to a folder of that machine alone would be lost."""
    study = tmp_path / "study"
    job = dataclasses.replace(job_at(study / "trials" / "0000", store), mark=str(study / "study.yaml"))
    with pytest.raises(Breakdown) as raised:
        next(train_here(job))
    assert str(raised.value) == (
        f"{study}: there is no study.yaml in it; put the results where {platform.node()} can read them, such as a "
        "shared folder"
    )
    assert not study.exists()


def test_a_hub_that_does_not_answer_is_no_fault_of_the_trial(store, tmp_path, monkeypatch):
    """Its errors are also those of a disk, which may be back for the next attempt."""

    def fit(*_, **__):
        raise WeightsUnavailableError("429 Too Many Requests") from ConnectionError()

    monkeypatch.setattr(job, "fit", fit)
    with pytest.raises(Breakdown, match="429 Too Many Requests; put the weights where "):
        next(train_here(job_at(tmp_path, store)))


def test_a_run_that_is_refused_to_go_on_keeps_its_settings_and_data(store, tmp_path):
    with contextlib.closing(train_here(job_at(tmp_path, store))) as reports:
        next(reports)
    before = {name: (tmp_path / name).read_bytes() for name in (PARAMS, DATA)}
    with pytest.raises(TrialFailed, match="the run there began with"):
        next(train_here(job_at(tmp_path, store, **{"train.seed": 5})))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    longer = job_at(tmp_path, store, **{"train.epochs": 30})
    with contextlib.closing(train_here(longer)) as reports:
        next(reports)
    assert json.loads((tmp_path / PARAMS).read_text())["train.epochs"] == 30


@pytest.mark.parametrize("damage", ["lost", "torn", "wrong"])
@pytest.mark.parametrize("at_uri", [False, True], ids=["folder", "URI"])
def test_the_files_of_a_report_are_whole_before_the_driver_hears_it_again(store, tmp_path, at_uri, damage):
    """The driver may end the trial at this report, and then reads its history."""
    job = job_at(tmp_path / "run", store)
    if at_uri:
        job = dataclasses.replace(job, location=(tmp_path / "place").as_uri())
    with contextlib.closing(train_here(job)) as reports:
        for _ in range(2):
            report = next(reports)
    history = tmp_path / ("place" if at_uri else "run") / HISTORY
    whole = history.read_text()
    first, second = whole.splitlines(keepends=True)
    history.write_text(first + {"lost": "", "torn": second[:20], "wrong": "{}\n"}[damage])
    assert newest_report(job) == report
    assert history.read_text() == whole


def test_a_trial_pushes_nothing_once_another_driver_has_claimed_the_study(store, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    (study / DRIVER).write_text("000001-mine")
    claim = (study.as_uri(), "000001-mine")
    trial = study / "trials" / "0000"
    job = dataclasses.replace(job_at(tmp_path / "a", store), location=trial.as_uri(), claim=claim)
    with contextlib.closing(train_here(Job.from_dict(job.to_dict()))) as reports:
        next(reports)
        (study / DRIVER).write_text("000002-other")
        before = (trial / HISTORY).read_bytes()
        with pytest.raises(Breakdown, match=TAKEN_OVER):
            next(reports)
    assert (trial / HISTORY).read_bytes() == before


def test_what_a_trial_writes_on_leaving_reaches_its_place(store, tmp_path):
    place = tmp_path / "place"
    job = dataclasses.replace(job_at(tmp_path / "a", store), location=place.as_uri())
    with contextlib.closing(train_here(job)) as reports:
        next(reports)
    events = EventAccumulator(str(place))
    events.Reload()
    assert events.Tags()["images"]
