"""Studies in which drivers, trial processes, workers and machines die at points that nobody has chosen.

The points are drawn with a seed, 0 or that in CHAOS_SEED; a failure tells it. Not part of `make test`: run them by
`make machines ONLY=chaos`.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from unittest import mock

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from raytune_emotion.learn.run_folder import HISTORY
from raytune_emotion.tuning.execution.cluster import ray_session
from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
from raytune_emotion.tuning.execution.job import Job, train_here
from raytune_emotion.tuning.execution.placement import Demand
from raytune_emotion.tuning.execution.resources import Resources
from raytune_emotion.tuning.execution.runner import StudyRun, run_study
from raytune_emotion.tuning.policy import freeze_thaw, policies
from raytune_emotion.tuning.policy.decisions import FREEZE_THAW
from raytune_emotion.tuning.policy.outlook import STARTUP
from raytune_emotion.tuning.policy.scheduler import Halving, RunToEnd, replay, rungs_of
from raytune_emotion.tuning.policy.trial_attributes import TAKEN_UP
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import load_study
from raytune_emotion.tuning.study.records import read_records
from raytune_emotion.tuning.study.spec import read_spec
from tests.support.cluster import RUN_SPACE, held_resources
from tests.support.commands import heed_ctrl_c
from tests.support.reports import without_clocks
from tests.support.studies import run_here, spec_of

#: Enough for some to be proposed by the model.
TRIALS, EPOCHS, SEED = 7, 3, 3
SPACE = RUN_SPACE | {"data.image_size": 32, "train.epochs": EPOCHS, "train.seed": SEED}
#: For what a study held to be given back.
_PROMISED_S = 5.0
#: Commands start clusters with as many cores as that of the tests, whatever the machine has: with the number of threads
#: a trial's numbers change in their last bits.
_TWO_CORES = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2})}
_RESOURCES = Resources(1, 2.0, 0.0)
#: Ray counts a node as dead after a second and a half without an answer, not after fifteen.
_SOON_DEAD = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@contextlib.contextmanager
def chance():
    seed = int(os.environ.get("CHAOS_SEED", "0"))
    try:
        yield random.Random(seed)
    except BaseException:  # a timeout too
        print(f"CHAOS_SEED={seed} repeats it")
        raise


def begin(folder, store, **changes):
    asked = {"space": SPACE, "trials": TRIALS, "epochs": EPOCHS} | changes
    make_study(folder, spec_of(store, name=folder.name, seed=SEED, **asked))


def go_on(folder, *, workers=1, concurrency=1, watch=lambda event: None):
    """Runs what is left of a study, on the cluster that this process has joined."""
    place = fit_to_cluster(Demand(workers=workers, gpus_per_worker=0.0, concurrency=concurrency))
    run_study(StudyRun(load(folder), place, watch=watch))
    return load(folder).records()


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """The outcome of the study to which nothing happens, not even Ray."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    begin(folder, store)
    return outcome(run_here(load(folder), _RESOURCES))


def outcome(records):
    """All that is in a study but for times."""
    return [(r.trial_id, r.status, r.settings, r.reason, without_clocks(r.reports)) for r in records]


def reports_of(outcome):
    return sum(len(reports) for *_, reports in outcome)


def histories(folder):
    return {file.parent.name: file.read_bytes() for file in sorted(folder.glob(f"trials/*/{HISTORY}"))}


def reported(folder):
    return sum(history.count(b"\n") for history in histories(folder).values())


def await_reports(folder, count, going):
    """Waits until a study has so many reports; `going` is asked meanwhile whether it still can get them."""
    while reported(folder) < count:
        if not going():
            return False
        time.sleep(0.005)
    return True


def check_continued(before, after, records):
    """What was recorded at some time is the beginning of what is recorded now, and no report occurs twice."""
    for record in records:
        assert after[record.trial_id].startswith(before.get(record.trial_id, b"")), record.trial_id
        assert [r["report"] for r in record.reports] == list(range(1, len(record.reports) + 1)), record.trial_id
    assert len({json.dumps(record.settings) for record in records}) == len(records), "a configuration was asked twice"


def ended_trials(folder):
    return {r.trial_id: r.status for r in read_records(folder, load_study(folder)) if r.status != "running"}


