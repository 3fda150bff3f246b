"""What `pip install .` installs: built, installed elsewhere and run from another folder, with nothing fetched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import raytune_emotion

ROOT = Path(raytune_emotion.__file__).parents[1]


def test_every_package_is_named_in_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'^ +"(raytune_emotion[\w.]*)",$', text, re.MULTILINE))
    there = {".".join(file.relative_to(ROOT).parent.parts) for file in (ROOT / "raytune_emotion").rglob("*.py")}
    assert named == {*there, "raytune_emotion.search_spaces"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build writes beside what it builds
    for name in ("raytune_emotion", "search_spaces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("raytune_emotion-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run_installed(installed: Path, elsewhere: Path, *argv: str) -> str:
    surroundings = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *argv]
    done = subprocess.run(command, cwd=elsewhere, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_search_finds_its_default_space(installed, faces, tmp_path):
    where = run_installed(installed, tmp_path, "-c", "import raytune_emotion; print(raytune_emotion.__file__)")
    assert where.strip() == str(installed / "raytune_emotion" / "__init__.py")
    told = run_installed(installed, tmp_path, "-m", "raytune_emotion.search", "--dry-run", "--data", str(faces))
    assert "test_byobnet" in told
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_has_its_files(installed):
    package = installed / "raytune_emotion"
    assert {file.name for file in (ROOT / "search_spaces").glob("*.yaml")} <= {
        file.name for file in (package / "search_spaces").iterdir()
    }
    parts = ("page.html.j2", "page.css", "page.js", "vendor/d3.min.js", "vendor/plot.min.js", "vendor/LICENSE.txt")
    for kept in ("py.typed", "demo.html", "tuning/policy/portfolio.json", *(f"tuning/report/{part}" for part in parts)):
        assert (package / kept).is_file()
