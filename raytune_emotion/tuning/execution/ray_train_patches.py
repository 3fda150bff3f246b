"""Contain all uses of private interfaces of Ray Train, each with its reason.

It is imported only if a trial has several workers. `tests/tuning/execution/test_ray_contract.py` names each use.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.queue import Queue

#: Kinds of messages about the workers: one has the controller's actor, the other the id of the placement group and the
#: ids of the workers' nodes. The messages are plain tuples, so that the process of the queue need not import Ray Train.
CONTROLLER, PLACE = "controller", "place"


@dataclass(frozen=True)
class Controller:
    """Ray Train's controller, which can end the workers."""

    actor: ActorHandle[Any]

    def abort(self, timeout: float) -> None:
        """End the workers at once. The public interface can only wait for their end."""
        # The controller exits during the call, and thus reports that it is done.
        with contextlib.suppress(RayError):
            ray.get(self.actor.abort.remote(), timeout=timeout)


class PlainTrainer(TorchTrainer):
    """A trainer without two helper processes of Ray Train.

    One distributes Ray datasets. The other frees the resources of workers whose driver is gone (ray 54305, 53921,
    58515). It asks the dashboard of the cluster that was started last on this machine. If there is none, it learns
    nothing. If that cluster is another one, it frees the resources of live workers.
    """

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]


@dataclass
class LoopbackConfig(TorchConfig):
    """Let the workers of one machine find each other through a file, and communicate over loopback.

    Otherwise, PyTorch's meeting place listens on every interface of the machine, and anyone can write to it.
    """

    meeting: str = ""  # path of the file, which does not exist yet

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_talk_over_loopback)
        meeting = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": f"file://{backend_config.meeting}",
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **meeting)
                for rank in range(len(worker_group))
            ]
        )


def _talk_over_loopback() -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


class Announcer(ControllerCallback, WorkerGroupCallback):
    """Report, from within Ray Train's controller, what a trial must end or leave: controller, workers, nodes."""

    def __init__(self, messages: Queue) -> None:
        self._messages = messages

    def after_controller_start(self, train_run_context: object) -> None:
        self._messages.put((CONTROLLER, ray.get_runtime_context().current_actor))

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        state = worker_group.get_worker_group_state()
        nodes = {worker.metadata.node_id for worker in state.workers}
        self._messages.put((PLACE, (state.placement_group_handle.placement_group.id.hex(), sorted(nodes))))


class Preparer(WorkerGroupCallback):
    """Call a function in the process of each worker, before Ray Train chooses its GPU, which starts CUDA there."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        worker_group.execute(self._prepare)