class Session:
    """A command with all of its processes: those of its session, and all that were its descendants when last seen."""

    def __init__(self, *arguments, cwd, **environment):
        command = [sys.executable, "-m", *map(str, arguments)]
        self._shared = shared_memory()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_ctrl_c,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()

    def runs(self):
        return self.process.poll() is None

    def output(self):
        """What it has said; waits for its end."""
        return self.process.communicate(timeout=100)

    def family(self):
        found = psutil.Process(self.process.pid).children(recursive=True) if self.runs() else []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
        return set(found)

    def left(self, family, seconds, *, but=()):
        """Names of its processes, and its files in shared memory, that are there after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            self.process.poll()  # lest it count as there until it is asked for
            names = {name_of(process) for process in family | self.family() if process.is_running()} - {"", *but}
            files = shared_memory() - self._shared
            if not (names or files) or time.monotonic() > deadline:
                return sorted(names), sorted(files)
            time.sleep(0.05)


def shared_memory():
    return {file.name for file in Path("/dev/shm").iterdir()}


def name_of(process):
    """A process by its command line; "" for one that has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def trial_processes(root, title="TrialActor"):
    """The processes below another that run trials, or wait for the next one."""
    names = {process: name_of(process) for process in root.children(recursive=True)}
    return [process for process, name in names.items() if name.startswith("ray::") and title in name]


def busy():
    """The processes below this one by their names, but for those that Ray keeps for whatever comes."""
    names = (name_of(process) for process in psutil.Process().children(recursive=True))
    return Counter(name for name in names if name and not name.startswith("ray::IDLE"))


@contextlib.contextmanager
def kills(folder, points, draw):
    """Kills the processes of trials at these numbers of reports; yields a list of those that were killed."""
    over, killed = threading.Event(), []

    def kill_now_and_then(patience):
        for point, polls in zip(points, patience, strict=True):
            if not await_reports(folder, point, lambda: not over.is_set()):
                break
            # Later by some part of an epoch: it may train, write, or be starting again.
            for _ in range(polls):
                over.wait(0.005)
            while not over.is_set() and not (victims := trial_processes(psutil.Process())):
                over.wait(0.005)
            for victim in [] if over.is_set() else victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                    killed.append(victim.pid)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(kill_now_and_then, [draw.randrange(30) for _ in points])
        try:
            yield killed
        finally:
            over.set()
            done.result()


def test_a_search_that_is_killed_and_then_interrupted_ends_as_if_it_had_been_neither(undisturbed, faces, tmp_path):
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE))
    options = ["--data", faces, "--space", "space.yaml", "--name", "study", "--concurrency", 1]
    options += ["--trials", TRIALS, "--epochs", EPOCHS, "--seed", SEED, "--scheduler", "asha"]
    folder = tmp_path / "ray_results" / "study"
    with chance() as draw:
        with Session("raytune_emotion.search", *options, cwd=tmp_path, **_TWO_CORES) as killed:
            assert await_reports(folder, draw.randrange(1, reports_of(undisturbed) - 5), killed.runs), killed.output()
            family = killed.family()
            killed.process.kill()
            # Ray's agents, whose node is gone, try for a minute to say so to the cluster, which is gone too.
            agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
            assert killed.left(family, _PROMISED_S, but=agents) == ([], [])
        at_death, ended_then = histories(folder), ended_trials(folder)
        assert len(ended_then) < TRIALS

        with Session("raytune_emotion.search", "--resume", cwd=tmp_path, **_TWO_CORES) as interrupted:
            points = range(reported(folder) + 1, reports_of(undisturbed) - 1)
            assert await_reports(folder, draw.choice(points), interrupted.runs), interrupted.output()
            family = interrupted.family()
            # As another program does it, or as Ctrl-C in a terminal.
            draw.choice([os.kill, os.killpg])(interrupted.process.pid, signal.SIGINT)
            out, err = interrupted.output()
            assert interrupted.left(family, _PROMISED_S) == ([], [])
            assert (interrupted.process.returncode, err.splitlines()[-1]) == (130, "interrupted"), out + err
            assert "Traceback" not in err
        at_interruption, ended_by_now = histories(folder), ended_trials(folder)
        check_continued(at_death, at_interruption, read_records(folder, load_study(folder)))
        assert ended_by_now.items() >= ended_then.items()
        assert all(at_interruption[trial_id] == at_death[trial_id] for trial_id in ended_then)

        records = run_here(load(folder), _RESOURCES)
        at_end = histories(folder)
        check_continued(at_interruption, at_end, records)
        assert all(at_end[trial_id] == at_interruption[trial_id] for trial_id in ended_by_now)
        assert len(records) == TRIALS
        assert outcome(records) == undisturbed


