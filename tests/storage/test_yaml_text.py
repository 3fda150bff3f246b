import sys
from pathlib import Path

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.storage.yaml_text import load_yaml, read_text
from tests.support.yaml import BOMB


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]"], ids=["bomb", "endless"])
def test_yaml_that_grows_without_end_is_refused(text, pure):
    with pytest.raises(ValueError, match="holds more than 100,000 values"):
        load_yaml(text, pure=pure)


@pytest.mark.parametrize("pure", [True, False])
def test_yaml_that_is_nested_too_deeply_is_refused(pure):
    deep = "[" * (sys.getrecursionlimit() * 7 // 10)  # each takes two calls, and one that is deeper takes longer
    with pytest.raises(ValueError, match="is nested too deeply"):
        load_yaml(deep, pure=pure)


def test_yaml_is_read_as_plain_values():
    assert load_yaml("{a: [1, 2e-3], b: {c: null}}") == {"a": [1, 2e-3], "b": {"c": None}}
    assert load_yaml("a: &x [1]\nb: *x\n") == {"a": [1], "b": [1]}


def test_a_file_that_is_no_text_that_people_write_is_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for file, said in [
        ("/dev/zero", "is larger than 4 MB"),
        (tmp_path / "latin", "is not text in UTF-8"),
        (tmp_path / "none", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
    ]:
        with pytest.raises(UserError, match=f"{file}: the search space {said}"):
            read_text(Path(file), "the search space")
