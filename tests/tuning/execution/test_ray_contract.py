"""Every private interface of Ray that this project uses, by name and signature.

A new version of Ray breaks this test, with a list; `pyproject.toml` keeps it away until somebody has looked.
"""

import importlib
import inspect
from types import SimpleNamespace

import pytest

from tests.support.interfaces import check_interface

#: Where it is, and its parameters where it is called or overridden; None where it is an attribute or a class.
_PRIVATE = {
    # Ray's core.
    "ray._private.services:canonicalize_bootstrap_address": ("addr", "temp_dir"),
    "ray._private.services:extract_ip_port": ("bootstrap_address",),
    "ray._private.services:ConsolePopen": None,
    "ray._private.auto_init_hook:enable_auto_connect": None,
    "ray._private.ray_constants:DEBUG_AUTOSCALING_STATUS": None,
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER": None,
    "ray._private.state:GlobalState.get_draining_nodes": ("self",),
    "ray._private.state:GlobalState._connect_and_get_accessor": ("self",),
    "ray._private.utils:set_sigterm_handler": ("sigterm_handler",),
    "ray._private.worker:_global_node": None,
    "ray._private.worker:print_to_stdstream": ("data", "ignore_prefix"),
    "ray._private.node:Node.raylet_socket_name": None,
    "ray._private.node:Node.kill_all_processes": ("self", "check_alive", "allow_graceful", "wait"),
    "ray._raylet:AuthenticationTokenLoader.instance": None,
    "ray._raylet:Config.initialize": None,
    "ray._raylet:PlacementGroupID.from_hex": None,
    "ray._raylet:AuthenticationTokenLoader.get_raw_token": None,
    "ray.autoscaler.sdk:request_resources": ("num_cpus", "bundles", "bundle_label_selectors"),
    "ray.experimental.internal_kv:_internal_kv_get": ("key", "namespace"),
    "ray.core.generated.gcs_pb2:PlacementGroupTableData": None,
    "ray.core.generated.gcs_service_pb2:CheckAliveRequest": None,
    "ray.core.generated.gcs_service_pb2_grpc:NodeInfoGcsServiceStub": ("channel",),
    # Ray Tune.
    "ray.air.execution._internal.actor_manager:RayActorManager.add_actor": (
        "self", "cls", "kwargs", "resource_request", "on_start", "on_stop", "on_error",
    ),
    "ray.air.execution._internal.actor_manager:RayActorManager._actor_task_failed": (
        "self", "tracked_actor_task", "exception",
    ),
    "ray.tune.execution.tune_controller:RayActorManager": None,
    "ray.tune.execution.tune_controller:_ActorClassCache.get": ("self", "trainable_cls"),
    "ray.tune.execution.tune_controller:TuneController.step": ("self",),
    "ray.tune.execution.tune_controller:TuneController._maybe_cache_trial_actor": ("self", "trial"),
    "ray.tune.execution.tune_controller:TuneController._trial_task_failure": ("self", "trial", "exception"),
    "ray.tune.execution.tune_controller:TuneController._set_trial_status": ("self", "trial", "status"),
    "ray.tune.execution.tune_controller:TuneController._unstage_trial_with_resources": ("self", "trial"),
    "ray.tune.execution.tune_controller:TuneController._schedule_trial_task": (
        "self", "trial", "method_name", "args", "kwargs", "on_result", "on_error", "_return_future",
    ),
    "ray.tune.tune:TuneController": None,
    "ray.tune.experiment.config_parser:_create_trial_from_spec": ("spec", "parser", "trial_kwargs"),
    "ray.tune.experiment.config_parser:_make_parser": ("parser_creator", "kwargs"),
    "ray.tune.progress_reporter:TrialProgressCallback.log_result": ("self", "trial", "result", "error"),
    "ray.tune.progress_reporter:TrialProgressCallback.on_trial_complete": (
        "self", "iteration", "trials", "trial", "info",
    ),
    "ray.tune.search:SearchAlgorithm.set_finished": ("self",),
    "ray.tune.experiment:Trial.set_config": ("self", "config"),
    # Ray Train, for several workers a trial.
    "ray.train.torch.config:_TorchBackend.on_start": ("self", "worker_group", "backend_config"),
    "ray.train.torch.config:_set_torch_distributed_env_vars": (),
    "ray.train.torch.config:_setup_torch_process_group": (
        "backend", "world_rank", "world_size", "init_method", "timeout_s",
    ),
    "ray.train.v2._internal.callbacks.datasets:DatasetsCallback": None,
    "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback": None,
    "ray.train.v2._internal.execution.callback:ControllerCallback.after_controller_start": (
        "self", "train_run_context",
    ),
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.after_worker_group_start": ("self", "worker_group"),
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute": ("self", "fn", "fn_args", "fn_kwargs"),
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.get_worker_group_state": ("self",),
    "ray.train.v2._internal.execution.worker_group.state:WorkerGroupState": (
        "start_time", "placement_group_handle", "workers", "sync_actor",
    ),
    "ray.train.v2._internal.execution.worker_group.worker:ActorMetadata": (
        "hostname", "node_id", "node_ip", "pid", "accelerator_ids",
    ),
    "ray.train.v2._internal.execution.controller:TrainController.abort": ("self",),
    "ray.train.v2.torch.torch_trainer:TorchTrainer._create_default_callbacks": ("self",),
}  # fmt: skip

