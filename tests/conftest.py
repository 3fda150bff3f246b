import contextlib
import errno
import fcntl
import gc
import os
import signal
import warnings
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.support.folders import SCRATCH

# What has passed passes again: other examples are tried where they are asked for, by --hypothesis-profile default.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

#: Tests that share what is slow to start or to import run in one process, by parts of their ids.
TOGETHER = {
    "ray": (
        "test_runner.py", "test_remote_study.py", "test_cluster_map.py", "test_cluster_nodes.py",
        "test_worker_group.py", "TestAStudy", "test_more_than_the_cluster_has",
    ),
    "onnx": ("learn/test_graphs.py", "test_model_card.py", "test_combination.py"),
    "postgres": (
        "test_backlog.py", "test_database.py", "study/test_drivers.py", "test_optuna_study.py", "TestBadStorage",
    ),
}  # fmt: skip
#: What takes long comes first, so that two processes are done at the same time.
LONG = ("ray", "onnx", "postgres", "test_loop.py", "test_search.py", "test_distributed.py", "test_finish.py")


def group_of(nodeid):
    """Return the group of a test: all of a group runs in one process. Else the file of the test."""
    groups = (name for name, parts in TOGETHER.items() if any(part in nodeid for part in parts))
    return next(groups, nodeid.partition("::")[0])


def pytest_collection_modifyitems(items):
    def rank(item):
        group = group_of(item.nodeid)
        return next((rank for rank, name in enumerate(LONG) if group.endswith(name)), len(LONG))

    items.sort(key=rank)


class Groups(LoadScopeScheduling):
    def _split_scope(self, nodeid):
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)  # also where xdist is switched off
def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log)


#: What `tmp_path` makes lies there.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SCRATCH))

#: More processes than cores work at once: a thread that waits for another lets others work, and does not spin.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
#: The same for NumPy and SciPy, which read it when they are imported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

#: Of the S3 server of the tests. Processes that tests start inherit them.
os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="wJalrXUtnFEMI")


#: The commit that studies are written with: to ask git for it takes longer than the rest of the writing.
os.environ["RAYTUNE_EMOTION_COMMIT"] = "0" * 40

# A job in the background of a shell ignores SIGINT, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_CLUSTER = contextlib.ExitStack()


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Leave what is imported out of each later collection of garbage: every training ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Packed stores and generated faces of the tests stay among themselves."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A small AffectNetFused folder of generated faces, with a validation set of odd size."""
    from raytune_emotion.data.synthetic import write_sample

    folder = tmp_path_factory.mktemp("faces") / "sample"
    write_sample(folder, train=96, val=33, image_size=32)
    return folder


@pytest.fixture(scope="session")
def store(faces):
    from raytune_emotion.data.prepare import prepare

    return prepare(faces, image_size=32)


@pytest.fixture(autouse=True)
def uris_checked_here(request, monkeypatch):
    """Check URIs in this process, but in the tests of the check and of whole machines."""
    if request.path.parent.name not in ("storage", "machines"):
        from tests.support.uri_checks import IN_THIS_PROCESS

        monkeypatch.setattr("raytune_emotion.storage.remote.subprocess", IN_THIS_PROCESS)


@pytest.fixture
def broken_gpu(monkeypatch):
    """Let this machine have a GPU below a driver that is too old for PyTorch. Return what is said of it."""
    import torch

    from raytune_emotion.tuning.execution import gpu_presence

    def refuse():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by "
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
        )

    def warn_and_deny():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(gpu_presence, "_DEVICES", (Path("/dev/null"),))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", warn_and_deny)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    return (
        "this machine has a GPU, but PyTorch cannot use it (The NVIDIA driver on your system is too old (found version "
        "12020)); install a driver (NVIDIA: 580 or newer) and a build of PyTorch for it, choose another GPU with "
        "CUDA_VISIBLE_DEVICES, or train on cores with --gpus-per-worker 0"
    )


@pytest.fixture
def without_locks(monkeypatch):
    """Let the file system have no locks, such as Lustre that is mounted without flock."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def no_other_studies(monkeypatch, tmp_path):
    """Suggest no study of the working folder, where `make search` may have made one."""
    monkeypatch.setattr("raytune_emotion.storage.nearest.RESULTS", tmp_path / "nothing")


@pytest.fixture
def no_plots(monkeypatch):
    """Draw no PNG files: they take seconds, and are for the tests that look at them."""
    monkeypatch.setattr("raytune_emotion.tuning.report.page.draw_all", lambda *_: ())


@pytest.fixture(scope="module")
def cluster():
    """One local Ray cluster, which the modules of this process share."""
    import ray

    from raytune_emotion.tuning.execution import cluster

    if not ray.is_initialized():
        # Processes that tests start join it, which Ray does on Linux by the address of the machine.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "loopback_alone", contextlib.nullcontext)
            _CLUSTER.enter_context(cluster.ray_session(None, dashboard=False, num_cpus=2))


@pytest.fixture(scope="module")
def no_cluster():
    """End the shared cluster: Ray kills a process whose connection to a cluster it loses, or whose token is changed."""
    _CLUSTER.close()


@pytest.fixture
def without_ray():
    """Let commands run the trials of a study in this process, without Ray."""
    from tests.support.cluster import trials_in_this_process

    with trials_in_this_process():
        yield


@pytest.fixture(scope="module")
def s3():
    """An S3 server: the URI of a bucket on it, and what becomes of its requests."""
    from tests.support.s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def bucket(s3):
    """The URI of a bucket on an S3 server."""
    return s3[0]


@pytest.fixture(scope="module")
def gcs():
    """The URI of a bucket on a GCS server."""
    from tests.support.gcs import gcs_server

    with gcs_server() as uri:
        yield uri


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server."""
    from tests.support.postgres import postgres_server

    with postgres_server() as server:
        yield server


@pytest.fixture
def faults(s3, monkeypatch):
    """What becomes of requests to the S3 server, by a client that tries each twice, one millisecond apart."""
    from raytune_emotion.storage import remote
    from tests.support.s3 import open_with_one_attempt

    monkeypatch.setattr(remote, "_open", open_with_one_attempt)
    monkeypatch.setattr(remote, "_WAITS", (0.001,))
    monkeypatch.setattr(remote, "_OUTAGE_WAITS", ())
    yield s3[1]
    s3[1].reset()


def pytest_sessionfinish():
    _CLUSTER.close()
    gc.unfreeze()  # else some extensions complain, when Python ends, of what was not freed
