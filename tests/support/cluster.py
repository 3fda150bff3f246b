"""What tests on a Ray cluster share."""

import contextlib
import time
from types import SimpleNamespace

RUN_SPACE = {
    "model.backbone": "test_vit",
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "loss": {"simplex": ["kl", "js"]},
    "augment.mixup": 0.2,
}


def joined_session(address, **options):
    """Stand in for `ray_session` in a process that has joined a cluster already: Ray can be started only once."""
    return contextlib.nullcontext(SimpleNamespace(failure=lambda: ""))


def held_resources():
    """List what the cluster still holds after five seconds at most: taken cores, and placement groups."""
    import ray

    for _ in range(50):
        groups = [g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        taken = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
        if not taken and not groups:
            break
        time.sleep(0.1)
    return taken, groups