#: Attributes that `ray_patches` reads or changes of a running `TuneController`, and methods that Tune calls on a trial.
_OF_CONTROLLER = (
    "_trials", "_stopped_trials", "_failed_trials", "_trials_to_cache", "_trial_metadata", "_resetting_trials",
    "_staged_trials", "_class_cache",
)  # fmt: skip


@pytest.mark.parametrize("name", _PRIVATE)
def test_a_private_interface_is_as_it_was(name):
    check_interface(name, _PRIVATE[name])


def test_the_controller_of_trials_has_the_attributes_that_are_used():
    from ray.tune.execution.tune_controller import TuneController

    source = inspect.getsource(TuneController.__init__)
    assert [name for name in _OF_CONTROLLER if f"self.{name}" not in source] == []


def test_tune_calls_of_a_trial_what_the_actor_has():
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    from raytune_emotion.tuning.execution.trial_actor import TrialActor

    source = inspect.getsource(TuneController)
    for method in ("train", "reset", "stop"):
        assert f'"{method}"' in source
        assert callable(getattr(TrialActor, method))
    assert "ray_actor.get_auto_filled_metrics.remote(" in inspect.getsource(Trial.set_ray_actor)


_ESSAY = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file."
)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (f"{_ESSAY} Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, "
         "(2) ray stop --force was called, or (3) the worker crashed unexpectedly.", _ESSAY),
        ("Traceback\nValueError: short", "ValueError: short"),
        (f"Task was killed due to the node {'running low on memory'}. {300 * 'x'}\nTop 10 memory users:\nPID",
         "Task was killed due to the node running low on memory."),
        (300 * "x", 240 * "x" + " …"),
    ],
)  # fmt: skip
def test_the_reason_of_a_death_is_one_line_without_advice(tmp_path, written, reason):
    from raytune_emotion.tuning.execution.ray_tune_patches import newest_error

    (tmp_path / "error.txt").write_text(
        f"Failure # 1 (occurred at noon)\nold\nFailure # 2 (occurred later)\n{written}\n"
    )
    assert newest_error(SimpleNamespace(error_file=str(tmp_path / "error.txt"))) == reason


def test_a_node_without_a_cluster_has_the_address_of_loopback():
    source = inspect.getsource(importlib.import_module("ray._private.services").get_node_ip_address)
    assert "if not ray_constants.ENABLE_RAY_CLUSTER:" in source


def test_what_ray_says_when_memory_is_short_is_known():
    """Without these words a trial that needs too much memory is not tried in smaller micro-batches."""
    import ray.exceptions

    from raytune_emotion.tuning.execution.ray_tune_patches import LOW_MEMORY

    assert LOW_MEMORY == "running low on memory"
    assert issubclass(ray.exceptions.OutOfMemoryError, ray.exceptions.RayError)