def test_a_study_whose_trial_processes_are_killed_time_and_again_is_the_same(undisturbed, cluster, store, tmp_path):
    folder = tmp_path / "study"
    begin(folder, store, max_failures=20)
    before, shared = busy(), shared_memory()
    with chance() as draw:
        with kills(folder, sorted(draw.choices(range(reports_of(undisturbed) - 3), k=3)), draw) as killed:
            records = go_on(folder)
        assert len(killed) >= 2
        assert outcome(records) == undisturbed
        check_continued({}, histories(folder), records)
        assert held_resources() == (0.0, [])
        deadline = time.monotonic() + _PROMISED_S
        while (busy() - before or shared_memory() - shared) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not busy() - before
        assert not shared_memory() - shared


def test_a_study_that_pauses_its_trials_is_the_same_though_it_is_interrupted_and_they_are_killed(
    cluster, store, tmp_path, monkeypatch
):
    # Else it would depend on the seconds that an epoch takes here whether a trial is taken up at all.
    monkeypatch.setattr(freeze_thaw, "_TAKE_UP_SHARE", 1e9)
    asked = {"scheduler": FREEZE_THAW, "epochs": 6, "space": SPACE | {"train.epochs": 6}, "max_failures": 20}
    begin(tmp_path / "undisturbed", store, **asked)
    expected = outcome(run_here(load(tmp_path / "undisturbed"), _RESOURCES))
    assert sum(trial.user_attrs.get(TAKEN_UP, 0) for trial in load(tmp_path / "undisturbed").optuna.trials) >= 2

    folder = tmp_path / "study"
    begin(folder, store, **asked)
    with chance() as draw:
        *interruptions, last = sorted(draw.sample(range(1, reports_of(expected) - 2), 3))
        for point in interruptions:
            sent = []

            def interrupt(event, point=point, sent=sent):
                if event.report and reported(folder) >= point and not sent:
                    sent.append(event)
                    os.kill(os.getpid(), signal.SIGINT)

            with pytest.raises(KeyboardInterrupt):
                go_on(folder, watch=interrupt)
        with kills(folder, [max(last, reported(folder))], draw) as killed:
            records = go_on(folder)
        assert killed
        assert outcome(records) == expected
        check_continued({}, histories(folder), records)
        assert held_resources() == (0.0, [])


def test_a_study_goes_on_with_two_workers_a_trial_of_which_one_is_killed(undisturbed, cluster, store, tmp_path):
    folder, trials = tmp_path / "study", STARTUP + 1
    begin(folder, store, trials=trials)
    over = threading.Event()

    def kill_one(point, polls, which):
        await_reports(folder, point, lambda: not over.is_set())
        # It may train, write, wait for the next trial, or be starting still.
        for _ in range(polls):
            over.wait(0.005)
        while not over.is_set():
            if workers := trial_processes(psutil.Process(), "RayTrainWorker"):
                workers[which % len(workers)].kill()
                return True
        return False

    with chance() as draw, ThreadPoolExecutor(1) as pool:
        heard = iter(range(draw.randrange(4), -1, -1))

        def interrupt(event):
            if event.report and next(heard, 1) == 0:
                os.kill(os.getpid(), signal.SIGINT)

        # Two at once, on a core each.
        with pytest.raises(KeyboardInterrupt):
            go_on(folder, concurrency=2, watch=interrupt)
        before, ended_then = histories(folder), ended_trials(folder)
        assert len(ended_then) < trials

        # Then one at a time, on two workers.
        so_far = reported(folder)
        point = draw.randrange(so_far, max(so_far + 1, trials))
        killed = pool.submit(kill_one, point, draw.randrange(30), draw.randrange(2))
        try:
            records = go_on(folder, workers=2)
        finally:
            over.set()
        assert killed.result()
        assert held_resources() == (0.0, [])

        after = histories(folder)
        check_continued(before, after, records)
        assert all(after[trial_id] == before[trial_id] for trial_id in ended_then)
        assert ended_trials(folder).items() >= ended_then.items()
        # Until there is a model of what trials have shown, what is proposed does not depend on who trains it.
        at_random = [settings for _, _, settings, *_ in undisturbed][:STARTUP]
        assert [r.settings for r in records[:STARTUP]] == at_random
        told = load_study(folder).trials
        assert [t.intermediate_values for t in told] == [
            {report["report"]: report["best_val_js"] for report in record.reports} for record in records
        ]
        # A scheduler that was never interrupted stops the same trials, of those that had not ended.
        unended = [
            dataclasses.replace(r, status="running", reports=tuple(x for x in r.reports if not x["finished"]))
            for r in records
        ]
        stopped = replay(Halving(rungs_of(EPOCHS)), unended) - ended_then.keys()
        assert stopped == {r.trial_id for r in records if r.status == "pruned"} - ended_then.keys()
        assert {r.status for r in records} == {"complete", "pruned"}


