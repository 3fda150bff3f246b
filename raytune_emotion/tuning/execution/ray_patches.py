"""Contain all uses of private interfaces of Ray's core, each with its reason.

`tests/tuning/execution/test_ray_contract.py` names each of them. Those of Ray Tune and of Ray Train are in separate
modules, because their import takes a second.
"""

import contextlib
import dataclasses
import functools
import json
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import ray
import ray._private.worker
from ray._private import auto_init_hook, ray_constants, services, utils
from ray._private.node import Node
from ray._private.state import state
from ray._raylet import AuthenticationTokenLoader, Config, PlacementGroupID  # type: ignore[attr-defined]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get as internal_kv_get
from ray.util.placement_group import PlacementGroup, remove_placement_group

#: Longest wait for an answer of a cluster's head, seconds.
_ANSWER_S = 5.0


def forget_token() -> None:
    """Make Ray read its authentication mode and its token again. It caches both for the whole process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def find_cluster(address: str) -> tuple[str, int] | None:
    """Return the host and port of the cluster of an address such as `auto`; None: the cluster of this process.

    Call it before `ray.init`, which would try for a quarter of an hour.
    """
    found = services.canonicalize_bootstrap_address(address)
    if found is None:
        return None
    host, port = services.extract_ip_port(found)
    return host, int(port)


def draining_nodes() -> set[str]:
    """Return the ids of the draining nodes, which accept no new work, as after `ray drain-node`."""
    return {*state.get_draining_nodes()}


def has_autoscaler() -> bool:
    """Tell whether an autoscaler may add nodes to the joined cluster."""
    if internal_kv_get(b"__autoscaler_v2_enabled", namespace=b"__autoscaler") == b"1":
        return True
    status = internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS.encode())
    # In the first seconds of a cluster, its status has no report.
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    # Without an autoscaler, each node has a type of its own.
    return any(name != f"node_{node}" for node, name in (report.get("node_type_mapping") or {}).items())


@dataclasses.dataclass(frozen=True)
class ClusterAnswer:
    """The answer of a cluster's head to the question whether it is alive."""

    version: str | None  # version of Ray; None: no answer
    asks_for_token: bool = False
    fault: str = ""  # reason why there was no answer


def ask_cluster(host: str, port: int, token: str | None) -> ClusterAnswer:
    """Ask the head of a cluster whether it is alive, by its own protocol. `ray.init` takes half a minute to fail."""
    headers = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        head: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
            reply = head.CheckAlive(request, timeout=_ANSWER_S, metadata=headers)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return ClusterAnswer(None, code is grpc.StatusCode.UNAUTHENTICATED, code.name.lower().replace("_", " "))
    return ClusterAnswer(reply.ray_version)


def own_token() -> str | None:
    """Return the token that Ray would send; None if there is none."""
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    token: str = loader.get_raw_token(ignore_auth_mode=True)
    return token or None


@contextlib.contextmanager
def own_process_session(temporary: str | None) -> Iterator[None]:
    """Start Ray's processes in separate process sessions within the block.

    Otherwise a signal to the process group of a search, as `timeout`, Slurm and systemd send it, would end them before
    the search can end in order. They still end with the process that started them.

    Args:
        temporary: folder for the sockets of Ray's dashboard. Below TMPDIR, the dashboard would not delete them, and
            their path might be too long. None: this process does not start Ray.
    """
    before = services.ConsolePopen

    def start(command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> Any:
        if temporary is not None and any(word.endswith("dashboard/dashboard.py") for word in command):
            env = {**env, "TMPDIR": temporary}
        return before(command, env=env, start_new_session=True, **options)

    setattr(services, "ConsolePopen", start)  # noqa: B010  # mypy takes it for a type
    try:
        yield
    finally:
        setattr(services, "ConsolePopen", before)  # noqa: B010


@contextlib.contextmanager
def no_signal_handlers() -> Iterator[None]:
    """Prevent Ray from handling SIGTERM within the block.

    During its start, which takes seconds, Ray would end this process silently with an exit code of its own.
    """
    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


@contextlib.contextmanager
def loopback_alone() -> Iterator[None]:
    """Make a cluster that is started within the block listen only on the loopback interface.

    Ray does this by default on macOS and Windows. On Linux, it replaces a loopback address by that of the machine, and
    then listens on all interfaces.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def before_processes_end(action: Callable[[], None]) -> Iterator[None]:
    """Within the block, run an action after Ray's core has ended and before Ray's processes are killed."""
    before = Node.kill_all_processes

    @functools.wraps(before)
    def act(*args: Any, **options: Any) -> None:
        action()
        before(*args, **options)

    setattr(Node, "kill_all_processes", act)  # noqa: B010  # mypy takes it for a method
    try:
        yield
    finally:
        setattr(Node, "kill_all_processes", before)  # noqa: B010


@contextlib.contextmanager
def quiet_errors() -> Iterator[None]:
    """Prevent Ray from printing its long, coloured messages about dead processes.

    `ray.init(log_to_driver=False)` does not prevent it. The reasons are in the tables, and in Ray's logs.
    """
    before = ray._private.worker.print_to_stdstream

    @functools.wraps(before)
    def say_nothing(*_: object, **__: object) -> None:
        pass

    ray._private.worker.print_to_stdstream = say_nothing
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = before


@contextlib.contextmanager
def no_start_by_itself() -> Iterator[None]:
    """Prevent Ray from starting a cluster by itself within the block, and also afterwards if the block fails.

    Ray starts one at the first call of its interface. A thread that still waits for a dead cluster would start another
    one, and the process would not end.
    """
    before = auto_init_hook.enable_auto_connect
    auto_init_hook.enable_auto_connect = False
    yield
    auto_init_hook.enable_auto_connect = before


def own_processes() -> dict[str, "subprocess.Popen[bytes]"]:
    """Return the processes of the cluster that this process has started, by their kind."""
    node = ray._private.worker._global_node
    every: dict[str, list[Any]] = {} if node is None else node.all_processes
    return {name: each.process for name, some in every.items() for each in some}


def raylet_pid() -> int | None:
    """Return the process id of the raylet to which this process is connected; None if the system does not tell it."""
    node = ray._private.worker._global_node
    if node is None or not hasattr(socket, "SO_PEERCRED"):
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_S)
        connection.connect(node.raylet_socket_name)
        # The credentials are those of the listening process: unix(7). The id is 0 if it is in another container.
        pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid or None
    return None


def free_abandoned_groups() -> None:
    """Free the places of workers that were still starting when their driver was killed: nobody else knows of them.

    Ray keeps a placement group until the actor that made it and the whole job have ended.
    """
    for group in _groups_of_actors():
        if group.creator_actor_dead:
            remove_group(group.placement_group_id.hex())


def count_waiting_groups() -> int:
    """Count the groups of workers of this job for which the cluster has no room."""
    return sum(group.state in (group.PENDING, group.RESCHEDULING) for group in _groups_of_actors())


def _groups_of_actors() -> Iterator[Any]:
    """Iterate over the placement groups that actors of this job have made; those of Tune are made by no actor."""
    job = ray.get_runtime_context().get_job_id()
    for entry in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        made_by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        if made_by_actor and group.creator_job_id.hex() == job and group.state != group.REMOVED:
            yield group


def remove_group(placement_group: str) -> None:
    """Remove a placement group by its id; Ray's own function takes one that this process has made."""
    # One that is of a cluster that is no more, or is gone already, is none of our concern.
    with contextlib.suppress(ValueError, RayError):
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(placement_group)))
