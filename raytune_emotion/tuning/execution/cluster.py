"""Join or start a Ray cluster."""

import contextlib
import logging
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from raytune_emotion.errors import UserError
from raytune_emotion.interruption import check_interrupted, keep_handlers, skip_exit_handlers
from raytune_emotion.known_errors import first_line, known_error
from raytune_emotion.terminal import announce
from raytune_emotion.tuning.execution.cluster_watch import ClusterWatch
from raytune_emotion.tuning.execution.local_ray import local_ray, low_limits
from raytune_emotion.tuning.execution.placement import local_node
from raytune_emotion.tuning.execution.ray_patches import (
    ask_cluster,
    before_processes_end,
    find_cluster,
    forget_token,
    loopback_alone,
    no_signal_handlers,
    no_start_by_itself,
    own_process_session,
    own_token,
    quiet_errors,
)

#: Environment variables that Ray reads when it starts. It has no arguments for them.
_RAY_SETTINGS = {
    # A node that does not answer counts as dead after 40 s instead of 70 s.
    "RAY_health_check_timeout_ms": "5000",
    # With its default, Ray kills this process after 60 s without a head node, before a study is concluded.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Without a limit: `Search` gives Tune no more trials than there is room for.
    "TUNE_MAX_PENDING_TRIALS_PG": str(sys.maxsize),
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

_TOKEN_NEEDED = (
    "the cluster asks for a token; export RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token, "
    "with mode 0600 (`(umask 077; ray get-auth-token --generate)` creates one on the cluster)"
)


@contextlib.contextmanager
def ray_session(
    address: str | None, *, job: str | None = None, dashboard: bool = True, **local: Any
) -> Iterator[ClusterWatch]:
    """Join the Ray cluster at an address, or start one on this machine, and leave it at the end.

    When the block ends, environment, logging, warnings and signal handlers of the process are restored.

    Args:
        address: address of the cluster; None starts one.
        job: name of this process in Ray's dashboard.
        dashboard: whether a cluster of this machine has a dashboard.
        local: further arguments of `ray.init`, for a cluster of this machine.

    Yields:
        A watch that reports whether the cluster is alive.

    Raises:
        UserError: the cluster cannot be joined, or Ray cannot be started on this machine.
    """
    if ray.is_initialized():
        raise UserError("Ray already runs in this process, but a session needs its own; call ray.shutdown() before")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(_own_environment())
        os.environ.update(_RAY_SETTINGS)
        if address:
            arguments: dict[str, Any] = {"address": address}
        else:
            own = stack.enter_context(local_ray())
            stack.enter_context(loopback_alone())
            node = local_node()
            # "local" starts a new cluster; otherwise Ray would join one that already runs here. Ray itself would count
            # cores that this process may not use, and GPUs that PyTorch cannot use.
            room = {"num_cpus": int(node["CPU"]), "num_gpus": int(node["GPU"])}
            arguments = {"address": "local", "include_dashboard": dashboard, **room, **own, **local}
            python = shlex.quote(sys.executable)
            if python != sys.executable:
                # Ray starts workers through a shell, but does not quote the interpreter (ray 5288, 33047).
                arguments["runtime_env"] = {"py_executable": python}
        if job is not None:
            # The dashboard shows this key as the name of a job. jobs/submit.sh sets it, too.
            arguments["job_config"] = JobConfig(metadata={"job_name": job})
        forget_token()
        stack.enter_context(quiet_errors())
        stack.enter_context(no_start_by_itself())
        try:
            with keep_handlers(), no_signal_handlers(), own_process_session(arguments.get("_temp_dir")):
                ray.init(**arguments, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
            check_interrupted()
            watch = ClusterWatch(own=address is None)
        except BaseException as error:
            _shut_down()
            if isinstance(error, Exception):
                raise _start_failure(address, error) from error
            raise
        stack.callback(_leave, watch)
        stack.callback(watch.close)
        yield watch


@contextlib.contextmanager
def open_session(address: str | None, job: str) -> Iterator[ClusterWatch]:
    """Join or start a Ray cluster as `ray_session` does, and say so."""
    with contextlib.ExitStack() as stack:
        with announce(f"joining the Ray cluster at {address}" if address else "starting Ray"):
            watch = stack.enter_context(ray_session(address, job=job))
        yield watch


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence messages of Ray Tune and Optuna that this project prints itself."""
    tune = logging.getLogger("ray.tune")
    levels = tune.level, optuna.logging.get_verbosity()
    # Tune warns about result files that are not written, and about failed trials, whose reasons are in the tables.
    tune.setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Sampling in groups is marked as experimental since 2021. Version pins protect against changes.
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        tune.setLevel(levels[0])
        optuna.logging.set_verbosity(levels[1])


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Restore the environment after the block, and make Ray forget the values that it has read."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget_token()


def _leave(watch: ClusterWatch) -> None:
    """Leave the cluster. If the raylet of a joined cluster is stopped, leave it to the end of this process instead.

    Ray itself would wait for that raylet for minutes, now and in its exit handler.
    """
    if watch.is_own or not watch.is_frozen():
        _shut_down()
    else:
        skip_exit_handlers()


def _shut_down() -> None:
    # When Ray's core ends, it resets the handler of SIGTERM. In the seconds that follow, a SIGTERM would end this
    # process.
    with keep_handlers() as restore, before_processes_end(restore):
        ray.shutdown()


def _start_failure(address: str | None, error: Exception) -> Exception:
    """Return the error to raise after Ray failed to start or to join a cluster."""
    why = first_line(error)
    if address is None:
        known = known_error(error)
        limits = low_limits()
        sentence = f"Ray cannot be started on this machine: {known[1] if known else why}"
        return UserError(f"{sentence}; {limits}, which may be too few; raise the limit" if limits else sentence)
    if isinstance(error, AuthenticationError):
        return UserError(f"--address {address}: {_TOKEN_NEEDED}")
    if "Version mismatch" in str(error):
        versions = " ".join(str(error).split())
        return UserError(f"--address {address}: {versions} Use the cluster's versions of Ray and Python here")
    if "No node info found matching" in str(error.__cause__):
        return UserError(
            f"--address {address}: this machine is no node of that cluster; run the command on one of its nodes, or "
            f"submit a search with jobs/submit.sh"
        )
    return UserError(f"--address {address}: the Ray cluster there cannot be joined ({why}); check that it still runs")


#: Longest wait for a connection to a cluster, seconds.
_CONNECT_S = 10.0


def check_cluster(address: str | None) -> None:
    """Check that a Ray cluster of this version answers at an address, and accepts this process.

    This check comes first, because Ray itself would try for a quarter of an hour.

    Raises:
        UserError: it does not, or the address is one of Ray's client.
    """
    if address is None:
        return
    given = f"--address {address}"
    # Ray itself puts this variable in the place of "auto".
    if address == "auto" and (named := os.environ.get("RAY_ADDRESS")):
        given, address = f"{given} (RAY_ADDRESS={named})", named
    if address == "local":
        raise UserError(f"{given}: does not name a cluster; leave --address out to start Ray on this machine")
    if "://" in address:
        raise UserError(
            f"{given}: a study cannot run through Ray's client; run it on a machine of the cluster with --address "
            f"auto and without RAY_ADDRESS, or submit it with jobs/submit.sh"
        )
    try:
        found = find_cluster(address)
        if found is None:
            return
        socket.create_connection(found, _CONNECT_S).close()
    except (ValueError, OSError) as error:
        raise UserError(
            f"{given}: no Ray cluster answers there ({error}); start one with `ray start --head`, or leave --address "
            f"out to start Ray on this machine"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0":  # with TLS, this simple question does not work
        # Ray offers a token by itself only to a cluster that it has found by itself.
        _check_answer(given, *found, offers_token=address == "auto")


def _check_answer(given: str, host: str, port: int, *, offers_token: bool) -> None:
    token = own_token()
    mode = os.environ.get("RAY_AUTH_MODE", "token" if offers_token and token else "")
    uses_token = mode.lower() == "token"
    answer = ask_cluster(host, port, None)
    if answer.asks_for_token:
        if not uses_token or not token:
            raise UserError(f"{given}: {_TOKEN_NEEDED}")
        answer = ask_cluster(host, port, token)
        if answer.asks_for_token:
            raise UserError(f"{given}: the cluster refuses this machine's token; {_TOKEN_NEEDED}")
    elif uses_token and not token:
        raise UserError(f"{given}: RAY_AUTH_MODE is set, but the cluster needs no token; unset it")
    if answer.version is None:
        raise UserError(f"{given}: no Ray cluster answers there ({answer.fault}); name another address")
    if answer.version != ray.__version__:
        raise UserError(
            f"{given}: the cluster runs Ray {answer.version}, but this is Ray {ray.__version__}; use the "
            f"cluster's version here"
        )
