"""Contain all uses of private interfaces of Ray Train, each with its reason.

It is imported only if a trial has several workers. `tests/tuning/execution/test_ray_contract.py` names each use.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state as ray_state
from ray._raylet import PlacementGroupID
from ray.actor import ActorHandle
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.queue import Queue


@dataclass(frozen=True)
class Controller:
    """Message: Ray Train's controller, which can end the workers, has started."""

    actor: ActorHandle[Any]

    def abort(self, timeout: float) -> None:
        """End the workers at once. The public interface can only wait for their end."""
        # The controller exits during the call, and thus reports that it is done.
        with contextlib.suppress(RayError):
            ray.get(self.actor.abort.remote(), timeout=timeout)


@dataclass(frozen=True)
class ReservedPlaces:
    """Message: the workers have their resources in the cluster."""

    placement_group: str  # its id


class PlainTrainer(TorchTrainer):
    """A trainer without two helper processes of Ray Train.

    One distributes Ray datasets. The other frees the resources of workers whose driver is gone (ray 54305, 53921,
    58515). It asks the dashboard of the cluster that was started last on this machine. If there is none, it learns
    nothing. If that cluster is another one, it frees the resources of live workers.
    """

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]


class Announcer(ControllerCallback, WorkerGroupCallback):
    """Report, from within Ray Train's controller, the controller and the placement group that a trial must end."""

    def __init__(self, messages: Queue) -> None:
        self._messages = messages

    def after_controller_start(self, train_run_context: object) -> None:
        self._messages.put(Controller(ray.get_runtime_context().current_actor))

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._messages.put(ReservedPlaces(group.id.hex()))


def free_abandoned_groups() -> None:
    """Free the resources of workers that were still starting when their driver was killed. Nothing else does it.

    Ray keeps a placement group until the actor that made it and the whole job have ended.
    """
    job = ray.get_runtime_context().get_job_id()
    for entry in ray_state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        # Tune's groups are not made by an actor; Ray reports their actor as dead.
        made_by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        of_this_job = group.creator_job_id.hex() == job
        if made_by_actor and of_this_job and group.creator_actor_dead and group.state != group.REMOVED:
            remove_group(group.placement_group_id.hex())


def remove_group(placement_group: str) -> None:
    """Remove a placement group by its id. Ray's own function accepts only one that this process has made."""
    # Ignore a group of a dead cluster, and one that is already removed.
    with contextlib.suppress(ValueError, RayError):
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(placement_group)))
