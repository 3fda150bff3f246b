import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytune_emotion.data import store as store_module
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.prepare import find_data, prepare
from raytune_emotion.data.store import Split, is_store, open_if_here, open_store
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import remote


@given(rows=st.lists(st.integers(0, 10), max_size=20), cuts=st.sets(st.integers(1, 10), max_size=4))
@settings(max_examples=40)
def test_gathering_is_reading_row_by_row(rows, cuts):
    images = np.random.default_rng(1).integers(0, 256, (11, 4, 4, 3), np.uint8)
    split = Split(tuple(map(str, range(11))), np.zeros((11, 2), np.float32), tuple(np.split(images, sorted(cuts))))
    wanted = np.array(rows, np.int64)
    np.testing.assert_array_equal(split.gather(wanted), images[wanted])
    out = np.empty((len(rows), 4, 4, 3), np.uint8)
    assert split.gather(wanted, out) is out
    np.testing.assert_array_equal(out, images[wanted])


@pytest.mark.parametrize("row", [-1, 8])
@pytest.mark.parametrize("shards", [1, 3])
def test_rows_out_of_range_are_refused(row, shards):
    images = np.zeros((8, 2, 2, 3), np.uint8)
    split = Split(("",) * 8, np.zeros((8, 2), np.float32), tuple(np.array_split(images, shards)))
    with pytest.raises(IndexError, match="of a split of 8"):
        split.gather(np.array([0, row]))


def test_a_store_crosses_processes_by_its_path(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    sent = pickle.dumps(packed)
    assert len(sent) < 500
    again = pickle.loads(sent)
    assert again.fingerprint == packed.fingerprint
    np.testing.assert_array_equal(again.val.gather(np.arange(3)), packed.val.gather(np.arange(3)))


def test_a_store_is_shown_without_its_pixels(folder, tmp_path):
    assert len(repr(pack(folder, tmp_path / "store", image_size=16))) < 1000


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def damage_missing(path):
    (path / "train-00000.arrow").unlink()
    (path / "val-00000.arrow").unlink()
    return ["train-00000.arrow: is missing; ", "val-00000.arrow: is missing; "]


def damage_truncated(path):
    shard = path / "train-00000.arrow"
    whole = shard.read_bytes()
    shard.unlink()  # what is mapped stays whole
    shard.write_bytes(whole[:-100])
    return [f"train-00000.arrow: holds {len(whole) - 100} bytes of {len(whole)}; the store is damaged; pack the folder"]


def damage_overwritten(path):
    shard = path / "train-00000.arrow"
    whole = shard.read_bytes()
    shard.unlink()  # what is mapped stays whole
    shard.write_bytes(whole[:-400] + bytes(400))
    return ["train-00000.arrow: not a readable Arrow file"]


def damage_rows(path):
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    splits["val"]["shards"][0]["rows"] = splits["val"]["rows"] = 5
    edit_manifest(path, splits=splits)
    return ["val-00000.arrow: not the 5 rows of 16 px and 13 classes"]


def damage_count(path):
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    splits["val"]["rows"] = 10**9
    edit_manifest(path, splits=splits)
    return ["(splits.val: Value error, 1000000000 rows, but 3 in its shards); pack the folder again"]


def damage_labels(path):
    shard = path / "val-00000.arrow"
    whole = shard.read_bytes()
    probs = open_store(path).val.prob_NK.tobytes()
    assert whole.count(probs) == 1
    shard.unlink()  # what is mapped stays whole
    shard.write_bytes(whole.replace(probs, np.full(3 * 13, np.nan, np.float32).tobytes()))
    return ["val-00000.arrow: holds probabilities that do not sum to 1; the store is damaged; pack the folder again"]


def damage_size(path):
    edit_manifest(path, image_size=17)
    return ["train-00000.arrow: not the 8 rows of 17 px", "val-00000.arrow: not the 3 rows of 17 px"]


def damage_version(path):
    edit_manifest(path, version=2)
    return ["not a description of a store that this version can read (version: Input should be 1); pack the folder"]


def damage_classes(path):
    classes = json.loads((path / "manifest.json").read_text())["classes"]
    edit_manifest(path, classes=["a\nb", *classes[1:]])
    return ["(classes: Value error, each class needs a name of printable characters, got 'a\\nb'); pack"]


def damage_manifest(path):
    (path / "manifest.json").write_text("{")
    return ["not a description of a store that this version can read (the file: Invalid JSON"]


def damage_path(path):
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    splits["val"]["shards"][0]["file"] = "../val-00000.arrow"
    edit_manifest(path, splits=splits)
    return ["(splits.val.shards.0.file: String should match pattern"]


def damage_gone(path):
    (path / "manifest.json").unlink()
    return ["not a packed store, because it has no manifest.json; name a store"]


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_truncated,
        damage_overwritten,
        damage_rows,
        damage_count,
        damage_labels,
        damage_size,
        damage_version,
        damage_classes,
        damage_manifest,
        damage_path,
        damage_gone,
    ],
)
def test_a_damaged_store_is_refused_by_name(folder, tmp_path, damage):
    packed = pack(folder, tmp_path / "store", image_size=16)
    expected = damage(packed.path)
    with pytest.raises(UserError) as raised:
        open_store(packed.path)
    assert len(raised.value.faults) == len(expected)
    for fault, part in zip(raised.value.faults, expected, strict=True):
        assert str(packed.path) in fault
        assert part in fault


