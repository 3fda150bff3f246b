"""What answers at the address of a cluster, and how this process joins or starts one."""

import contextlib
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray
from ray._private import auto_init_hook
from ray._private.node import Node
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RaySystemError

from raytune_emotion.errors import UserError
from raytune_emotion.interruption import handle_signals
from raytune_emotion.tuning.execution import ray_patches
from raytune_emotion.tuning.execution.cluster import check_cluster, ray_session
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost

TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_token(no_cluster, monkeypatch, tmp_path):
    """This user has no token, unless a test gives one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    ray_patches.forget_token()


@contextlib.contextmanager
def head(*, token: str | None = None, version: str = ray.__version__):
    """The part of a cluster's head that is asked whether it lives."""

    class Service(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request, context):  # noqa: N802
            offered = dict(context.invocation_metadata()).get("authorization")
            if token is not None and offered != f"Bearer {token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: it is missing or incorrect")
            return gcs_service_pb2.CheckAliveReply(ray_version=version)

    server = grpc.server(ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("0.0.0.0:0")  # Ray takes 127.0.0.1 for the address of the node
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def refusal(address: str, variable: str = "") -> str:
    with pytest.raises(UserError) as caught:
        check_cluster(address)
    (told,) = caught.value.faults
    prefix = f"--address {address}{variable and f' (RAY_ADDRESS={variable})'}: "
    assert told.startswith(prefix)
    return told.removeprefix(prefix)


def test_a_cluster_that_lets_this_process_in_is_no_error(monkeypatch):
    check_cluster(None)
    with head() as address:
        check_cluster(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with head(token=TOKEN) as address:
        check_cluster(address)


def test_a_cluster_that_asks_for_a_token_says_how_to_offer_it(monkeypatch):
    with head(token=TOKEN) as address:
        assert refusal(address).startswith(
            "the cluster asks for a token; export RAY_AUTH_MODE=token, and put the cluster's token into"
        )
        # Ray offers a token to an address only when it is told to.
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        assert refusal(address).startswith(
            "the cluster asks for a token; export RAY_AUTH_MODE=token, and put the cluster's token into"
        )
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        check_cluster(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
        assert refusal(address).startswith("the cluster refuses this machine's token; ")


def test_a_cluster_that_the_environment_names_is_checked_as_one_that_is_typed(monkeypatch):
    """Ray puts RAY_ADDRESS in the place of `auto`, and then offers no token by itself."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with head(token=TOKEN) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert refusal("auto", address).startswith("the cluster asks for a token; export RAY_AUTH_MODE=token, and put")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        check_cluster("auto")
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")
        check_cluster(address)  # one that is typed wins
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    assert refusal("auto", "ray://10.0.0.1:10001").startswith("a study cannot run through Ray's client; run it on a ")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert refusal("auto", "local").startswith("does not name a cluster; ")


def test_a_token_that_is_asked_for_here_alone_is_said(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with head() as address:
        assert refusal(address) == "RAY_AUTH_MODE is set, but the cluster needs no token; unset it"


def test_a_cluster_of_another_version_is_refused_with_both():
    with head(version="2.48.0") as address:
        assert refusal(address) == (
            f"the cluster runs Ray 2.48.0, but this is Ray {ray.__version__}; use the cluster's version here"
        )


def test_what_answers_and_is_no_cluster_is_refused(monkeypatch):
    with monkeypatch.context() as patched, socket.create_server(("0.0.0.0", 0)) as listener:
        patched.setattr(ray_patches, "_ANSWER_S", 0.3)  # it never answers
        assert refusal(f"127.0.0.1:{listener.getsockname()[1]}").startswith("no Ray cluster answers there (")
    monkeypatch.setattr(ray_patches, "_ANSWER_S", 60.0)
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")  # Ray takes 127.0.0.1 for the address of the node
    server.start()
    try:
        assert refusal(f"127.0.0.1:{port}") == "no Ray cluster answers there (unimplemented); name another address"
    finally:
        server.stop(None)


def test_this_machine_is_no_address_of_a_cluster():
    assert refusal("local") == "does not name a cluster; leave --address out to start Ray on this machine"


def test_sigterm_while_ray_starts_interrupts_as_at_any_other_time(monkeypatch):
    """Ray handles it by itself then, if it may: it ends the process by a code of its own, without a word."""
    monkeypatch.setattr(Node, "start_head_processes", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with handle_signals(), pytest.raises(KeyboardInterrupt), ray_session(None):
        pass


def test_a_thread_that_outlives_its_cluster_starts_no_other(monkeypatch):
    """Else the process of a search whose cluster has died starts Ray again, and does not end."""
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(ray, "init", lambda: pytest.fail("a cluster is started"))
    with contextlib.suppress(ClusterLost), ray_patches.no_start_by_itself():
        raise ClusterLost("the raylet has ended")
    with pytest.raises(RaySystemError, match="Ray has not been started"):
        ray.get(ray.ObjectRef.nil())
    with ray_patches.no_start_by_itself():
        pass
    assert auto_init_hook.enable_auto_connect is False
