import pytest

from raytune_emotion.cli import run_guarded
from raytune_emotion.data.packing import blocks
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.storage.locations import parse_location
from tests.support.faces import write_folder, write_row

#: Almost all on one class, in the notation that Python has for tiny numbers.
SPIKED = ",".join("0.9999999999999" if i == 4 else "1e-14" for i in range(13))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "faces", train=7, val=3)
    write_row(tmp_path / "faces", "train", "clip_3_affwild", text=SPIKED, size=(31, 17))
    return tmp_path / "faces"


@pytest.fixture
def small_shards(monkeypatch):
    """Of two rows at 16 px, and of one at more."""
    monkeypatch.setattr(blocks, "_SHARD_BYTES", 3 * 16 * 16 * 3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raytune_emotion" / "stores"


@pytest.fixture(scope="module")
def bucket(bucket):
    return parse_location(bucket)


@pytest.fixture
def stored(folder, tmp_path, bucket, request, cache):
    """A store and a URI that has it, as `pack` would have put it there."""
    location, store = bucket / request.node.name, pack(folder, tmp_path / "store", image_size=16)
    location.push(store.path, [file.name for file in store.path.iterdir() if not file.name.startswith(".")])
    return store, str(location)


@pytest.fixture
def exit_code_of(capsys):
    """Runs an action as a command does, and returns its exit code, after a look at what is said."""

    def run(action):
        code = run_guarded(action)
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") for line in lines)
        assert bool(lines) == (code == 2)
        return code

    return run
