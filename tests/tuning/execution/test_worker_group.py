import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest

from raytune_emotion.tuning.execution import worker_group
from raytune_emotion.tuning.execution.worker_group import run_in_background


def test_an_action_in_the_background_gives_its_result_or_raises_its_error():
    assert run_in_background(lambda: 3).result(timeout=10) == 3
    with pytest.raises(ZeroDivisionError):
        run_in_background(lambda: 1 / 0).result(timeout=10)


def test_a_process_ends_though_an_action_in_the_background_does_not():
    code = (
        "import time; from raytune_emotion.tuning.execution.worker_group import run_in_background; "
        "run_in_background(lambda: time.sleep(600)); print('end')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "end\n")


def test_workers_wait_for_orders_outside_of_nccl(monkeypatch):
    """NCCL takes a long wait for a hang, and kills the workers. The driver may be busy for hours between two trials."""
    groups, waited = [], []

    def new_group(backend, timeout):
        assert timeout > timedelta(days=1)
        groups.append(backend)
        return backend

    def broadcast(order, group):
        waited.append(group)
        raise InterruptedError("enough is seen")

    monkeypatch.setattr(worker_group.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(worker_group.dist, "new_group", new_group)
    monkeypatch.setattr(worker_group.dist, "broadcast_object_list", broadcast)
    with pytest.raises(InterruptedError):
        worker_group._work({"orders": None, "messages": None})
    assert groups == waited == ["gloo"]
