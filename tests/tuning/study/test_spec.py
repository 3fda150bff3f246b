import importlib.metadata

from raytune_emotion import __version__
from raytune_emotion.tuning.study import spec


def test_versions_are_told_where_the_package_is_on_the_path_and_not_installed(monkeypatch):
    version = importlib.metadata.version

    def of_others(name):
        if name == "raytune_emotion":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    assert spec._environment()["versions"]["raytune_emotion"] == __version__
