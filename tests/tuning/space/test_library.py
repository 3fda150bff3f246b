"""Search spaces by name."""

import re
from pathlib import Path

import pytest

import raytune_emotion
from raytune_emotion.config import ModelConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn.origin import licence
from raytune_emotion.storage.yaml_text import load_yaml
from raytune_emotion.tuning.space.library import DEFAULT, find_space, packaged_spaces
from raytune_emotion.tuning.space.parser import load_space

ROOT = Path(raytune_emotion.__file__).parents[1]


def test_a_space_of_the_package_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(packaged_spaces()) == ["comparison", "demo", "faces", "gpu", "large", "losses", "quick", "vit"]
    assert load_space(find_space(DEFAULT)).parameters
    assert find_space("gpu").name == "gpu.yaml"


def test_space_of_face_backbones_names_their_licence_as_the_docs_and_the_model_card_do():
    text = find_space("faces").read_text()
    backbones = load_yaml(text)["model.backbone"]["choice"]
    assert backbones == [
        "hf-hub:gaunernst/vit_small_patch8_gap_112.cosface_ms1mv3",
        "hf-hub:gaunernst/vit_tiny_patch8_112.cosface_ms1mv3",
        "hf-hub:gaunernst/convnext_nano.cosface_ms1mv3",
        "hf-hub:gaunernst/convnext_atto.cosface_ms1mv3",
    ]
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    docs = " ".join((ROOT / "docs" / "search-space.md").read_text().split())
    cards = [licence(ModelConfig(backbone=backbone, pretrained=True), {}) for backbone in backbones]
    assert len({*cards}) == 1
    for told in (comments, docs, cards[0]):
        assert "MS1MV3" in told
        assert "InsightFace" in told
        assert re.search("for non-commercial research only|only for non-commercial research", told)


@pytest.mark.parametrize("text", ["my.yaml", "spaces/my", "./gpu", "gpu"])
def test_a_file_is_taken_as_it_is(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("gpu").touch()
    assert find_space(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus", "--space gpus: no such search space; did you mean gpu?"),
        ("mine", "--space mine: no such search space; choose one of comparison, demo, faces, gpu, "),
        ("search_spaces/gpu.yaml", "--space search_spaces/gpu.yaml: no such file; did you mean "),
    ],
)  # fmt: skip
def test_a_name_that_is_none_is_refused_with_those_that_are(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_space(text)
    assert str(caught.value).startswith(said)
