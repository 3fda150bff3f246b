import dataclasses
import multiprocessing
import queue
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import ray
import torch
import torch.distributed as dist

from raytune_emotion.data.store import open_store
from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.device import reduce_fragmentation
from raytune_emotion.tuning.execution import job as job_module
from raytune_emotion.tuning.execution import worker_group
from raytune_emotion.tuning.execution.job import InvalidForRun, Job, OutOfMemory, WorkersDied, train_here
from raytune_emotion.tuning.execution.ray_patches import (
    _groups_of_actors,
    count_waiting_groups,
    free_abandoned_groups,
    remove_group,
)
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.worker_group import PLACEMENT_GROUP, release_workers, run_in_background
from tests.support.cluster import held_resources
from tests.support.reports import make_report, without_clocks


def test_an_action_in_the_background_gives_its_result_or_raises_its_error():
    assert run_in_background(lambda: 3).result(timeout=60) == 3
    with pytest.raises(ZeroDivisionError):
        run_in_background(lambda: 1 / 0).result(timeout=60)


def test_one_worker_trains_as_a_process_of_its_own(tmp_path, store, monkeypatch):
    """As the final fit of a study does on a cluster with one GPU."""
    settings = {"data.image_size": 32, "model.backbone": "test_resnet", "train.epochs": 1}
    job = Job("a", str(tmp_path / "a"), str(store.path), settings, Resources(1, 1.0, 0.0))
    orders, messages = queue.SimpleQueue(), queue.SimpleQueue()
    for order in (job.to_dict(), worker_group._GO_ON):
        orders.put(order)

    def no_more_orders():
        if orders.empty():
            raise InterruptedError("enough is seen")
        return orders.get_nowait()

    monkeypatch.setattr(worker_group.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(worker_group, "get_device", lambda: torch.device("cpu"))
    dist.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    try:
        with pytest.raises(InterruptedError):
            worker_group._work({"orders": SimpleNamespace(get=no_more_orders), "messages": messages})
    finally:
        dist.destroy_process_group()
    (kind, together), last = messages.get_nowait(), messages.get_nowait()
    assert (kind, last) == (worker_group._REPORT, (worker_group._DONE, None))
    alone = list(train_here(dataclasses.replace(job, folder=str(tmp_path / "b"))))
    assert without_clocks([together]) == without_clocks(alone)


def test_deaths_of_workers_are_counted_anew_after_each_report(monkeypatch):
    begun, reports = [], []

    class DyingWorkers:
        def __init__(self, first, while_waiting):
            begun.append(first)

        def train(self, job):
            if len(begun) <= 3:
                yield {"report": len(begun)}
            raise worker_group.train.WorkerGroupError("rank 0: …\nand so on", {0: OSError("the actor died\nat 3")})

        def close(self):
            pass

    monkeypatch.setattr(worker_group, "Workers", DyingWorkers)
    monkeypatch.setattr(worker_group, "MAX_FAILURES", 1)
    why = r"^its workers died 2 times without a new report \(OSError: the actor died\)$"
    with pytest.raises(WorkersDied, match=why):
        reports.extend(worker_group.train_together(None))
    assert reports == [{"report": 1}, {"report": 2}, {"report": 3}]
    assert len(begun) == 4


def test_workers_wait_for_orders_outside_of_nccl(monkeypatch):
    """NCCL takes a long wait for a hang, and kills the workers. The driver may be busy for hours between two trials."""
    groups, waited = [], []

    def new_group(backend, timeout):
        assert timeout > timedelta(days=1)
        groups.append(backend)
        return backend

    def broadcast(tensor, src, group):
        waited.append(group)
        raise InterruptedError("enough is seen")

    monkeypatch.setattr(worker_group.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(worker_group.dist, "new_group", new_group)
    monkeypatch.setattr(worker_group.dist, "broadcast", broadcast)
    with pytest.raises(InterruptedError):
        worker_group._work({"orders": None, "messages": None})
    assert groups == waited == ["gloo"]


def test_workers_are_prepared_before_ray_train_starts_cuda_in_them(monkeypatch):
    """Later, it would not matter how the memory of a GPU is to be mapped."""
    made, executed = [], []

    def trainer(**options):
        made.append(options["run_config"].callbacks)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(worker_group, "Queue", lambda **_: SimpleNamespace(put=lambda _: None))
    monkeypatch.setattr(worker_group, "PlainTrainer", trainer)
    monkeypatch.setattr(worker_group, "live_nodes", dict)
    worker_group.Workers(Job("a", "a", "s", {}, Resources(2, 1.0, 0.0)))._ending.close()
    member = SimpleNamespace(metadata=SimpleNamespace(node_id="0"))
    place = SimpleNamespace(placement_group=SimpleNamespace(id=b""))
    state = SimpleNamespace(workers=[member], placement_group_handle=place)
    for callback in made[0]:
        callback.after_worker_group_start(
            SimpleNamespace(execute=executed.append, get_worker_group_state=lambda: state)
        )
    assert executed == [reduce_fragmentation]


def _hear(rank, meeting, results):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    order = {"name": "öffnen", "settings": {"optim.lr": 0.1 + 0.2, "train.balance": True, "loss.kl": None}}
    heard = worker_group._broadcast(order if rank == 0 else None, dist.group.WORLD, first=rank == 0)
    results.put(heard == order)
    dist.destroy_process_group()


def test_an_order_arrives_whole_at_all_workers(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    others = [context.Process(target=_hear, args=(rank, tmp_path / "meeting", results)) for rank in (0, 1)]
    for process in others:
        process.start()
    for process in others:
        process.join(120)
    assert [process.exitcode for process in others] == [0, 0]
    assert [results.get(), results.get()] == [True, True]


#: Longest wait within a step here, seconds.
_SHORT_S = 2.0


def _work_with_slow_data(rank, folder, job, results):
    """Work as one of two workers. The second one fetches its data for longer than a collective of training waits."""

    def fetch(address):
        time.sleep(3 * _SHORT_S * rank)
        return open_store(address)

    def train_a_step(*_):
        dist.all_reduce(torch.ones(1))
        yield make_report(1, 0.5)

    orders = iter([job.to_dict(), worker_group._STOP, {}])
    job_module.open_store, job_module._fit = fetch, train_a_step
    worker_group.train.get_context = lambda: SimpleNamespace(get_world_rank=lambda: rank)
    worker_group.get_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=_SHORT_S))
    with pytest.raises(KeyError):  # the last order is none
        worker_group._work({"orders": SimpleNamespace(get=lambda: next(orders)), "messages": results})
    dist.destroy_process_group()


def test_workers_wait_for_one_whose_data_take_longer_than_a_step_may(tmp_path, store):
    """One node may have the data in its cache, while another one fetches tens of GB."""
    settings = {"data.image_size": 32, "model.backbone": "test_resnet", "train.epochs": 1}
    job = Job("a", str(tmp_path / "a"), str(store.path), settings, Resources(2, 1.0, 0.0))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_work_with_slow_data, args=(rank, tmp_path, job, results)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [results.get(timeout=60)[0] for _ in range(2)] == [worker_group._REPORT, worker_group._DONE]


@pytest.mark.parametrize("error", [InvalidForRun(("one", "two")), OutOfMemory("too large"), Breakdown("no room")])
def test_an_error_of_a_worker_arrives_as_it_was(monkeypatch, error):
    def fail(*_, **__):
        raise error
        yield

    messages = queue.SimpleQueue()
    monkeypatch.setattr(worker_group.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(worker_group.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(worker_group, "_broadcast", lambda value, group, first: value)
    monkeypatch.setattr(worker_group, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker_group, "train_on", fail)
    job = Job("a", "a", "s", {}, Resources(2, 1.0, 0.0))
    with pytest.raises(type(error)):
        worker_group._work({"orders": SimpleNamespace(get=job.to_dict), "messages": messages})
    workers = object.__new__(worker_group.Workers)
    workers._messages = SimpleNamespace(get=lambda timeout: messages.get_nowait())
    with pytest.raises(type(error)) as raised:
        workers._receive(job)
    assert raised.value.args == error.args
    assert vars(raised.value) == vars(error)


def start_driver():
    """Start an actor that reserves places on the cluster as the controller of Ray Train does."""

    # A class in a function is sent as it is: its process need not import this module.
    @ray.remote(num_cpus=0)
    class Driver:
        def reserve(self, cores):
            group = ray.util.placement_group([{"CPU": cores}])
            return group.id.hex()

    return Driver.remote()


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_groups_of_workers_that_wait_for_room_are_counted_until_they_are_freed(cluster):
    driver = start_driver()
    waits, placed = ray.get([driver.reserve.remote(64), driver.reserve.remote(1)])
    wait_until(lambda: count_waiting_groups() == 1)
    for group in (waits, placed):
        remove_group(group)
    assert count_waiting_groups() == 0
    assert held_resources() == (0.0, [])


def test_the_places_of_a_killed_driver_are_freed_and_those_of_a_live_one_are_not(cluster, tmp_path):
    driver = start_driver()
    noted, placed, waits = ray.get([driver.reserve.remote(cores) for cores in (1, 1, 64)])

    def reserved():
        return {group.placement_group_id.hex() for group in _groups_of_actors()}

    free_abandoned_groups()
    release_workers(tmp_path)  # no trial has noted a group here
    assert reserved() == {noted, placed, waits}
    (tmp_path / PLACEMENT_GROUP).write_text(noted)
    release_workers(tmp_path)
    assert reserved() == {placed, waits}
    assert not (tmp_path / PLACEMENT_GROUP).exists()
    release_workers(tmp_path)

    ray.kill(driver)
    wait_until(lambda: all(group.creator_actor_dead for group in _groups_of_actors()))
    assert reserved() == {placed, waits}, "Ray keeps them until the whole job has ended"
    free_abandoned_groups()
    assert held_resources() == (0.0, [])
