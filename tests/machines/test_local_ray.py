"""Ray on this machine with all its parts: sessions one after the other and at once, and Ray Data.

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
import pandas as pd
import pytest
import ray

from raytune_emotion.data.pictures import PictureFiles
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.predict import predict
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.execution.cluster_predict import predict_on_cluster
from tests.support.exports import untrained_best

pytestmark = pytest.mark.timeout(500)

#: Variables of a session that this process has.
_OF_RAY = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS")


@pytest.fixture
def short():
    """A folder with a short path, for Ray's files."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_sessions_leave_nothing_and_use_the_cores_that_they_may(tmp_path, short):
    """Real Ray, twice in one process that has one core, a home that cannot be written and a long TMPDIR.

    Its dashboard has sockets, which a path as long as this cannot name.
    """
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
    surroundings = {name: value for name, value in os.environ.items() if name not in _OF_RAY}
    surroundings |= {"HOME": str(home), "RAY_TMPDIR": str(short), "TMPDIR": str(long)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=surroundings, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == f"1.0 {short}\n" * 2
    assert list(short.iterdir()) == list(long.iterdir()) == []


def test_searches_run_where_a_notebook_has_its_own_ray(folder, short):
    """One joins its cluster. Two in threads start clusters of their own, and outlive that of the notebook."""
    code = """
        import contextlib, io, threading, time
        from pathlib import Path
        import ray, raytune_emotion
        from ray._private import state

        @ray.remote
        def answer():
            return 42

        def search(results, trials=1, **options):
            given = {"trials": trials, "epochs": 1, "results": results, **options}
            studies.append(raytune_emotion.search("tiny", "tiny.yaml", **given))

        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        jobs, studies, printed = len(state.jobs()), [], io.StringIO()
        with contextlib.redirect_stdout(printed):  # a notebook's stream has no file descriptor, either
            search("joined", trials=2, address="auto")
        assert "exported    joined/" in printed.getvalue()
        assert len(state.jobs()) > jobs
        threads = [threading.Thread(target=search, args=[name]) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        while len([*Path().glob("*/*/study.yaml")]) < 3:
            assert any(thread.is_alive() for thread in threads)
            time.sleep(0.1)
        assert ray.get(answer.remote()) == 42
        ray.shutdown()
        for thread in threads:
            thread.join()
        print(*(len(study.trials) for study in studies))
    """
    surroundings = {name: value for name, value in os.environ.items() if name not in _OF_RAY}
    surroundings |= {"HOME": str(folder), "RAY_TMPDIR": str(short)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 1 1"


def test_searches_begin_at_once_on_a_machine_with_an_odd_name_without_a_network_behind_proxies(folder):
    """Two have the same name, which is refused to one of them."""
    code = """
        import fcntl, socket, struct, subprocess, sys

        with socket.socket() as any_socket:  # bring the loopback interface up: netdevice(7)
            fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x49))
        socket.sethostname("odd_Name.with-dots")
        words = "--data tiny --space tiny.yaml --trials 1 --epochs 1 --results r --name".split()
        command = [sys.executable, "-m", "raytune_emotion.search", *words]
        searches = [subprocess.Popen([*command, name]) for name in ("a", "b", "b")]
        print("codes", *sorted(search.wait() for search in searches))
    """
    namespaces = ["unshare", "--map-root-user", "--net", "--uts"]
    if not shutil.which("unshare") or subprocess.run([*namespaces, "true"], check=False).returncode != 0:
        pytest.skip("this machine permits no namespaces to its users")
    surroundings = {name: value for name, value in os.environ.items() if name not in _OF_RAY}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        surroundings |= {name: "http://127.0.0.1:9", name.upper(): "http://127.0.0.1:9"}
    surroundings |= {"no_proxy": "", "NO_PROXY": ""}
    command = [*namespaces, sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=surroundings, check=False)
    assert done.stdout.splitlines()[-1] == "codes 0 0 2", done.stdout + done.stderr
    (refused,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert refused.startswith("error: r/b: ")
    assert refused.endswith("; choose another name")
    for name in ("a", "b"):
        assert [*pd.read_csv(folder / "r" / name / "trials.csv").status] == ["complete"]


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
