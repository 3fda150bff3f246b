"""What jobs/submit.sh refuses by itself; tests/machines has it on a cluster."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from raytune_emotion.storage import remote

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["a b", '"}', "-x", ""])
def test_a_name_that_is_none_is_refused_here(name):
    done = subprocess.run(
        ["bash", ROOT / "jobs" / "submit.sh", "--name", name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --name: expected letters, digits and . _ - = , +, got '{name}'\n"


@pytest.mark.parametrize("options", [["--results", "ray_results"], ["--results=./r"], ["--result", "~/r"]])
def test_results_that_would_go_to_the_folder_of_the_job_are_refused(options):
    """Ray deletes it when the job ends."""
    done = subprocess.run(
        ["bash", ROOT / "jobs" / "submit.sh", "--name", "first", *options], capture_output=True, text=True, check=False
    )
    named = options[-1].rpartition("=")[2]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: --results: expected an absolute path that every node sees, or a URI, got '{named}'\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "s3://KEY:hunter2@bucket/faces"],
        ["--results=s3://KEY:hunter2@bucket/results"],
        ["--data", "s3://bucket/faces?region=x&secret_key=hunter2"],
        ["--data", "az://container/faces?Account_Key=hunter2"],
        ["--data", "https://host/faces?sig=hunter2"],
        ["--data", "s3://KEY:hun/ter2@bucket/faces"],
        ["--storage", "postgresql://me:hunter2@db.example/studies"],
        ["--storage=postgresql://db.example/studies?password=hunter2"],
        ["--mlflow", "http://me:hunter2@host:5000"],
        ["--name", "s3://KEY:hunter2@bucket"],
    ],
)
def test_credentials_are_refused_before_ray_keeps_them_and_are_not_repeated(options):
    done = subprocess.run(["bash", ROOT / "jobs" / "submit.sh", *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    before = options[-1].partition("://")[0]
    assert done.stderr.startswith(f"error: {before}://***: contains credentials, which would be written into the log")
    assert done.stderr.count("\n") == 1
    assert "ter2" not in done.stderr


def test_the_script_knows_the_same_secrets_as_the_search():
    assert f"secret='{remote._SECRET.pattern}'\n" in (ROOT / "jobs" / "submit.sh").read_text()


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me@db.example:5432/studies",
        "postgresql://me@db.example:5432/studies?options=a@b",
        "s3://bucket/faces?region=eu-west-1&signal=1&endpoint_override=http://localhost:9000",
        "http://host:5000",
    ],
)
def test_addresses_without_credentials_are_left_to_the_search(uri):
    done = subprocess.run(
        ["bash", ROOT / "jobs" / "submit.sh", "--data", uri, "--name", "a b"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.startswith("error: --name: ")  # it comes next


@pytest.mark.parametrize("options", [["--space", "own.yaml"], ["--space={folder}/own.yaml"], ["--space", "gpu"]])
def test_space_of_ones_own_goes_along(tmp_path, options):
    options = [option.format(folder=tmp_path / "work") for option in options]
    for folder in ("project/raytune_emotion", "project/search_spaces", "programs", "work"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "jobs", tmp_path / "project" / "jobs")
    (tmp_path / "work" / "own.yaml").write_text("optim.lr: 0.001\n")
    ray = tmp_path / "programs" / "ray"
    ray.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "${@: -2}" > ../called\n'
        'while [[ $1 != --working-dir ]]; do shift; done\ncp -r "$2" ../uploaded\n'
    )
    ray.chmod(0o755)
    subprocess.run(
        ["bash", tmp_path / "project" / "jobs" / "submit.sh", "--name", "first", "--results", "/r", *options],
        cwd=tmp_path / "work", env=os.environ | {"PATH": f"{ray.parent}{os.pathsep}{os.environ['PATH']}"}, check=True,
    )  # fmt: skip
    called = " ".join((tmp_path / "called").read_text().split()[-len(options) :])
    if "gpu" in options:
        assert called == "--space gpu"
    else:
        assert called in ("--space space/own.yaml", "--space=space/own.yaml")
        assert (tmp_path / "uploaded" / "space" / "own.yaml").read_text() == "optim.lr: 0.001\n"


def test_missing_ray_is_named(tmp_path):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "dirname").symlink_to(shutil.which("dirname"))
    done = subprocess.run(
        [shutil.which("bash"), tmp_path / "jobs" / "submit.sh", "--name", "first"], env={"PATH": str(programs)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ray: the command is missing; ")
