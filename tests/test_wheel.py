"""The wheel that `pip install .` builds: unpacked elsewhere and run from another folder, with nothing fetched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

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
    backend = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["build-backend"]
    build = f"import {backend} as backend; backend.build_wheel({str(folder)!r})"  # what pip does
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("raytune_emotion-*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")
    return folder / "site"


def run_installed(installed: Path, elsewhere: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    surroundings = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=elsewhere, env=surroundings, capture_output=True, text=True, check=False)


_DEFAULT_SPACE = """
import raytune_emotion
from raytune_emotion.tuning.space.library import DEFAULT, find_space
from raytune_emotion.tuning.space.parser import load_space
print(raytune_emotion.__file__, *load_space(find_space(DEFAULT)).values_of("model.backbone"))
"""


def test_an_installed_search_finds_its_default_space(installed, tmp_path):
    """`tests/machines/test_installed.py` has a dry run with pip."""
    done = run_installed(installed, tmp_path, "-c", _DEFAULT_SPACE)
    where, *backbones = done.stdout.split()
    assert where == str(installed / "raytune_emotion" / "__init__.py")
    assert "test_byobnet" in backbones
    done = run_installed(installed, tmp_path, "-m", "raytune_emotion.search", "--data", "nowhere")
    said = "reading the search space and the data\nerror: nowhere: no such folder; name an existing one\n"
    assert (done.stderr, done.returncode) == (said, 2), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_has_its_files(installed):
    package = installed / "raytune_emotion"
    modules = {file.relative_to(ROOT) for file in (ROOT / "raytune_emotion").rglob("*.py")}
    assert {file.relative_to(installed) for file in package.rglob("*.py")} == modules
    assert {file.name for file in (ROOT / "search_spaces").glob("*.yaml")} <= {
        file.name for file in (package / "search_spaces").iterdir()
    }
    parts = ("page.html.j2", "page.css", "page.js", "vendor/d3.min.js", "vendor/plot.min.js", "vendor/LICENSE.txt")
    for kept in ("py.typed", "demo.html", "tuning/policy/portfolio.json", *(f"tuning/report/{part}" for part in parts)):
        assert (package / kept).is_file()
