"""The files of jobs/, as far as they can be tried without their platforms. For jobs/submit.sh see test_submit.py."""

import argparse
import importlib
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import ray
import ray.scripts.scripts
import tomllib
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job import job_supervisor
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ruamel.yaml import YAML

import raytune_emotion
from raytune_emotion import search
from raytune_emotion.storage.locations import parse_location
from raytune_emotion.tuning.report.ray_metrics import METRICS

ROOT = Path(raytune_emotion.__file__).parents[1]
JOBS = ROOT / "jobs"


def read_yaml(name: str) -> dict:
    return YAML(typ="safe").load((JOBS / name).read_text(encoding="utf-8"))


def parse_search(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    search.add_arguments(parser)
    return parser.parse_args(argv)


def parse_ray(command: str) -> dict:
    """Parse a ray command with Ray's own parser; its options by name."""
    program, verb, *rest = shlex.split(command)
    assert program == "ray"
    return ray.scripts.scripts.cli.commands[verb].make_context(verb, rest).params


def test_every_job_file_is_named_in_the_readme():
    text = (JOBS / "README.md").read_text(encoding="utf-8")
    there = {str(file.relative_to(JOBS)) for file in JOBS.rglob("*") if file.is_file()} - {"README.md"}
    assert [name for name in sorted(there) if f"({name})" not in text] == []
    assert text.count("\n") <= 60


@pytest.mark.parametrize("name", ["autoscale.yaml", "kuberay.yaml", "skypilot.yaml", "slurm.sh"])
def test_files_for_gpus_name_the_oldest_driver(name):
    assert "NVIDIA driver of version 580 or newer" in (JOBS / name).read_text(encoding="utf-8")


# What several of them start: jobs/search_or_resume.sh.


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that stand in for others: each writes its name and arguments into the file `calls`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


def stand_in(programs: Path, name: str, then: str = "") -> None:
    calls = programs.parent / "calls"
    text = f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> {shlex.quote(str(calls))}\n{then}\n'
    (programs / name).write_text(text)
    (programs / name).chmod(0o755)


def calls_in(folder: Path, start: str) -> list[str]:
    calls = folder / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line for line in lines if line.startswith(start)]


#: A python that records a search, and runs the little programs of the scripts.
PYTHON = f'[[ $1 == -m ]] || exec {shlex.quote(sys.executable)} "$@"'


def search_or_resume(programs: Path, *argv: str) -> subprocess.CompletedProcess:
    stand_in(programs, "python", PYTHON + "\nexit 3")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", JOBS / "search_or_resume.sh", *argv], cwd=ROOT, env=os.environ | {"PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["folder", "file", "s3"])
def test_search_is_resumed_where_its_study_exists(programs, tmp_path, request, place):
    results = {"folder": str, "file": Path.as_uri, "s3": lambda _: request.getfixturevalue("bucket")}[place](tmp_path)
    study, argv = parse_location(results) / "first", ["--results", results, "--name=first", "--trials", "3"]
    assert search_or_resume(programs, *argv).returncode == 3  # that of the search
    # What comes before the spec is of a search that broke off before there was a study.
    for name in ("driver", "study.yaml"):
        with study.write(name) as path:
            path.touch()
        search_or_resume(programs, *argv)
    started = f"python -m raytune_emotion.search {' '.join(argv)}"
    assert [call.rstrip() for call in calls_in(tmp_path, "python -m")] == [started, started, f"{started} --resume"]


@pytest.mark.parametrize("argv", [["--name", "first"], ["--results", "r"], []])
def test_search_that_could_not_be_resumed_is_refused(programs, tmp_path, argv):
    done = search_or_resume(programs, *argv)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --results and --name: ")
    assert calls_in(tmp_path, "python") == []


def test_study_that_cannot_be_looked_for_is_no_new_one(programs, tmp_path):
    """The search would refuse the name of a study that exists."""
    done = search_or_resume(programs, "--results", str(tmp_path), "--name", "x" * 300)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*File name too long.*\n", done.stderr)
    assert calls_in(tmp_path, "python -m") == []


