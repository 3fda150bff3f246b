"""What `pip install .` installs, run from another folder. `tests/test_wheel.py` looks at the same wheel without pip."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import raytune_emotion

ROOT = Path(raytune_emotion.__file__).parents[1]


def test_an_installed_search_runs_dry_from_any_folder(faces, tmp_path):
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    for name in ("raytune_emotion", "search_spaces"):  # a build writes beside what it builds
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *offline, "--target", site, source], check=True)
    elsewhere.mkdir()
    command = [sys.executable, "-m", "raytune_emotion.search", "--dry-run", "--data", faces]
    done = subprocess.run(
        command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "test_byobnet" in done.stdout
    assert list(elsewhere.iterdir()) == []
