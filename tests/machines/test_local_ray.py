"""Ray on this machine with all its parts: sessions one after the other, and Ray Data.

Not part of `make test`: run it by `make machines ONLY=local_ray`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import ray

from raytune_emotion.data.pictures import PictureFiles
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.predict import predict
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.execution.cluster_predict import predict_on_cluster
from tests.support.exports import untrained_best


def test_sessions_leave_nothing_and_use_the_cores_that_they_may(tmp_path, request):
    """Real Ray, twice in one process that has one core, a home that cannot be written and a long TMPDIR.

    Its dashboard has sockets, which a path as long as this cannot name.
    """
    short = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    request.addfinalizer(lambda: shutil.rmtree(short))
    home = tmp_path / "home"
    home.touch()  # root may write into any folder, so a file stands for one that cannot be written
    long = tmp_path / ("x" * 60)
    long.mkdir()
    code = """
        import os, re, signal, ray
        from ray._private.node import Node
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from raytune_emotion.tuning.execution.cluster import ray_session

        @ray.remote
        def where():
            return os.environ["RAY_AUTH_TOKEN_PATH"]

        kill, heard = Node.kill_all_processes, []

        def look(*args, **options):
            caught = int(re.search("SigCgt:\\s*(\\w+)", open("/proc/self/status").read())[1], 16)
            heard.append(bool(caught >> signal.SIGTERM - 1 & 1))
            kill(*args, **options)

        Node.kill_all_processes = look
        signal.signal(signal.SIGTERM, lambda *_: None)
        before = dict(os.environ)
        for dashboard in (False, True):
            with ray_session(None, dashboard=dashboard):
                print(ray.cluster_resources()["CPU"], os.path.dirname(os.path.dirname(ray.get(where.remote()))))
        assert dict(os.environ) == before
        assert heard == [True, True], "while Ray ends its processes, the system's own handler would end this one"
    """
    unset = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    surroundings = {name: value for name, value in os.environ.items() if name not in unset}
    surroundings |= {"HOME": str(home), "RAY_TMPDIR": str(short), "TMPDIR": str(long)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=surroundings, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == f"1.0 {short}\n" * 2
    assert list(short.iterdir()) == list(long.iterdir()) == []


def test_cluster_predicts_in_the_same_order_what_this_machine_predicts(cluster, faces, tmp_path, monkeypatch):
    asked, strategy = [], ray.data.ActorPoolStrategy

    def one_actor(**options):
        asked.append(options)
        return strategy(size=1)

    monkeypatch.setattr(ray.data, "ActorPoolStrategy", one_actor)
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    (tmp_path / "bad.jpg").write_text("no picture")
    names = [file.name for file in sorted((faces / "train_set" / "images").iterdir())]
    sources = [
        PictureFiles(Folder(faces / "train_set" / "images"), names),
        PictureFiles(Folder(tmp_path), ["bad.jpg"]),
    ]
    here, there = (
        list(batches)
        for batches in (
            predict(load_package(tmp_path / "best"), sources),
            predict_on_cluster(tmp_path / "best", sources, mirror=False),
        )
    )
    assert asked == [{"min_size": 1, "max_size": 2}]
    assert [name for batch in there for name in batch.names] == [name for batch in here for name in batch.names]
    assert [fault for batch in there for fault in batch.faults] == [
        f"{tmp_path}/bad.jpg: no picture in JPEG, PNG, BMP, GIF or WebP format"
    ]
    found, wanted = (np.concatenate([batch.prob_NK for batch in some if batch.names]) for some in (there, here))
    assert np.abs(found - wanted).max() < 1e-6
