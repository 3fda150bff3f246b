"""Names of backbones, without timm."""

import subprocess
import sys

import pytest
import timm
from timm.models._registry import _deprecated_models

from raytune_emotion.errors import UserError
from raytune_emotion.learn.backbones import architectures, check_architecture


def test_the_names_are_those_that_timm_takes():
    """A timm that writes its models otherwise breaks this test, in place of refusing a backbone that there is."""
    assert architectures() == {*timm.list_models(), *(name for name in _deprecated_models if "." not in name)}
    assert all(timm.is_model(name) for name in ("resnet18", "test_resnet", "tv_resnet34"))


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "resnet18.no_such_tag", "tv_resnet34"])
def test_a_known_architecture_is_let_pass(name):
    check_architecture(name)


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("vit_base_patch16", "vit_"), ("", "no such")])
def test_an_unknown_architecture_is_refused_with_its_neighbours(name, near):
    with pytest.raises(UserError, match=near):
        check_architecture(name)


def test_a_space_is_checked_without_torch(tmp_path):
    """Else a mistyped space takes seconds to be refused."""
    code = (
        "import sys, raytune_emotion.tuning.space.parser as parser\n"
        "from pathlib import Path; from raytune_emotion.errors import UserError\n"
        "Path(sys.argv[1]).write_text('model.backbone: {choice: [resnet81]}')\n"
        "try: parser.load_space(Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
        "assert not {'torch', 'timm', 'ray', 'pandas'} & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resnet81: no such timm model; did you mean resnet18" in done.stdout
