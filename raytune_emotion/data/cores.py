"""Count the cores that this process may use, which may be fewer than those of the machine."""

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Count the cores that this process may use, at least 1.

    The count respects the CPU affinity (`taskset`, Slurm, cpusets) and the CPU quotas of the process's control groups
    (containers, Kubernetes, systemd), version 1 or 2. A fraction of a core is not counted.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on a Mac
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Return the smallest CPU quota of this process's control groups, in cores; None if there is none.

    Args:
        cgroups: folder where the control groups are mounted.
        membership: the file that names the groups of this process.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # not on Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            quotas += [_quota_v2(folder) for folder in _upwards(cgroups, group)]
        elif "cpu" in controllers.split(","):
            mounts = {cgroups / "cpu", cgroups / controllers}
            quotas += [_quota_v1(folder) for mount in mounts for folder in _upwards(mount, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _upwards(mount: Path, group: str) -> list[Path]:
    """List the folders of a group and of the groups above it. In a container only the mount itself may exist."""
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
        )
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
