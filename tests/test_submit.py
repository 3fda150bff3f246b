"""What jobs/submit.sh refuses by itself; tests/machines has it on a cluster."""

import shutil
import subprocess
from pathlib import Path

import pytest

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
