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
