"""Where the cache lies: below the home folder, and elsewhere for a user who has none that can be written."""

import os
import tempfile

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.storage.cache import cache_folder


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def own_folder(tmp_path):
    return tmp_path / f"raytune_emotion-{os.getuid()}"


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / ".cache" / "raytune_emotion"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "raytune_emotion"


def test_a_home_that_cannot_be_written_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").touch()  # root may write everywhere, so a file stands for a read-only folder
    assert cache_folder() == own_folder(tmp_path) / ".cache" / "raytune_emotion"
    assert own_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    assert cache_folder() == own_folder(tmp_path) / ".cache" / "raytune_emotion"


def test_a_user_without_a_home_has_a_cache_that_is_private_also_if_its_folder_was_there(monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    own_folder(tmp_path).mkdir(mode=0o755)
    assert cache_folder() == own_folder(tmp_path) / ".cache" / "raytune_emotion"
    assert own_folder(tmp_path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_that_somebody_else_has_laid_there_is_refused(monkeypatch, tmp_path, kind):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    (tmp_path / "theirs").mkdir()
    own_folder(tmp_path).symlink_to(tmp_path / "theirs") if kind == "link" else own_folder(tmp_path).touch()
    with pytest.raises(UserError, match="belongs to another user; name a folder of your own"):
        cache_folder()