# jobs/slurm.sh: Slurm, Ray and the search are stand-ins.


class SlurmJob:
    """A running jobs/slurm.sh on three nodes."""

    def __init__(
        self,
        programs: Path,
        folder: Path,
        *,
        last: str,
        ray_start: str = "sleep 99 & wait",
        ray_status: str = "exit 0",
        ray_end: str = "",
        number: str = "4711",
        array: str = "",
    ) -> None:
        self.folder = folder
        stand_in(programs, "scontrol", "[[ $1 != show ]] || printf 'node1\\nnode2\\nnode3\\n'")
        stand_in(programs, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
        # `trap`: what it has started ends with it, as with Ray.
        ends = f"trap 'kill $(jobs -p); {ray_end or ':'}; exit' TERM"
        stand_in(programs, "ray", f"[[ $1 == start ]] || {ray_status}\n{ends}\n{ray_start}")
        a_search = f'[[ $1 == -m ]] || {{ [[ $1 == - ]] && exit 0; exec {shlex.quote(sys.executable)} "$@"; }}\n{last}'
        stand_in(programs, "python", a_search)
        (folder / "project").mkdir(exist_ok=True)
        shutil.copytree(JOBS, folder / "project" / "jobs", dirs_exist_ok=True)
        surroundings = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": number,
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(folder / "project"),
        }
        if array:
            surroundings["SLURM_ARRAY_JOB_ID"], surroundings["SLURM_ARRAY_TASK_ID"] = array.split("_")
        self.process = subprocess.Popen(
            ["bash", JOBS / "slurm.sh", "--results", str(folder / "results"), "--name", "first"],
            env=os.environ | surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def await_search(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / "runs").exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the search does not start"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def start_job(programs: Path, tmp_path: Path) -> Iterator:
    started = []

    def start(**options: str) -> SlurmJob:
        (tmp_path / "runs").unlink(missing_ok=True)
        started.append(SlurmJob(programs, tmp_path, **options))
        return started[-1]

    yield start
    for job in started:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.communicate()


def long_search(folder: Path) -> str:
    """A search that runs until a SIGTERM, and then ends as a search does."""
    return f"trap 'exit 130' TERM\ntouch {shlex.quote(str(folder / 'runs'))}\nwhile :; do sleep 0.02; done"


def test_slurm_job_starts_ray_on_all_nodes_and_runs_the_search(start_job, tmp_path):
    # Ray starts in the background: the search may be the first to be heard of.
    both_called = f'(($(grep -c "^ray start" {shlex.quote(str(tmp_path / "calls"))}) == 2))'
    code, errors = start_job(last=f"until {both_called}; do sleep 0.02; done\nexit 7").end()
    assert (code, errors) == (7, "")  # that of the search

    head, *others = sorted(calls_in(tmp_path, "ray start"), key=lambda call: "--head" not in call)
    first = parse_ray(head)
    address = f"{first['node_ip_address']}:{first['port']}"
    assert (first["head"], first["block"], first["num_cpus"]) == (True, True, 8)
    (other,) = map(parse_ray, others)  # once, by srun on two nodes
    assert (other["address"], other["head"], other["num_cpus"]) == (address, False, 8)
    step, *_ = calls_in(tmp_path, "srun")
    assert {"--nodes=2", "--ntasks=2", "--exclude=node1", "--cpus-per-task=8"} < {*step.split()}

    (called,) = calls_in(tmp_path, "python -m")
    asked = parse_search(shlex.split(called)[3:])
    assert (asked.address, asked.name, asked.resume) == (address, "first", False)
    assert calls_in(tmp_path, "scontrol requeue") == []


def test_slurm_job_stops_before_its_time_limit_and_continues_when_requeued(start_job, tmp_path):
    job = start_job(last=long_search(tmp_path))
    job.await_search()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 130
    assert calls_in(tmp_path, "scontrol requeue") == ["scontrol requeue 4711"]

    (tmp_path / "results" / "first").mkdir(parents=True)
    (tmp_path / "results" / "first" / "study.yaml").touch()
    assert start_job(last="exit 0").end()[0] == 0
    first, second = calls_in(tmp_path, "python -m")
    assert second == f"{first} --resume".replace("  ", " ")


def test_slurm_requeues_one_task_of_an_array(start_job, tmp_path):
    """The last task has the id of the whole array as its own: the other tasks would start again with it."""
    job = start_job(last=long_search(tmp_path), array="4711_4")
    job.await_search()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 130
    assert calls_in(tmp_path, "scontrol requeue") == ["scontrol requeue 4711_4"]


def test_slurm_job_that_a_user_stops_is_not_requeued(start_job, tmp_path):
    job = start_job(last=long_search(tmp_path))
    job.await_search()
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 130
    assert calls_in(tmp_path, "scontrol requeue") == []


def test_slurm_job_removes_the_folder_of_ray_on_its_nodes(start_job, tmp_path):
    number = f"4711{os.getpid()}"
    files = Path(f"/tmp/ray-{number}")
    # Ray may write until it has ended.
    job = start_job(last=long_search(tmp_path), number=number, ray_end=f"sleep 0.5; mkdir -p {files}")
    job.await_search()
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 130
    assert not files.exists()
    # After the requeue Slurm starts no step.
    *_, step, requeued = [call for call in calls_in(tmp_path, "s") if "show hostnames" not in call]
    assert step.startswith("srun --nodes=2 --ntasks=2 ")
    assert step.endswith(f" rm -rf {files}")
    assert requeued == f"scontrol requeue {number}"


def test_slurm_job_says_that_ray_does_not_start(start_job, tmp_path):
    code, errors = start_job(ray_start="exit 1", ray_status="exit 1", last="exit 0").end()
    assert code == 1
    assert re.fullmatch(r"error: Ray does not start on \S+; its reason is above\n", errors)
    assert calls_in(tmp_path, "python -m") == []


def test_slurm_asks_for_the_signal_that_the_script_handles():
    text = (JOBS / "slurm.sh").read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    name, seconds = re.fullmatch(r"B:(\w+)@(\d+)", directives["signal"]).groups()
    assert f"' {name}\n" in text  # a trap
    assert int(seconds) >= 120
    assert directives.keys() >= {"requeue", "nodes", "time"}
    # With it Slurm would remove the first node, which runs this script, and keep the job.
    assert "no-kill" not in directives
    assert directives["ntasks-per-node"] == "1"


# Kubernetes, with the schema of the operator.


@pytest.fixture(scope="module")
def ray_job() -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "support" / "ray_job_schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def test_operator_takes_the_ray_job(ray_job):
    job = read_yaml("kuberay.yaml")
    ray_job.validate(job)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        parse_ray("ray start " + " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items()))
    workers = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert workers["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1


def test_search_has_the_time_of_its_pod_to_end_in_order():
    """By default Ray kills a job after three seconds, and `ray start --block` ends after half a minute."""
    pod = read_yaml("kuberay.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    times = {each["name"]: int(each["value"]) for each in pod["containers"][0]["env"]}
    assert all(60 <= seconds < pod["terminationGracePeriodSeconds"] for seconds in times.values())
    readers = {"RAY_JOB_STOP_WAIT_TIME_S": job_supervisor, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": ray_constants}
    assert times.keys() == readers.keys()
    for name, reader in readers.items():
        assert f'"{name}"' in inspect.getsource(reader)


def test_operator_refuses_a_mistyped_name_and_a_wrong_value(ray_job):
    job = read_yaml("kuberay.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    cluster["workerGroupSpec"] = []
    cluster["authOptions"]["mode"] = "password"
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resources"]["limits"]["memory"] = "much"
    assert {error.json_path.rpartition(".")[2] for error in ray_job.iter_errors(job)} == {
        "rayClusterSpec", "mode", "memory"
    }  # fmt: skip


def test_ray_job_runs_a_search_that_can_be_resumed():
    entrypoint = read_yaml("kuberay.yaml")["spec"]["entrypoint"]
    assert not re.search(r"[\"'$\\]", entrypoint)
    program, script, *argv = shlex.split(entrypoint)
    assert (program, script) == ("bash", "/opt/raytune-emotion/jobs/search_or_resume.sh")
    asked = parse_search(argv)
    mounts = "/shared/"
    assert (asked.address, asked.name) == ("auto", "affectnet")
    assert str(asked.results).startswith(mounts)
    assert str(asked.data).startswith(mounts)


# Ray's cluster launcher.


@pytest.fixture
def launched() -> dict:
    """jobs/autoscale.yaml as Ray's cluster launcher completes it."""
    logging.disable()
    try:
        config = prepare_config(read_yaml("autoscale.yaml"))
        validate_config(config)
    finally:
        logging.disable(logging.NOTSET)
    return config


def test_launcher_takes_the_cluster(launched):
    head, worker = (launched["available_node_types"][name] for name in ("head", "worker"))
    assert launched["head_node_type"] == "head"
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert (head["resources"], worker["resources"]["GPU"]) == ({"CPU": 0}, 1)
    assert 0 == worker["min_workers"] < worker["max_workers"] == launched["max_workers"]
    assert launched["setup_commands"] == []  # not those of Ray, which install another version


def test_launcher_refuses_a_mistyped_name():
    config = read_yaml("autoscale.yaml")
    config["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match=r"'max_worker' was unexpected"):
        validate_config(config)


def test_launched_nodes_start_ray_with_a_token(launched):
    (head,), (worker,) = (
        [command.partition("; ")[2] for command in launched[f"{kind}_start_ray_commands"] if "ray start" in command]
        for kind in ("head", "worker")
    )
    first, other = parse_ray(head), parse_ray(worker)
    assert (first["head"], first["dashboard_host"]) == (True, "127.0.0.1")
    assert other["address"] == f"$RAY_HEAD_IP:{first['port']}"
    assert launched["docker"]["run_options"] == ["--env RAY_AUTH_MODE=token"]
    # Ray adds --runtime=nvidia, which gives GPUs only to images that ask for them by NVIDIA_VISIBLE_DEVICES.
    assert launched["docker"]["worker_run_options"] == ["--gpus all"]
    assert "~/.ray/auth_token" in launched["file_mounts"]


# SkyPilot. Its names: https://docs.skypilot.co/en/latest/reference/yaml-spec.html


def check_names(value: object, form: object, where: str = "") -> None:
    """Check that a tree has no names but those of its form, and values of its types."""
    if not isinstance(form, dict):
        assert isinstance(value, form), where
        return
    assert isinstance(value, dict), where
    for name, below in value.items():
        assert name in form, f"{where}.{name}"
        check_names(below, form[name], f"{where}.{name}")


def test_skypilot_task_has_the_names_of_its_kind():
    task = read_yaml("skypilot.yaml")
    recovery = {"strategy": str, "max_restarts_on_errors": int}
    resources = {"accelerators": str, "use_spot": bool, "disk_size": int, "job_recovery": recovery}
    envs = {"NAME": str, "SPACE": str, "DATA": type(None), "RESULTS": type(None)}
    form = {"name": str, "resources": resources, "workdir": str, "envs": envs, "setup": str, "run": str}
    check_names(task, form)
    assert task.keys() == form.keys()
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0  # by default the first error ends the job
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_skypilot_task_runs_a_search_that_can_be_resumed(programs, tmp_path):
    task = read_yaml("skypilot.yaml")
    stand_in(programs, "python", PYTHON)
    envs = {name: value or f"s3://bucket/{name.lower()}" for name, value in task["envs"].items()}
    envs["RESULTS"] = str(tmp_path / "results")
    surroundings = os.environ | envs | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shutil.copytree(JOBS, tmp_path / "workdir" / "jobs")
    subprocess.run(["bash", "-e", "-c", task["run"]], cwd=tmp_path / "workdir", env=surroundings, check=True)
    (called,) = calls_in(tmp_path, "python -m")
    asked = parse_search(shlex.split(called)[3:])
    assert (str(asked.data), asked.name, asked.address) == ("s3://bucket/data", "affectnet", None)


# The image.


def instructions() -> list[tuple[str, list[str]]]:
    text = (JOBS / "Containerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split()[1:]) for line in lines if line.strip()]


def test_image_copies_what_exists_and_what_pip_needs():
    sources = [name for word, rest in instructions() if word == "COPY" for name in rest[:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    needed |= {name.partition("/")[0] for name in project["tool"]["setuptools"]["package-dir"].values()}
    assert {*needed, "raytune_emotion"} <= {*sources}


def test_image_uses_options_that_exist():
    words = [word for word, _ in instructions()]
    assert words[0] == "FROM"
    assert {*words} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    commands = [part.split() for word, rest in instructions() if word == "RUN" for part in " ".join(rest).split(" && ")]
    known = {"apt-get": {"--yes", "--no-install-recommends"}, "useradd": {"--create-home", "--uid"}, "rm": {"-rf"}}
    for program, *rest in commands:
        options = {word for word in rest if word.startswith("-")}
        if program == "pip":
            create = importlib.import_module("pip._internal.commands").create_command
            create(rest[0]).parser.parse_args(rest[1:])
        else:
            assert options <= known[program], program


def test_image_has_what_the_other_jobs_run():
    folder = next(rest[0] for word, rest in instructions() if word == "WORKDIR")
    assert f"{folder}/jobs/search_or_resume.sh" in read_yaml("kuberay.yaml")["spec"]["entrypoint"]
    assert ("COPY", ["jobs/search_or_resume.sh", "jobs/"]) in instructions()
    users = ("Containerfile", "kuberay.yaml", "autoscale.yaml", "README.md")
    images = set(re.findall(r"registry\.example/[\w/.:-]+", "".join((JOBS / name).read_text() for name in users)))
    assert images == {f"registry.example/raytune-emotion:{raytune_emotion.__version__}"}


# Monitoring.


def test_prometheus_reads_the_list_of_nodes_that_ray_writes():
    config = read_yaml("monitoring/prometheus.yml")
    (scrape,) = config["scrape_configs"]
    folder, name = os.path.split(scrape["file_sd_configs"][0]["files"][0])
    assert folder == ray._common.utils.get_default_ray_temp_dir()
    assert name == ray._private.ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE


def test_dashboard_shows_metrics_that_ray_has():
    dashboard = json.loads((JOBS / "monitoring" / "grafana.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    # Ray's nodes export some; its processes others, which stand in the queries of Ray's own dashboard.
    known = {f"ray_{name}" for name in METRICS_GAUGES}
    known |= set(re.findall(r"\bray_\w+", Path(default_dashboard_panels.__file__).read_text()))
    own = {f"ray_{name}" for name in METRICS}
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert all(re.search(r"\bray_\w+", query) for query in queries)
    assert asked - known == own, "the metrics of a study are all shown"
    labels = {
        (query["expr"], label)
        for panel in panels
        for query in panel["targets"]
        for label in re.findall(r"{{(\w+)}}", query["legendFormat"])
    }
    of_studies = {(f"ray_{name}", tag) for name, (_, tags) in METRICS.items() for tag in tags}
    assert {(expr, label) for expr, label in labels if expr in own} == of_studies
    sources = {panel["datasource"]["uid"] for panel in panels}
    assert sources == {f"${{{variable['name']}}}" for variable in dashboard["templating"]["list"]}
