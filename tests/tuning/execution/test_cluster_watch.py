"""What a watch sees of processes, without Ray."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from raytune_emotion.tuning.execution import cluster_watch
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost, ClusterWatch, iterate_watched


@pytest.fixture
def parts():
    """Two processes in the place of Ray's; the second has an agent, and a child that passes for one that works."""
    worker = "import time; time.sleep(600)"
    raylet = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(['ray::DashboardAgent', '600'], executable='sleep')\n"
        f"subprocess.run([sys.executable, '-c', {worker!r}, 'default_worker.py'])\n"
        "time.sleep(600)\n"  # a raylet outlives those who work
    )
    found = {
        "gcs_server": subprocess.Popen([sys.executable, "-c", worker]),
        "raylet": subprocess.Popen([sys.executable, "-c", raylet]),
    }
    yield found
    for process in found.values():
        children = cluster_watch._children(process.pid)
        process.kill()
        process.wait()
        for child in children:
            subprocess.run(["kill", "-KILL", str(child)], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture
def watch(parts, monkeypatch, request):
    """A watch over them, with a clock that a test moves. Its parameter tells whether this process has started them."""
    clock = SimpleNamespace(now=1000.0, answers=True, alive=True, resources={"CPU": 2.0}, free={"CPU": 2.0})

    def nodes():
        if not clock.answers:
            raise ConnectionError
        return [{"NodeID": "here", "Alive": clock.alive, "Resources": clock.resources}]

    monkeypatch.setattr(cluster_watch, "own_processes", lambda: parts)
    monkeypatch.setattr(cluster_watch, "raylet_pid", lambda: parts["raylet"].pid)
    monkeypatch.setattr(cluster_watch.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(cluster_watch.ray, "nodes", nodes)
    monkeypatch.setattr(cluster_watch.ray, "available_resources", lambda: clock.free)
    monkeypatch.setattr(cluster_watch.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(cluster_watch, "_age_s", lambda pid: 100.0)
    deadline = time.time() + 120
    while len(cluster_watch._children(parts["raylet"].pid)) < 2:
        assert time.time() < deadline
        time.sleep(0.05)
    watch = ClusterWatch(own=getattr(request, "param", True))

    def after(seconds):
        """What the watch says, asked all the time until then."""
        for _ in range(int(seconds)):
            clock.now += 1.0
            if clock.answers:
                watch._answered = clock.now
            if found := watch.failure():
                return found
        return ""

    yield SimpleNamespace(after=after, clock=clock, watch=watch)
    watch._end.set()


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    while not cluster_watch._is_stopped(pid):
        time.sleep(0.01)


def test_a_cluster_that_lives_has_not_failed(watch):
    assert watch.after(200) == ""


@pytest.mark.parametrize(("name", "told"), [("raylet", "node process (raylet)"), ("gcs_server", "head process (gcs_")])
def test_a_part_that_dies_is_named_at_once(watch, parts, name, told):
    parts[name].kill()
    parts[name].wait()
    assert told in watch.after(1)
    assert "has ended (code -9)" in watch.after(1)


@pytest.mark.parametrize(
    ("watch", "name"), [(True, "raylet"), (True, "gcs_server"), (False, "raylet")], indirect=["watch"]
)
def test_a_part_that_was_stopped_is_given_up_after_20_seconds(watch, parts, name):
    stop(parts[name].pid)
    assert watch.after(15) == ""
    assert f"({name}) was stopped for 20 s" in watch.after(15)


def test_a_trial_that_was_stopped_is_ended(watch, parts, capsys):
    (worker,) = filter(cluster_watch._is_worker, cluster_watch._children(parts["raylet"].pid))
    stop(worker)
    assert watch.after(30) == ""
    assert f"process {worker} of a trial was stopped for 20 s" in capsys.readouterr().err
    deadline = time.time() + 120
    while worker in cluster_watch._children(parts["raylet"].pid):
        assert time.time() < deadline, "it is still there"
        time.sleep(0.01)
    assert parts["raylet"].poll() is None


@pytest.mark.parametrize("watch", [False], indirect=True)
def test_processes_of_a_joined_cluster_may_be_of_others_and_are_left_alone(watch, parts, capsys):
    (worker,) = filter(cluster_watch._is_worker, cluster_watch._children(parts["raylet"].pid))
    stop(worker)
    assert watch.after(60) == ""
    assert cluster_watch._is_stopped(worker)
    assert capsys.readouterr().err == ""


def test_an_agent_is_no_process_for_work(watch, parts, capsys):
    agent, worker = sorted(cluster_watch._children(parts["raylet"].pid), key=cluster_watch._is_worker)
    stop(agent)
    assert watch.after(45) == ""
    assert capsys.readouterr().err == "", "it does not train, so it is not ended when it freezes"
    os.kill(worker, signal.SIGKILL)
    while cluster_watch._is_worker(worker):
        time.sleep(0.01)
    assert "started no worker process for 50 s" in watch.after(60)


def test_a_head_that_does_not_answer_is_given_up(watch):
    watch.clock.answers = False
    assert watch.after(35) == ""
    assert "has not answered for 40 s" in watch.after(10)


@pytest.mark.parametrize(
    ("ends", "told"), [(True, "node process (raylet) has ended (code -9)"), (False, "was declared dead")]
)
def test_a_node_that_is_declared_dead_is_given_up_and_a_raylet_that_ends_meanwhile_is_named(
    watch, parts, monkeypatch, ends, told
):
    """A raylet whose agent has died announces the end of its node, and ends a moment later."""
    watch.clock.alive = False

    def wait(seconds):
        if seconds == cluster_watch._LAST_S and ends:
            assert watch.watch.failure() == ""
            parts["raylet"].kill()
            parts["raylet"].wait()
            assert watch.watch.failure()
        return next(ended)

    ended = iter([False, False, True])
    monkeypatch.setattr(watch.watch._end, "wait", wait)
    watch.watch._ask()
    assert told in watch.watch.failure()


@pytest.mark.parametrize(
    ("resources", "free", "expected"),
    [
        ({"CPU": 2.0}, {"CPU": 1.0}, set()),
        ({"CPU": 2.0}, {"CPU": 0.5}, {"CPU"}),
        ({}, {}, {"CPU"}),
        ({"CPU": 2.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 0.75}, {"GPU"}),
        ({"CPU": 2.0, "GPU": 2.0}, {}, {"CPU", "GPU"}),
    ],
)
def test_resources_of_which_none_is_free_are_told(watch, monkeypatch, resources, free, expected):
    watch.clock.resources, watch.clock.free = resources, free
    ends = iter([False, True])
    monkeypatch.setattr(watch.watch._end, "wait", lambda seconds: next(ends))
    watch.watch._ask()
    assert watch.watch.none_free() == expected


def test_a_cluster_that_starts_no_process_is_given_up(watch, monkeypatch):
    monkeypatch.setattr(cluster_watch, "_age_s", lambda pid: 0.5)  # they end as soon as they begin
    assert watch.after(45) == ""
    assert "started no worker process for 50 s" in watch.after(10)


def test_a_kernel_that_lists_no_children_does_not_end_a_search(watch, monkeypatch):
    monkeypatch.setattr(cluster_watch, "_children", lambda pid: [])
    assert cluster_watch._lists_children()
    monkeypatch.setattr(cluster_watch, "_lists_children", lambda: False)
    assert watch.after(100) == ""


def test_a_thread_is_waited_for_until_the_cluster_dies():
    """A signal may reach Ray's processes, too, a moment after this one."""
    waits = []
    ended = SimpleNamespace(is_set=lambda: False, wait=waits.append)
    found = iter(["", "", "Ray has died"])
    cluster_watch.wait_for_end(ended, lambda: next(found))
    assert waits == [cluster_watch._LOOK_S, cluster_watch._LOOK_S, cluster_watch._END_OF_DEAD_S]


def test_the_time_for_which_the_watch_itself_was_stopped_does_not_count(watch, parts):
    watch.clock.answers = False
    assert watch.after(30) == ""
    watch.clock.now += 3600  # Ctrl-Z, or a suspended machine
    assert watch.after(30) == ""


def test_reports_are_heard_from_another_thread_and_a_death_is_raised():
    failure = []
    dead = SimpleNamespace(failure=lambda: failure[0] if failure else "")
    assert list(iterate_watched((i for i in range(3)), dead)) == [0, 1, 2]

    def broken():
        yield 1
        raise ValueError("of the training")

    reports = iterate_watched(broken(), dead)
    assert next(reports) == 1
    with pytest.raises(ValueError, match="of the training"):
        next(reports)

    def frozen():
        yield 1
        time.sleep(30)

    with contextlib.closing(iterate_watched(frozen(), dead)) as reports:
        assert next(reports) == 1
        failure.append("Ray has died")
        with pytest.raises(ClusterLost, match="Ray has died"):
            next(reports)


def test_a_death_is_raised_though_reports_go_on():
    """Workers may train on for a minute below a raylet that is frozen."""
    looks = []

    def failure():
        looks.append("")
        return "frozen" if len(looks) > 3 else ""

    def endless():
        while True:
            yield 1
            time.sleep(0.05)

    reports = iterate_watched(endless(), SimpleNamespace(failure=failure))
    with contextlib.closing(reports), pytest.raises(ClusterLost, match="frozen"):
        assert sum(itertools.islice(reports, 100)) < 100


def test_it_is_told_whether_a_report_has_come(monkeypatch):
    monkeypatch.setattr(cluster_watch, "_LOOK_S", 0.01)
    told, asked = [], threading.Event()

    def late():
        yield 1
        asked.wait(60)
        yield 2

    def look(came):
        told.append(came)
        if told.count(False) == 3:
            asked.set()

    assert [*iterate_watched(late(), SimpleNamespace(failure=lambda: ""), look=look)] == [1, 2]
    assert told.count(True) == 2
    assert told.count(False) >= 3


def test_results_wait_for_their_use(monkeypatch):
    """Else those of a fast cluster fill the memory of a slow reader."""
    made = []

    def results():
        for number in range(1000):
            made.append(number)
            yield number

    watched = iterate_watched(results(), SimpleNamespace(failure=lambda: ""))
    assert [next(watched) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.2)
    assert len(made) < 100
    assert [*watched] == [*range(3, 1000)]
