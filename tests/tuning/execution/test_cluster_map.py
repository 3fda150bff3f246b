"""Work on all nodes of a Ray cluster."""

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from raytune_emotion.data.packing.pack import pack, pack_sizes
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.execution import capacity, cluster_nodes
from raytune_emotion.tuning.execution import cluster as cluster_module
from raytune_emotion.tuning.execution import cluster_map as cluster_map_module
from raytune_emotion.tuning.execution.cluster_map import cluster_map
from raytune_emotion.tuning.execution.cluster_nodes import ClusterNode
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
from tests.support.cluster import joined_session
from tests.support.commands import exit_code
from tests.support.faces import write_folder
from tests.support.folders import files_of


def wait_for_cores():
    """Wait until no task runs."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:  # Ray takes its time to tell
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tasks_keep_their_order_and_outlive_their_processes(cluster, tmp_path):
    # Functions in functions are sent as they are: the tasks need not import this module.
    def die_once(number):
        mark = tmp_path / str(number)
        if number == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number, os.getpid()

    def refuse(number):
        raise UserError([f"{number} is wrong", "and so is this"])

    with joined_session(None) as watch, cluster_map(watch) as pmap:
        found = list(pmap(die_once, iter(range(3))))
        assert [number for number, _ in found] == [0, 1, 2]
        assert os.getpid() not in {process for _, process in found}
        with pytest.raises(UserError) as raised:
            list(pmap(refuse, [1, 2, 3]))
    assert raised.value.faults == ("1 is wrong", "and so is this")
    assert (tmp_path / "1").exists()


def test_a_cluster_packs_the_stores_of_one_machine(cluster, faces, tmp_path):
    with joined_session(None) as watch, cluster_map(watch) as pmap:
        pack_sizes(Folder(faces), {size: Folder(tmp_path / f"{size}px") for size in (16, 24)}, pmap=pmap)
    for size in (16, 24):
        alone = pack(faces, tmp_path / f"alone{size}", image_size=size)
        assert files_of(tmp_path / f"{size}px") == files_of(alone.path)


def test_task_of_a_cluster_that_has_died_is_not_waited_for(cluster, tmp_path):
    def hang(number):
        while not (tmp_path / "end").exists():
            time.sleep(0.05)
        (tmp_path / "ended").touch()

    lost: list[str] = []
    try:
        with cluster_map(SimpleNamespace(failure=lambda: "".join(lost), none_free=set)) as pmap:
            results = pmap(hang, [1])
            lost.append("Ray has died")
            with pytest.raises(ClusterLost, match="Ray has died"):
                next(results)
    finally:
        (tmp_path / "end").touch()
    # The folder of a test is deleted when the test ends, and Ray may not have told yet that the task runs.
    while not (tmp_path / "ended").exists():
        time.sleep(0.05)
    wait_for_cores()


def test_pack_whose_cluster_has_died_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster_module, "check_cluster", lambda address: None)
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)

    @contextlib.contextmanager
    def lost_map(watch):
        def pmap(function, tasks):
            raise ClusterLost("Ray has died")

        yield pmap

    monkeypatch.setattr(cluster_map_module, "cluster_map", lost_map)
    folder = write_folder(tmp_path / "faces")
    assert exit_code(["pack", folder, tmp_path / "store", "--address", "auto"]) == 1
    said = "error: Ray has died; the packed images are kept; the same command continues\n"
    assert capsys.readouterr().err.endswith(said)


def test_pack_on_a_cluster_without_cores_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster_module, "check_cluster", lambda address: None)
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    monkeypatch.setattr(cluster_nodes, "list_nodes", lambda: {"head": ClusterNode("head", {"CPU": 0.0})})
    monkeypatch.setattr(cluster_nodes, "has_autoscaler", lambda: False)
    folder = write_folder(tmp_path / "faces")
    assert exit_code(["pack", folder, tmp_path / "store", "--address", "auto"]) == 2
    assert capsys.readouterr().err == (
        "error: the cluster has no core to work on: 1 node with 0 CPU, and no autoscaler; start its worker nodes\n"
    )


def test_tasks_without_a_free_core_are_said_to_wait(cluster, tmp_path, monkeypatch, capsys):
    def wait(number):
        while not (tmp_path / "end").exists():
            time.sleep(0.05)
        return number

    monkeypatch.setattr(capacity, "_WAIT_S", 0.5)
    with cluster_map(SimpleNamespace(failure=lambda: "", none_free=lambda: {"CPU"})) as pmap:
        results = pmap(wait, [1])
        threading.Timer(3, (tmp_path / "end").touch).start()
        assert list(results) == [1]
    assert capsys.readouterr().err == "no result from the cluster for 0 s; all of its cores are in use\n"
    wait_for_cores()


def test_ctrl_c_leaves_no_task_and_what_is_whole(cluster, tmp_path, monkeypatch, capsys):
    folder, dest = write_folder(tmp_path / "faces", train=1600), tmp_path / "out" / "store"
    part = dest.with_name(".store.part")
    address = ray.get_runtime_context().gcs_address
    monkeypatch.setattr(cluster_module, "ray_session", joined_session)
    over = threading.Event()

    def interrupt():
        while not list(part.glob(".train-*.done")):
            if over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        code = exit_code(["pack", folder, dest, "--image-size", "600", "--address", address])
    finally:
        over.set()
        interrupter.join()
    out, err = capsys.readouterr()
    said = "the packed images are kept; the same command continues\ninterrupted\n"
    assert (code, out, err) == (130, "", said)
    assert list(dest.parent.iterdir()) == [part]
    wait_for_cores()
