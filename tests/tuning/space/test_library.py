"""Search spaces by name."""

from pathlib import Path

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.tuning.space.library import DEFAULT, find_space, packaged_spaces
from raytune_emotion.tuning.space.parser import load_space


def test_a_space_of_the_package_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(packaged_spaces()) == ["comparison", "demo", "faces", "gpu", "large", "losses", "quick", "vit"]
    assert load_space(find_space(DEFAULT)).parameters
    assert find_space("gpu").name == "gpu.yaml"


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
