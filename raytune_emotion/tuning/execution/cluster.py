"""Join or start a Ray cluster."""

import contextlib
import logging
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from raytune_emotion.errors import UserError
from raytune_emotion.interruption import check_interrupted, keep_handlers
from raytune_emotion.known_errors import first_line, known_error
from raytune_emotion.terminal import announce
from raytune_emotion.tuning.execution.cluster_watch import ClusterWatch, watch_cluster
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

#: Ray reads these when it starts, and has no arguments in their place.
_RAY_SETTINGS = {
    # A node that does not answer counts as dead after 40 s, not 70.
    "RAY_health_check_timeout_ms": "5000",
    # Ray would kill this process after 60 s without its head, before a study is concluded.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

_TOKEN_NEEDED = (
    "the cluster asks for a token; export RAY_AUTH_MODE=token, with its token in ~/.ray/auth_token (there "
    "`ray get-auth-token --generate` makes one)"
)


@contextlib.contextmanager
def ray_session(
    address: str | None, *, job: str | None = None, dashboard: bool = True, **local: Any
) -> Iterator[ClusterWatch]:
    """Join the Ray cluster at an address, or start one on this machine, and leave it at the end.

    What this changes in the process is as before when the block ends: environment, logging, warnings, signals.

    Args:
        address: of the cluster; None starts one.
        job: the name that Ray's dashboard shows for this process.
        dashboard: whether a cluster of this machine has a dashboard.
        local: more arguments of `ray.init`, for a cluster of this machine.

    Yields:
        What knows whether the cluster lives.

    Raises:
        UserError: the cluster cannot be joined, or Ray cannot be started on this machine as it is.
    """
    if ray.is_initialized():
        raise UserError("Ray runs in this process already, and a session needs its own; call ray.shutdown() before")
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
            # Said to be local, lest it join a cluster that somebody has left on this machine. Ray itself would count
            # cores that this process may not use, and GPUs that PyTorch cannot.
            room = {"num_cpus": int(node["CPU"]), "num_gpus": int(node["GPU"])}
            arguments = {"address": "local", "include_dashboard": dashboard, **room, **own, **local}
            python = shlex.quote(sys.executable)
            if python != sys.executable:
                # Ray starts workers through a shell, and quotes all but the interpreter (ray 5288, 33047).
                arguments["runtime_env"] = {"py_executable": python}
        if job is not None:
            # The dashboard shows this key as the name of a job; jobs/submit.sh sets it, too.
            arguments["job_config"] = JobConfig(metadata={"job_name": job})
        forget_token()
        stack.enter_context(quiet_errors())
        stack.enter_context(no_start_by_itself())
        stack.callback(_shut_down)
        try:
            with keep_handlers(), no_signal_handlers(), own_process_session(arguments.get("_temp_dir")):
                ray.init(**arguments, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
            check_interrupted()
        except Exception as error:
            _shut_down()
            raise _start_failure(address, error) from error
        yield stack.enter_context(watch_cluster(own=address is None))


@contextlib.contextmanager
def open_session(address: str | None, job: str) -> Iterator[ClusterWatch]:
    """Join or start a Ray cluster as `ray_session` does, and say so."""
    with contextlib.ExitStack() as stack:
        with announce(f"joining the Ray cluster at {address}" if address else "starting Ray"):
            watch = stack.enter_context(ray_session(address, job=job))
        yield watch


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep Ray Tune and Optuna from printing what this project says itself."""
    tune = logging.getLogger("ray.tune")
    levels = tune.level, optuna.logging.get_verbosity()
    # Its warnings are of result files that are not written, and of failed trials, whose reasons are in the tables.
    tune.setLevel(logging.CRITICAL)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Sampling in groups is called experimental since 2021; that it may change is what version pins are for.
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        tune.setLevel(levels[0])
        optuna.logging.set_verbosity(levels[1])


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Undo what the block does to the environment, and have Ray forget what it has read there."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget_token()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _shut_down() -> None:
    # Ray's core gives SIGTERM back to the system when it ends. Seconds follow, in which one would end this process.
    with keep_handlers() as restore, before_processes_end(restore):
        ray.shutdown()


def _start_failure(address: str | None, error: Exception) -> Exception:
    """Return the error to raise where Ray could not be started or joined, whatever it has raised."""
    why = first_line(error)
    if address is None:
        known = known_error(error)
        limits = low_limits()
        sentence = f"Ray cannot be started on this machine: {known[1] if known else why}"
        return UserError(f"{sentence}; {limits}, which may be too few; raise it" if limits else sentence)
    if isinstance(error, AuthenticationError):
        return UserError(f"--address {address}: {_TOKEN_NEEDED}")
    if "Version mismatch" in str(error):
        versions = " ".join(str(error).split())
        return UserError(f"--address {address}: {versions} Use the cluster's versions of Ray and Python here")
    return UserError(f"--address {address}: the Ray cluster there cannot be joined ({why}); look whether it still runs")


_CONNECT_S = 10.0


def check_cluster(address: str | None) -> None:
    """Find out whether a Ray cluster of this version answers at an address, and lets this process in.

    Asked first: Ray itself would try for a quarter of an hour.

    Raises:
        UserError: it does not, or it is the address of Ray's client.
    """
    if address is None:
        return
    if address == "local":
        raise UserError("--address local: names no cluster; leave --address out to start Ray on this machine")
    if "://" in address:
        raise UserError(
            f"--address {address}: a study cannot be run over Ray's client; run it on a machine of the cluster with "
            f"--address auto, or submit it with jobs/submit.sh"
        )
    try:
        found = find_cluster(address)
        if found is None:
            return
        socket.create_connection(found, _CONNECT_S).close()
    except (ValueError, OSError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error}); start one with `ray start --head`, or "
            f"leave --address out to start Ray on this machine"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0":  # else it cannot be asked so simply
        _check_answer(address, *found)


def _check_answer(address: str, host: str, port: int) -> None:
    token = own_token()
    uses_token = os.environ.get("RAY_AUTH_MODE", "token" if address == "auto" and token else "").lower() == "token"
    answer = ask_cluster(host, port, None)
    if answer.asks_for_token:
        if not uses_token or not token:
            raise UserError(f"--address {address}: {_TOKEN_NEEDED}")
        answer = ask_cluster(host, port, token)
        if answer.asks_for_token:
            raise UserError(f"--address {address}: the token at hand is not that of the cluster; {_TOKEN_NEEDED}")
    elif uses_token and not token:
        raise UserError(f"--address {address}: the cluster asks for no token, and there is none; unset RAY_AUTH_MODE")
    if answer.version is None:
        raise UserError(f"--address {address}: what answers there is no Ray cluster ({answer.fault}); name another")
    if answer.version != ray.__version__:
        raise UserError(
            f"--address {address}: the cluster runs Ray {answer.version}, and this is Ray {ray.__version__}; use the "
            f"cluster's version here"
        )