@pytest.mark.parametrize(
    ("text", "store"), [('{"name": "a web page"}', False), ("[]", False), ("{", True), ("", True), ("[" * 10**5, True)]
)
def test_manifest_of_somebody_else_makes_no_store_and_a_damaged_one_does(folder, text, store):
    (folder / "manifest.json").write_text(text)
    assert is_store(folder) == store
    if not store:
        assert find_data(folder).count_rows() == 8


def test_no_damage_of_what_describes_a_shard_ends_the_process(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    shard, opened = packed.path / "val-00000.arrow", 0
    whole = shard.read_bytes()
    begin = whole.index(packed.val.shards[0].tobytes()) - 2000
    # Every third byte: of each number of four bytes at least one.
    for place in [*range(max(0, begin), begin + 2000, 3), *range(len(whole) - 1000, len(whole), 3)]:
        # Not over what is mapped.
        (tmp_path / "damaged").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        (tmp_path / "damaged").replace(shard)
        with contextlib.suppress(UserError):
            open_store(packed.path)
            opened += 1
    assert 0 < opened < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def leaves(value, path=()):
    """The paths of all values in a JSON document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from leaves(item, (*path, key))


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_manifest_is_taken_or_refused_by_a_sentence(data, store, tmp_path, exit_code_of):
    manifest = json.loads((store.path / "manifest.json").read_text())
    place = data.draw(st.sampled_from([path for path in leaves(manifest) if path]))
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[place[-1]] = data.draw(VALUES)
    else:
        del inner[place[-1]]
    text = json.dumps(manifest).encode()
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(st.binary(max_size=8)) + text[cut + data.draw(st.integers(0, 8)) :]
    damaged = tmp_path / "damaged"
    damaged.mkdir(exist_ok=True)
    for shard in store.path.glob("*.arrow"):
        if not (damaged / shard.name).exists():
            (damaged / shard.name).hardlink_to(shard)
    (damaged / "manifest.json").write_bytes(text)
    assert exit_code_of(lambda: prepare(damaged, image_size=None)) in (0, 2)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shard_is_taken_or_refused_by_a_sentence(data, store, tmp_path, exit_code_of):
    damaged = tmp_path / "damaged"
    if not damaged.exists():
        shutil.copytree(store.path, damaged)
    content = bytearray((store.path / "val-00000.arrow").read_bytes())
    pixels = bytes(content).index(store.val.shards[0].tobytes())
    # What describes the shard lies before and behind the pixels, which are 100 kB.
    places = st.one_of(st.integers(0, pixels), st.integers(len(content) - 3000, len(content) - 8))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        value = data.draw(st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, -1, 1, 2**31 - 1]))
        content[place : place + 4] = value.to_bytes(4, "little", signed=True)
    (damaged / "whole").write_bytes(content)  # not over what is mapped
    (damaged / "whole").replace(damaged / "val-00000.arrow")
    assert exit_code_of(lambda: prepare(damaged, image_size=None)) in (0, 2)


def open_here(uri):
    store = open_store(uri)
    return str(store.path), store.fingerprint, store.val.gather(np.arange(3)).sum()


def test_a_store_at_a_uri_is_fetched_once_by_whoever_comes_first(stored, cache, capfd):
    store, uri = stored
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        found = set(executor.map(open_here, [uri] * 2))
    (path,) = cache.iterdir()
    assert found == {(str(path), store.fingerprint, store.val.gather(np.arange(3)).sum())}
    fetched = open_store(uri)
    assert capfd.readouterr().err == f"{uri}: fetched once, into {path}\n"
    assert {f.name for f in path.iterdir()} == {f.name for f in store.path.iterdir()}
    assert fetched.address == pickle.loads(pickle.dumps(fetched)).address == uri


def test_a_store_at_a_uri_is_opened_without_the_network_if_the_cache_has_it(stored, cache, monkeypatch):
    store, uri = stored
    assert open_if_here(uri, 16, store.fingerprint) is None
    assert not list(cache.glob("*"))
    open_store(uri)
    for name in ("read", "pull", "list_folder"):
        monkeypatch.setattr(remote, name, lambda *_: pytest.fail("the network is asked"))
    found = open_if_here(uri, 16, store.fingerprint)
    assert (found.fingerprint, found.address) == (store.fingerprint, uri)
    assert open_if_here(uri, 16, "0" * 64) is None


def test_a_store_in_a_folder_is_opened_if_it_is_whole_and_still_the_same(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    assert open_if_here(str(packed.path), 16, packed.fingerprint).fingerprint == packed.fingerprint
    assert open_if_here(str(packed.path), 16, "of before") is None
    damage_missing(packed.path)
    assert open_if_here(str(packed.path), 16, packed.fingerprint) is None


def test_a_fetch_that_breaks_off_is_gone_on_with_and_damage_is_fetched_again(stored, cache, monkeypatch):
    store, uri = stored
    pulled = []

    def pull(uri, folder, names, real=remote.pull):
        if len(pulled) == 1:
            pulled.append("broken off")
            raise Breakdown("the network is gone")
        pulled.extend(names)
        real(uri, folder, names)

    monkeypatch.setattr(remote, "pull", pull)
    with pytest.raises(Breakdown):
        open_store(uri)
    assert not any(map(is_store, cache.glob("*")))
    fetched = open_store(uri)
    assert pulled == ["train-00000.arrow", "broken off", "val-00000.arrow", "rejected.csv"]
    assert fetched.fingerprint == store.fingerprint
    shard = fetched.path / "val-00000.arrow"
    shard.unlink()
    again = open_store(uri)
    assert (again.path, again.fingerprint) == (fetched.path, store.fingerprint)


def test_what_is_not_what_its_manifest_says_is_not_kept(stored, cache):
    store, uri = stored
    flip_bit(store.path / "val-00000.arrow", store.val.gather(np.array([1])).tobytes())
    remote.push(store.path, uri, ["val-00000.arrow"])
    with pytest.raises(UserError, match=r": the files do not match manifest\.json; .*; copy the store there"):
        open_store(uri)
    assert list(cache.iterdir()) == []


def flip_bit(file, where):
    """Change one bit of the first byte of some content, in a new file."""
    whole = bytearray(file.read_bytes())
    whole[whole.index(where)] ^= 1
    file.unlink()
    file.write_bytes(whole)


@pytest.mark.parametrize("part", ["a pixel", "a probability", "an id"])
def test_a_flipped_bit_is_found_before_anything_is_trained(stored, cache, part):
    path = stored[0].path
    store = prepare(path, image_size=None)
    where = {
        "a pixel": store.train.gather(np.array([2])).tobytes(),
        "a probability": store.train.prob_NK[2].tobytes(),
        "an id": "".join(store.train.ids[:3]).encode(),
    }
    flip_bit(path / "train-00000.arrow", where[part])
    assert open_store(path).fingerprint == store.fingerprint  # the Arrow file is sound
    with pytest.raises(UserError, match=f"^{path}: the files do not match manifest.json"):
        prepare(path, image_size=None)


def test_a_store_is_verified_once_as_long_as_its_files_are_the_same(stored, cache, monkeypatch):
    path = stored[0].path
    prepare(path, image_size=None)
    verified = []
    monkeypatch.setattr(store_module, "verify_content", lambda store, name: verified.append(store.path))
    prepare(path, image_size=None)
    assert verified == []
    os.utime(path / "val-00000.arrow")
    prepare(path, image_size=None)
    assert verified == [path]


def test_foreign_manifest_leads_to_no_folder_but_the_cache(stored, cache):
    store, uri = stored
    edit_manifest(store.path, fingerprint="../../../elsewhere")
    remote.push(store.path, uri, ["manifest.json"])
    with pytest.raises(UserError, match=r"\(fingerprint: String should match pattern"):
        open_store(uri)