def test_trials_of_a_machine_that_dies_go_on_elsewhere(store, tmp_path):
    folder = tmp_path / "study"
    # Long enough not to be over by what is still reported while the machine dies.
    begin(folder, store, space=SPACE | {"train.epochs": 40}, trials=3, epochs=40)
    repository = Path(__file__).parents[2]
    with chance() as draw, Session(__name__, folder, draw.randrange(1, 5), cwd=repository, **_SOON_DEAD) as script:
        assert await_reports(folder, 1, script.runs), script.output()
        family = script.family()
        out, err = script.output()
        assert script.process.returncode == 0, err
        told = json.loads(out.splitlines()[-1])
        assert script.left(family, _PROMISED_S) == ([], [])
        assert (told["taken"], told["groups"]) == (0.0, [])

        records = read_records(folder, load_study(folder))
        assert [(r.status, len(r.reports)) for r in records] == [("complete", 40)] * 3
        before = {trial_id: history.encode() for trial_id, history in told["before"].items()}
        check_continued(before, histories(folder), records)
        # The one that was there lost nothing, not even the last bits of its numbers.
        (moved,) = (r for r in records if r.trial_id == told["moved"])
        reports = before[moved.trial_id].count(b"\n")
        assert len(moved.reports) > reports >= 1
        settings = read_spec(folder).settings(moved.settings)
        job = Job("alone", str(tmp_path / "alone"), str(store.path), settings, Resources(1, 1.0, 0.0))
        with contextlib.closing(train_here(job)) as alone:
            assert without_clocks(islice(alone, len(moved.reports))) == without_clocks(moved.reports)


def lose_a_machine(folder, count):
    """Runs a study on a cluster of two nodes, one of which dies at some time after so many reports.

    No trial is stopped, so the one that is lost has always more to do.
    """
    over = threading.Event()
    running = {}  # by process, the trial that has reported and has not ended

    def watch(event):
        if event.status == "running" and event.report:
            running[event.report["pid"]] = event.proposal.trial_id
        elif event.report:
            running.pop(event.report["pid"], None)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    (raylet,) = (psutil.Process(info.process.pid) for info in node.all_processes["raylet"])

    def lose():
        await_reports(folder, count, lambda: not over.is_set())
        while not over.wait(0.005):
            family = raylet.children(recursive=True)
            moved = next((running[process.pid] for process in family if process.pid in running), None)
            if moved:
                trainers = trial_processes(raylet)
                cluster.remove_node(node, allow_graceful=False)
                psutil.wait_procs(trainers)  # each ends as it finds itself alone, and may write a report before
                return moved, histories(folder)
        return None, {}

    try:
        stops_nobody = mock.patch.dict(policies.STOPPING, {"asha": lambda epochs, objective: RunToEnd()})
        with stops_nobody, ray_session(cluster.address), ThreadPoolExecutor(1) as pool:
            lost = pool.submit(lose)
            try:
                go_on(folder, concurrency=2, watch=watch)
            finally:
                over.set()
            moved, before = lost.result()
            while sum(node["Alive"] for node in ray.nodes()) > 1:
                time.sleep(0.1)  # Ray takes its time to give a machine up, with all that it held
            taken, groups = held_resources()
    finally:
        cluster.shutdown()
    texts = {trial_id: history.decode() for trial_id, history in before.items()}
    print(json.dumps({"moved": moved, "before": texts, "taken": taken, "groups": groups}))


if __name__ == "__main__":
    lose_a_machine(Path(sys.argv[1]), int(sys.argv[2]))
