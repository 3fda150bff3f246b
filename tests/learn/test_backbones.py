"""Names of backbones, without timm."""

import subprocess
import sys

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.learn.backbones import check_architecture, short_name


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "resnet18.no_such_tag", "tv_resnet34"])
def test_a_known_architecture_is_let_pass(name):
    check_architecture(name)


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("vit_base_patch16", "vit_"), ("", "no such")])
def test_an_unknown_architecture_is_refused_with_its_neighbours(name, near):
    with pytest.raises(UserError, match=near):
        check_architecture(name)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf-hub:owner/face", "face"),
        ("hf-hub:owner/face@refs/pr/1", "face"),
        ("hf-hub:owner/face@0123abc", "face"),
        ("local-dir:/home/us@here/face@2/", "face@2"),
    ],
)
def test_a_short_name_is_that_of_the_model(name, short):
    assert short_name(name) == short


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
