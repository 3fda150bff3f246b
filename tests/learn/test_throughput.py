import io
import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn import throughput
from raytune_emotion.learn.device import allowance
from raytune_emotion.learn.throughput import COUNTS, Process, best_count, common_rate, fitting_counts, measure

CPU = torch.device("cpu")
GIB = 2.0**30

counts = st.sets(st.sampled_from(COUNTS)).map(sorted)
rates_of_one = counts.flatmap(lambda some: st.fixed_dictionaries({count: st.floats(1, 1e6) for count in some}))


def seconds(rates, count):
    """To train an image of each."""
    return sum(1 / of_one[count] for of_one in rates)


@given(rates=st.lists(rates_of_one, min_size=1, max_size=4))
def test_the_best_count_fits_all_and_is_the_least_of_those_that_are_nearly_fastest(rates):
    fitting = [count for count in COUNTS if all(count in of_one for of_one in rates)]
    best = best_count(rates)
    if not fitting:
        assert best == 1
        return
    assert best in fitting
    fastest = min(seconds(rates, count) for count in fitting)
    assert seconds(rates, best) <= fastest / 0.949
    assert all(seconds(rates, count) > fastest / 0.951 for count in fitting if count < best)
    # In whatever unit.
    assert best_count([{count: rate * 1024 for count, rate in of_one.items()} for of_one in rates]) == best


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ([{1: 100.0, 2: 180.0, 4: 300.0, 8: 310.0}], 4),
        ([{1: 100.0, 2: 103.0, 4: 104.0}], 1),
        # The slow one takes nearly all of the time, and gains nothing.
        ([{1: 10_000.0, 2: 20_000.0}, {1: 100.0, 2: 99.0}], 1),
        ([{1: 100.0, 2: 180.0, 4: 300.0}, {1: 100.0, 2: 190.0}], 2),
        ([{1: 100.0, 2: 180.0}, {}], 1),
    ],
)
def test_best_counts(rates, best):
    assert best_count(rates) == best


@pytest.mark.parametrize(
    ("courses", "rate"),
    [
        ([[(5.0, 0), (6.0, 30), (7.0, 50)]], 25.0),
        # The second one is alone after the end of the first, and then twice as fast.
        ([[(0.0, 0), (2.0, 200)], [(0.0, 0), (2.0, 200), (3.0, 400)]], 200.0),
        # The first one is alone at first. The end of the second is within a report's training of the first.
        ([[(0.0, 0), (1.0, 200), (3.0, 400)], [(1.0, 0), (2.0, 100)]], 200.0),
        ([[(0.0, 0), (1.0, 100)], [(2.0, 0), (3.0, 100)]], None),
    ],
)
def test_images_count_while_all_processes_train(courses, rate):
    assert common_rate(courses) == rate


def test_a_course_has_the_images_of_every_quarter_of_a_second(store, monkeypatch):
    """However many steps these are, alone or beside others."""
    clock, steps = [0.0], []
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def train_segment(run, history):
        steps.append(run.plan.stops[0])
        clock[0] += 0.0625 * steps[-1]

    settings = {"data.image_size": 32, "train.batch_size": 8, "loss.kl": 1.0, "model.backbone": "test_resnet"}
    run, _ = throughput._prepare(settings, str(store.path), CPU)
    monkeypatch.setattr(throughput, "train_segment", train_segment)
    run = throughput._with_first_report_after(run, 2)
    course = throughput._train(run, seconds=0.5, threads=1, share=1.0, resident=True)
    assert steps == [2, 4, 4]
    assert course == [(0.0, 0), (0.125, 16), (0.375, 48), (0.625, 80)]


@given(total=st.floats(GIB, 200 * GIB), count=st.integers(1, 64))
def test_trials_that_share_a_device_have_room_together(total, count):
    each = allowance(total, 1 / count)
    assert 0 <= each <= total
    assert count * each <= total * (1 + 1e-9)
    assert allowance(total, 2.0) == total


def test_what_fits():
    assert fitting_counts(COUNTS, peak=9 * GIB, images=0, total=80 * GIB) == [1, 2, 4, 8]
    assert fitting_counts(COUNTS, peak=10 * GIB, images=0, total=80 * GIB) == [1, 2, 4]
    assert fitting_counts(COUNTS, peak=math.inf, images=0, total=80 * GIB) == []
    # Images that live on the device need room beside; of eight they stay in their files.
    assert fitting_counts(COUNTS, peak=9 * GIB, images=7 * GIB, total=80 * GIB) == [1, 2, 4, 8]
    assert fitting_counts(COUNTS, peak=13 * GIB, images=7 * GIB, total=80 * GIB) == [1, 2]


