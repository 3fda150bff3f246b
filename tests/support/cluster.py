"""What tests on a Ray cluster share."""

import contextlib
import functools
import time
from types import SimpleNamespace

import pytest

RUN_SPACE = {
    "model.backbone": "test_vit",
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "loss": {"simplex": ["kl", "js"]},
    "augment.mixup": 0.2,
}


def joined_session(address, **options):
    """Stand in for `ray_session` in a process that has joined a cluster already: Ray can be started only once."""
    return contextlib.nullcontext(SimpleNamespace(failure=lambda: "", none_free=set))


class DyingWorkers:
    """Stand in for `worker_group.Workers` whose processes die before their first report."""

    def __init__(self, first, while_waiting):
        pass

    def train(self, job):
        from ray.train import WorkerGroupError

        raise WorkerGroupError("of rank 0", {0: OSError("the actor died\nwith code 9")})
        yield

    def close(self):
        pass


@contextlib.contextmanager
def trials_in_this_process():
    """Let commands run the trials of a study in this process, one after the other, as on a cluster with two cores."""
    from raytune_emotion.tuning.execution import cluster, cluster_nodes, placement
    from raytune_emotion.tuning.session import console_run
    from tests.support.studies import run_here

    def run_study(run):
        run_here(run.study, run.placement.resources, run.watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "ray_session", joined_session)
        patch.setattr(cluster_nodes, "fit_to_cluster", functools.partial(placement.fit, [{"CPU": 2.0}], "the cluster"))
        patch.setattr(console_run, "study_metrics", lambda progress: contextlib.nullcontext())
        patch.setattr(console_run, "run_study", run_study)
        yield


def held_resources():
    """List what the cluster still holds after a minute at most: taken cores, and placement groups."""
    import ray

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        groups = [g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        taken = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
        if not taken and not groups:
            break
        time.sleep(0.1)
    return taken, groups
