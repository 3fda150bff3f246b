"""What `pip install .` installs: built, unpacked elsewhere and imported in another folder, with nothing fetched."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
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
    """The folder that the wheel is unpacked in, as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build writes beside what it builds
    for name in ("raytune_emotion", "search_spaces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "-w", folder, source], check=True)
    (wheel,) = folder.glob("raytune_emotion-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_an_installed_package_finds_its_default_space(installed, tmp_path):
    code = (
        "import raytune_emotion\n"
        "from raytune_emotion.tuning.space.library import DEFAULT, find_space\n"
        "from raytune_emotion.tuning.space.parser import load_space\n"
        "print(raytune_emotion.__file__, *load_space(find_space(DEFAULT)).values_of('model.backbone'))"
    )
    surroundings = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where, *backbones = done.stdout.split()
    assert where == str(installed / "raytune_emotion" / "__init__.py")
    assert "test_byobnet" in backbones


def test_an_installed_package_has_its_files(installed):
    package = installed / "raytune_emotion"
    assert {file.name for file in (ROOT / "search_spaces").glob("*.yaml")} <= {
        file.name for file in (package / "search_spaces").iterdir()
    }
    parts = ("page.html.j2", "page.css", "page.js", "vendor/d3.min.js", "vendor/plot.min.js", "vendor/LICENSE.txt")
    for kept in ("py.typed", "demo.html", "tuning/policy/portfolio.json", *(f"tuning/report/{part}" for part in parts)):
        assert (package / kept).is_file()