@pytest.mark.long
def test_several_trials_are_timed_at_the_same_time(store, monkeypatch):
    """One of them in a process of its own, as all are, and one in this: to import PyTorch takes seconds."""
    starts = iter((Process, Here))
    monkeypatch.setattr(throughput, "Process", lambda device: next(starts)(device))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    settings = {"data.image_size": 32, "train.batch_size": 32, "loss.kl": 1.0, "optim.lr": 100.0}
    tried = {name: {**settings, "model.backbone": name} for name in ("test_vit", "test_resnet")}
    found = measure(tried, {32: str(store.path)}, CPU, cores=2, counts=(1, 2), seconds=0.5)
    assert list(found) == [*tried]
    for rates in found.values():
        assert list(rates) == [1, 2]
        assert all(10 < rate < 1e6 for rate in rates.values())


def test_what_is_tried_out_takes_the_memory_of_a_trial(store, monkeypatch):
    """It has evaluated before its peak is read, and trains within the share of the device that a trial would have."""
    did = []
    for name in ("evaluate", "train_segment"):
        real = getattr(throughput, name)
        monkeypatch.setattr(
            throughput, name, lambda *a, name=name, real=real, **k: (did.append(name), real(*a, **k))[1]
        )
    monkeypatch.setattr(throughput, "limit_memory", lambda device, share: did.append(share))
    settings = {"data.image_size": 32, "train.batch_size": 96, "loss.kl": 1.0, "model.backbone": "test_resnet"}
    # More evaluations than its few rows have steps: none of them is timed. And the head alone takes less memory.
    more = {"train.evals_per_epoch": 8, "model.freeze_epochs": 1}
    run, (_, images, total) = throughput._prepare({**settings, **more}, str(store.path), CPU)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert did[0] == "evaluate"
    assert (images, total) == (129 * 32 * 32 * 3, math.inf)
    did.clear()
    throughput._train(run, seconds=0.0, threads=1, share=0.25, resident=True)
    assert did == [0.25]


class Here:
    """Does in this process what a process of its own would."""

    def __init__(self, device):
        self.end = lambda: None

    def begin(self, settings, store):
        self._run, self._answer = throughput._prepare(settings, store, CPU)

    def train(self, **order):
        self._answer = throughput._train(self._run, **order)

    def rest(self):
        self._answer = None

    def answer(self):
        return self._answer


class Full(Here):
    """Has a device with too little memory."""

    def begin(self, settings, store):
        self._answer = None


@pytest.mark.parametrize(
    ("kinds", "fitting"),
    [([Here, Full], [1]), ([Full, Here], []), ([Here, Full, Here], [1, 2]), ([Here] * 3, [1, 2, 3])],
)
def test_measure_leaves_out_counts_for_which_a_process_has_too_little_memory(store, monkeypatch, kinds, fitting):
    starts = iter(kinds)
    monkeypatch.setattr(throughput, "Process", lambda device: next(starts)(device))
    monkeypatch.setattr(throughput, "common_rate", lambda courses: 1.0)  # here one trains after the other
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    settings = {"data.image_size": 32, "train.batch_size": 32, "loss.kl": 1.0, "model.backbone": "test_vit"}
    found = measure(
        {"test_vit": settings}, {32: str(store.path)}, CPU, cores=2, counts=range(1, len(kinds) + 1), seconds=0.1
    )
    assert list(found["test_vit"]) == fitting


def test_a_process_whose_device_has_too_little_memory_says_so_and_hears_the_next_order(monkeypatch, capsys, store):
    def begin(*args):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(throughput, "_begin", begin)
    # It would set these for this process.
    monkeypatch.setattr(throughput.malloc, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(throughput, "reduce_fragmentation", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    order = {"settings": {"data.image_size": 32, "loss.kl": 1.0}, "store": str(store.path)}
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(order)}\n{{}}\n"))
    throughput._serve(CPU)
    assert capsys.readouterr().out == "null\nnull\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows on machines without a GPU what is not called")
def test_a_process_that_has_not_trained_rests_without_a_context_on_the_gpu():
    throughput._release(torch.device("cuda"))
    assert not torch.cuda.is_initialized()


def test_a_process_that_hangs_is_told_of(monkeypatch):
    monkeypatch.setattr(throughput, "_ANSWER_S", 0.1)
    process = Process(CPU)
    with pytest.raises(Breakdown, match=r"gave no answer for 0\.1 s"):
        process.answer()  # to no order
    process.end()


def test_a_process_that_has_ended_is_told_of():
    process = Process(CPU)
    process._popen.kill()
    process._popen.wait()
    process.rest()
    with pytest.raises(Breakdown, match="ended with code -9"):
        process.answer()
    process.end()
