import contextlib
import csv
import functools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytune_emotion.cli import guarded
from raytune_emotion.data import prepare as prepare_module
from raytune_emotion.data.affectnet import Kind, list_faces, scan
from raytune_emotion.data.decode import decode_at_sizes, decode_image
from raytune_emotion.data.packing import blocks
from raytune_emotion.data.packing.pack import pack, pack_sizes
from raytune_emotion.data.prepare import find_data, prepare, prepare_sizes
from raytune_emotion.data.store import Split, is_store, open_store
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Folder, Remote, parse_location
from tests.data.test_affectnet import UNIFORM, picture, write_folder, write_row
from tests.storage.test_remote import SECRET, s3_server


def spiked(place):
    return ",".join("0.9999999999999" if i == place else "1e-14" for i in range(13))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "faces", train=7, val=3)
    write_row(tmp_path / "faces", "train", "clip_3_affwild", text=spiked(4), size=(31, 17))
    return tmp_path / "faces"


@pytest.fixture
def small_shards(monkeypatch):
    """Of two rows at 16 px, and of one at more."""
    monkeypatch.setattr(blocks, "_SHARD_BYTES", 3 * 16 * 16 * 3)


def test_a_store_holds_what_the_folder_holds(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    assert is_store(tmp_path / "store")
    assert (packed.path, packed.image_size, packed.classes, packed.rejected) == (tmp_path / "store", 16, EMOTIONS, 0)
    rows = scan(list_faces(Folder(folder))).rows
    for name, split in (("train", packed.train), ("val", packed.val)):
        assert list(split.ids) == [row.id for row in rows[name]]
        np.testing.assert_array_equal(split.prob_NK, np.array([row.probs for row in rows[name]], np.float32))
        decoded = split.gather(np.arange(len(split)))
        np.testing.assert_array_equal(decoded, [decode_image(folder / row.image.name, 16) for row in rows[name]])
    with pytest.raises(ValueError, match="read-only"):
        packed.train.prob_NK[0] = 0


def test_the_files_are_plain_arrow(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    table = pa.ipc.open_file(str(tmp_path / "store/train-00000.arrow")).read_all()
    assert table.column("id").to_pylist() == list(packed.train.ids)
    assert table.schema.field("image").type == pa.list_(pa.uint8(), 16 * 16 * 3)
    np.testing.assert_array_equal(
        np.array(table.column("image").to_pylist()).reshape(-1, 16, 16, 3), packed.train.gather(np.arange(8))
    )
    np.testing.assert_array_equal(np.array(table.column("probs").to_pylist(), np.float32), packed.train.prob_NK)


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_number_of_workers_and_of_shards_changes_nothing(folder, tmp_path, request):
    one = pack(folder, tmp_path / "one", image_size=16, workers=1)
    two = pack(folder, tmp_path / "two", image_size=16, workers=2)
    assert one.fingerprint == two.fingerprint
    assert files_of(one.path) == files_of(two.path)
    request.getfixturevalue("small_shards")
    sharded = pack(folder, tmp_path / "sharded", image_size=16, workers=1)
    assert [len(shard) for shard in sharded.train.shards] == [2, 2, 2, 2]
    assert sharded.fingerprint == one.fingerprint


@pytest.mark.parametrize("change", ["pixel", "probability", "id", "order of classes"])
def test_the_fingerprint_sees_every_part_of_the_content(folder, tmp_path, change):
    before = pack(folder, tmp_path / "before", image_size=16).fingerprint
    classes = EMOTIONS
    if change == "pixel":
        picture(99).save(folder / "val_set/images/1000.png")
    elif change == "probability":
        (folder / "val_set/annotations/1000_prob_rank.txt").write_text(spiked(0))
    elif change == "id":
        for sub, ending in (("images", ".png"), ("annotations", "_prob_rank.txt")):
            (folder / "val_set" / sub / f"1002{ending}").rename(folder / "val_set" / sub / f"1003{ending}")
    else:
        classes = EMOTIONS[::-1]
    assert pack(folder, tmp_path / "after", image_size=16, classes=classes).fingerprint != before


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


def spoil(folder):
    """One row of each kind of fault; what is told of each."""
    train = folder / "train_set"
    for i in range(20, 33):
        write_row(folder, "train", i)

    def annotate(id_, text):
        (train / f"annotations/{id_}_prob_rank.txt").write_bytes(text)

    strange = os.fsdecode(b"\xe9.png")
    picture(0).save(train / "images" / "x.png")
    (train / "images/x.png").rename(train / "images" / strange)
    (train / "images/20.png").unlink()
    (train / "annotations/21_prob_rank.txt").unlink()
    picture(0).save(train / "images/22.bmp")
    annotate(23, b"\xff\xfe")
    annotate(24, b"")
    annotate(25, b"happy")
    annotate(26, b",".join([b"0.125"] * 8))
    annotate(27, UNIFORM.replace("0.076923", "nan", 1).encode())
    annotate(28, UNIFORM.replace("0.076923", "-0.076923", 1).encode())
    annotate(29, UNIFORM.replace("0.076923", "0.9", 1).encode())
    (train / "annotations/32_prob_rank.txt").unlink()
    (train / "annotations/32_prob_rank.txt").symlink_to("/proc/self/mem")  # which not even root can read
    whole = (train / "images/30.png").read_bytes()
    (train / "images/30.png").write_bytes(whole[: len(whole) // 2])
    annotate(31, b"")  # two faults in one row
    (train / "images/31.png").write_bytes(b"")
    return {
        Kind.NAME: ["images/\\xe9.png"],
        Kind.NO_IMAGE: ["annotations/20_prob_rank.txt"],
        Kind.NO_ANNOTATION: ["images/21.png"],
        Kind.SEVERAL_IMAGES: ["images/22.bmp"],
        Kind.UNREADABLE: ["annotations/32_prob_rank.txt"],
        Kind.NOT_UTF8: ["annotations/23_prob_rank.txt"],
        Kind.EMPTY: ["annotations/24_prob_rank.txt", "annotations/31_prob_rank.txt"],
        Kind.TEXT: ["annotations/25_prob_rank.txt"],
        Kind.COUNT: ["annotations/26_prob_rank.txt"],
        Kind.NOT_FINITE: ["annotations/27_prob_rank.txt"],
        Kind.NEGATIVE: ["annotations/28_prob_rank.txt"],
        Kind.SUM: ["annotations/29_prob_rank.txt"],
        Kind.UNDECODABLE: ["images/30.png", "images/31.png"],
    }


@pytest.mark.parametrize(
    "meanwhile", ["nothing", "a picture changes", "a row is added", "a record is torn", "a shard is torn"]
)
def test_killed_attempt_is_resumed_by_whole_shards(folder, tmp_path, small_shards, monkeypatch, meanwhile):
    decoded = []

    def decode(content, sides, *, fails_at=None, real=decode_at_sizes):
        if len(decoded) == fails_at:
            raise KeyboardInterrupt
        found = (path.name for path in folder.glob("*/images/*") if path.read_bytes() == content)
        decoded.append(next(found))
        return real(content, sides)

    # Shards of the rows 0 and 1, 2 and 3, 4 and 5, 6 and the clip.
    monkeypatch.setattr(blocks, "decode_at_sizes", functools.partial(decode, fails_at=7))
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "store", image_size=16, workers=1)
    (part,) = tmp_path.glob(".store.*")
    (part / "val-00007.arrow").touch()
    (part / ".train-00003.arrow.7.tmp").touch()
    expected = {path.name for path in folder.glob("*/images/*")} - {f"{i}.png" for i in range(6)}
    if meanwhile == "a picture changes":
        picture(77).save(folder / "train_set/images/2.png")
        expected |= {"2.png", "3.png"}
    elif meanwhile == "a row is added":
        write_row(folder, "train", "20")  # before the fourth
        expected = {path.name for path in folder.glob("*/images/*")} - {"0.png", "1.png"}
    elif meanwhile == "a record is torn":
        record = part / ".train-00000004.done"
        record.write_text(record.read_text()[:-3])
        expected |= {"4.png", "5.png"}
    elif meanwhile == "a shard is torn":
        (part / "train-00000.arrow").write_bytes((part / "train-00000.arrow").read_bytes()[:-1])
        expected |= {"0.png", "1.png"}

    decoded.clear()
    monkeypatch.setattr(blocks, "decode_at_sizes", decode)
    packed = pack(folder, tmp_path / "store", image_size=16, workers=1)
    assert set(decoded) == expected
    fresh = pack(folder, tmp_path / "fresh", image_size=16, workers=1)
    assert packed.fingerprint == fresh.fingerprint
    assert files_of(packed.path) == files_of(fresh.path)


@pytest.mark.parametrize(
    ("image_size", "rows", "expected"), [(96, 300_000, 2048), (96, 2000, 128), (96, 33, 128), (64, 20_000, 1024),
                                         (224, 300_000, 256), (1024, 300_000, 16), (8000, 5, 1)]
)  # fmt: skip
def test_rows_of_a_shard_fit_in_memory_and_leave_work_for_many_cores(image_size, rows, expected):
    assert blocks.shard_rows(image_size, rows) == expected


def test_all_faults_are_told_at_once_and_nothing_is_left(folder, tmp_path):
    expected = spoil(folder)
    assert set(expected) == set(Kind)
    with pytest.raises(UserError) as raised:
        pack(folder, tmp_path / "there" / "store", image_size=16)
    *told, last = raised.value.faults
    assert len(told) == len(expected)
    for sentence, (kind, files) in zip(told, expected.items(), strict=True):
        assert sentence.startswith(f"{folder}: {kind.value} ({len(files)} file")
        assert all(f"train_set/{file}" in sentence for file in files)
    assert last == f"{folder}: nothing is packed while files are at fault; mend them, or set them aside with --skip-bad"
    assert list((tmp_path / "there").iterdir()) == []


def test_skip_bad_sets_aside_exactly_the_bad_rows(folder, tmp_path, small_shards, capsys):
    good = pack(folder, tmp_path / "good", image_size=16)
    expected = spoil(folder)
    packed = pack(folder, tmp_path / "store", image_size=16, skip_bad=True, workers=2)
    assert packed.fingerprint == good.fingerprint
    np.testing.assert_array_equal(packed.train.gather(np.arange(8)), good.train.gather(np.arange(8)))
    np.testing.assert_array_equal(packed.train.prob_NK, good.train.prob_NK)
    assert packed.rejected == 14
    err = capsys.readouterr().err
    assert err == f"{packed.path}: rejected rows: 14, see {packed.path / 'rejected.csv'}\n"

    with (packed.path / "rejected.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert {(row["split"], row["file"]) for row in listed} == {
        ("train", f"train_set/{file}") for files in expected.values() for file in files
    }
    reasons = {row["file"]: row["reason"] for row in listed}
    assert reasons["train_set/annotations/26_prob_rank.txt"] == "wrong number of values: 8 values for 13 classes"
    assert reasons["train_set/annotations/24_prob_rank.txt"] == "empty annotation"


def test_skip_bad_drops_bad_rows_from_within_a_shard(folder, tmp_path):
    good = pack(folder, tmp_path / "good", image_size=16)
    for id_ in (0, 3, 6):
        (folder / f"train_set/images/{id_}.png").write_bytes(b"")
    packed = pack(folder, tmp_path / "store", image_size=16, skip_bad=True)
    assert packed.train.ids == ("1", "2", "4", "5", "clip_3_affwild")
    kept = np.array([good.train.ids.index(id_) for id_ in packed.train.ids])
    np.testing.assert_array_equal(packed.train.gather(np.arange(5)), good.train.gather(kept))
    np.testing.assert_array_equal(packed.train.prob_NK, good.train.prob_NK[kept])
    assert open_store(packed.path).fingerprint == packed.fingerprint


@pytest.mark.parametrize("what", ["images", "annotations"])
def test_a_split_without_a_good_row_is_refused(folder, tmp_path, what):
    for file in (folder / "val_set" / what).iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError) as raised:
        pack(folder, tmp_path / "store", image_size=16, skip_bad=True)
    assert raised.value.faults[-1] == f"{folder / 'val_set'}: not one good row"
    assert "(3 files)" in raised.value.faults[0]
    assert not (tmp_path / "store").exists()


def test_settings_and_sources_that_make_no_sense_are_refused(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    with pytest.raises(UserError, match="exists already"):
        pack(folder, tmp_path / "store", image_size=16)
    with pytest.raises(UserError, match="packed store already"):
        pack(packed.path, tmp_path / "other", image_size=16)
    with pytest.raises(UserError, match="image_size"):
        pack(folder, tmp_path / "other", image_size=0)
    with pytest.raises(UserError, match="not a folder in the layout of AffectNetFused"):
        pack(tmp_path, tmp_path / "other", image_size=16)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is not a folder"):
        pack(folder, tmp_path / "file" / "other", image_size=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "file", "store"]


def test_a_disk_that_is_too_small_is_told_before_it_is_full(folder, tmp_path):
    with pytest.raises(UserError, match=r"[\d,.]+ GB are needed and [\d,.]+ GB are free; choose another disk"):
        Folder(tmp_path).check_space(10**18, "choose another disk")


def test_a_script_that_does_not_ask_whether_it_is_main_can_pack(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom raytune_emotion.data.packing.pack import pack\n"
        "print('once')\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), image_size=16, workers=2)\n"
    )
    command = [sys.executable, str(script), str(folder), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")
    assert len(open_store(tmp_path / "store").train) == 8


def test_a_machine_without_the_folder_is_one_clear_sentence(folder, tmp_path):
    def elsewhere(function, tasks):
        folder.rename(tmp_path / "not shared")
        return map(function, tasks)

    with pytest.raises(Breakdown, match=r"faces: is not there on .*; share it under this path with every node, or"):
        pack_sizes(Folder(folder), {16: Folder(tmp_path / "store")}, pmap=elsewhere)


# Opening


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
    return [f"train-00000.arrow: holds {len(whole) - 100} bytes of {len(whole)}; the store is damaged, pack the folder"]


def damage_overwritten(path):
    shard = path / "train-00000.arrow"
    whole = shard.read_bytes()
    shard.unlink()  # what is mapped stays whole
    shard.write_bytes(whole[:-400] + bytes(400))
    return ["train-00000.arrow: no readable Arrow file"]


def damage_rows(path):
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    splits["val"]["shards"][0]["rows"] = splits["val"]["rows"] = 5
    edit_manifest(path, splits=splits)
    return ["val-00000.arrow: not the 5 rows of 16 px and 13 classes"]


def damage_count(path):
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    splits["val"]["rows"] = 10**9
    edit_manifest(path, splits=splits)
    return ["(splits.val: Value error, 1000000000 rows, and 3 in its shards); pack the folder again"]


def damage_labels(path):
    shard = path / "val-00000.arrow"
    whole = shard.read_bytes()
    probs = open_store(path).val.prob_NK.tobytes()
    assert whole.count(probs) == 1
    shard.unlink()  # what is mapped stays whole
    shard.write_bytes(whole.replace(probs, np.full(3 * 13, np.nan, np.float32).tobytes()))
    return ["val-00000.arrow: holds probabilities that do not sum to 1; the store is damaged, pack the folder again"]


def damage_size(path):
    edit_manifest(path, image_size=17)
    return ["train-00000.arrow: not the 8 rows of 17 px", "val-00000.arrow: not the 3 rows of 17 px"]


def damage_version(path):
    edit_manifest(path, version=2)
    return ["no description of a store that this version reads (version: Input should be 1); pack the folder again"]


def damage_manifest(path):
    (path / "manifest.json").write_text("{")
    return ["no description of a store that this version reads (the file: Invalid JSON"]


def damage_path(path):
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    splits["val"]["shards"][0]["file"] = "../val-00000.arrow"
    edit_manifest(path, splits=splits)
    return ["(splits.val.shards.0.file: String should match pattern"]


def damage_gone(path):
    (path / "manifest.json").unlink()
    return ["no packed store, for it has no manifest.json"]


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


def test_no_damage_of_what_describes_a_shard_ends_the_process(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    shard, opened = packed.path / "val-00000.arrow", 0
    whole = shard.read_bytes()
    begin = whole.index(packed.val.shards[0].tobytes()) - 2000
    for place in [*range(max(0, begin), begin + 2000), *range(len(whole) - 1000, len(whole))]:
        # Not over what is mapped.
        (tmp_path / "damaged").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        (tmp_path / "damaged").replace(shard)
        with contextlib.suppress(UserError):
            open_store(packed.path)
            opened += 1
    assert 0 < opened < 1500


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


def code_of(action, capsys):
    """The exit code of what a command does, after a look at what it says."""
    code = guarded(action)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert bool(lines) == (code == 2)
    return code


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_manifest_is_taken_or_refused_by_a_sentence(data, store, tmp_path, capsys):
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
    assert code_of(lambda: prepare(damaged, image_size=None), capsys) in (0, 2)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shard_is_taken_or_refused_by_a_sentence(data, store, tmp_path, capsys):
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
    assert code_of(lambda: prepare(damaged, image_size=None), capsys) in (0, 2)


@given(
    annotation=st.binary(max_size=60) | st.text("0123456789.,-e+nai ", max_size=60).map(str.encode),
    image=st.binary(max_size=60)
    | st.sampled_from([b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP"]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_annotation_and_image_is_packed_or_refused_by_a_sentence(annotation, image, folder, tmp_path, capsys):
    write_row(folder, "train", "odd")
    (folder / "train_set/annotations/odd_prob_rank.txt").write_bytes(annotation)
    (folder / "train_set/images/odd.png").write_bytes(image)
    dest = tmp_path / "store"
    assert code_of(lambda: pack(folder, dest, image_size=16, workers=1), capsys) == 2
    assert not dest.exists()


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raytune_emotion" / "stores"


def written(store):
    stat = (store.path / "manifest.json").stat()
    return stat.st_ino, stat.st_mtime_ns


def test_a_folder_is_packed_once(folder, cache, capsys):
    first = prepare(folder, image_size=16)
    packed = written(first)
    assert first.path.parent == cache
    assert capsys.readouterr().err == f"{folder}: packed once, at 16 px, into {first.path}\n"
    again = prepare(folder, image_size=16)
    assert (again.path, written(again)) == (first.path, packed)
    assert capsys.readouterr().err == ""


def test_what_changes_the_content_is_packed_anew(folder, cache):
    paths = {prepare(folder, image_size=16).path, prepare(folder, image_size=20).path}
    paths.add(prepare(folder, image_size=16, classes=EMOTIONS[::-1]).path)
    paths.add(prepare(folder, image_size=16, skip_bad=True).path)
    picture(77).save(folder / "train_set/images/2.png")
    latest = prepare(folder, image_size=16)
    paths.add(latest.path)
    assert len(paths) == len(list(cache.iterdir())) == 5
    np.testing.assert_array_equal(
        latest.train.gather(np.array([2]))[0], decode_image(folder / "train_set/images/2.png", 16)
    )


def test_the_default_size_of_a_folder_is_that_of_its_images_but_no_more_than_the_configuration_has(folder, cache):
    for name, side, packed_at in (("small", 40, 40), ("large", 400, 224)):
        copy = Path(shutil.copytree(folder, folder.parent / name))
        for image in copy.glob("train_set/images/*"):
            picture(5).resize((side, side + 9)).save(image)
        assert prepare(copy, image_size=None).image_size == packed_at


def test_a_store_is_used_as_it_is_or_refused(folder, tmp_path, cache):
    packed = pack(folder, tmp_path / "store", image_size=16)
    assert prepare(packed.path, image_size=None).path == packed.path
    assert prepare(packed.path, image_size=16).fingerprint == packed.fingerprint
    with pytest.raises(UserError) as raised:
        prepare(packed.path, image_size=32, classes=("a", "b"))
    size, classes = raised.value.faults
    assert "holds images of 16 px, and data.image_size is 32" in size
    assert "data.classes is a, b" in classes
    assert not cache.exists()


def test_a_damaged_store_in_the_cache_is_packed_again(folder, cache):
    first = prepare(folder, image_size=16)
    packed = written(first)
    (first.path / "val-00000.arrow").unlink()
    again = prepare(folder, image_size=16)
    assert again.path == first.path
    assert again.fingerprint == first.fingerprint
    assert written(again) != packed


def prepare_here(folder: Path) -> tuple[str, str]:
    prepared = prepare(folder, image_size=16)
    return str(prepared.path), prepared.fingerprint


def test_two_processes_may_prepare_at_once(folder, cache):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        first, second = executor.map(prepare_here, [folder, folder])
    assert first == second
    assert len(list(cache.iterdir())) == 1


def test_faults_of_a_folder_reach_who_prepares_it(folder, cache, capsys):
    (folder / "train_set/images/2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_set/images/2\.png"):
        prepare(folder, image_size=16)
    assert list(cache.iterdir()) == []
    assert prepare(folder, image_size=16, skip_bad=True).rejected == 1
    capsys.readouterr()
    assert prepare(folder, image_size=16, skip_bad=True).rejected == 1
    assert "rejected rows: 1, see" in capsys.readouterr().err


# Several sizes


def test_stores_side_by_side_are_chosen_by_size(folder, tmp_path, cache):
    pack_sizes(Folder(folder), {size: Folder(tmp_path / "stores" / f"{size}px") for size in (16, 32)})
    place = tmp_path / "stores"
    assert is_store(place)
    data = find_data(place)
    assert {size: store.address for size, (store, _) in data.manifests.items()} == {
        size: str(place / f"{size}px") for size in (16, 32)
    }
    assert prepare(place, image_size=32).path == place / "32px"
    assert {size: store.image_size for size, store in prepare_sizes(data, (32, 16)).items()} == {16: 16, 32: 32}
    with pytest.raises(UserError, match=r"holds stores of 16, 32 px; choose by data\.image_size"):
        prepare(place, image_size=None)
    with pytest.raises(UserError, match=r"holds images of 16, 32 px, and data\.image_size is 24; set .* to 16 or 32"):
        prepare_sizes(data, (16, 24))
    assert not cache.exists()


def test_a_folder_is_prepared_at_several_sizes_in_one_pass(folder, cache, monkeypatch):
    first = prepare(folder, image_size=16)
    packed, passes = written(first), []

    def pack_once(faces, dests, *, real=pack_sizes, **options):
        passes.append(sorted(dests))
        return real(faces, dests, **options)

    monkeypatch.setattr(prepare_module, "pack_sizes", pack_once)
    stores = prepare_sizes(find_data(folder), (16, 24, 32))
    assert passes == [[24, 32]]
    assert written(stores[16]) == packed
    assert stores[24].fingerprint == pack(folder, cache / "alone", image_size=24).fingerprint


# At a URI


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as uri:
        yield parse_location(uri)


@pytest.fixture
def stored(folder, tmp_path, bucket, request, cache):
    """A store and a URI that has it."""
    location = bucket / request.node.name
    pack_sizes(Folder(folder), {16: location}, workers=1)
    return pack(folder, tmp_path / "store", image_size=16), str(location)


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
    whole = (store.path / "val-00000.arrow").read_bytes()
    pixels = store.val.gather(np.array([1])).tobytes()
    place = whole.index(pixels)
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    (store.path / "val-00000.arrow").unlink()
    (store.path / "val-00000.arrow").write_bytes(damaged)
    remote.push(store.path, uri, ["val-00000.arrow"])
    with pytest.raises(UserError, match=r"its files are not those of its manifest\.json; copy the store there again"):
        open_store(uri)
    assert list(cache.iterdir()) == []


def test_a_uri_without_a_store_or_with_credentials_is_one_clear_sentence(bucket, stored):
    store, uri = stored
    with pytest.raises(UserError, match="there is no such folder"):
        prepare(bucket / "nothing", image_size=None)
    with pytest.raises(UserError, match="exists already"):
        pack(store.path.parent / "faces", uri, image_size=16)
    with pytest.raises(UserError, match=r"holds images of 16 px, and data\.image_size is 32"):
        prepare(uri, image_size=32)
    assert prepare(uri, image_size=None).fingerprint == store.fingerprint
    with pytest.raises(UserError, match="has credentials in it") as raised:
        is_store(uri.replace("s3://", f"s3://key:{SECRET}@"))
    assert SECRET not in str(raised.value)


def test_foreign_manifest_leads_to_no_folder_but_the_cache(stored, cache):
    store, uri = stored
    edit_manifest(store.path, fingerprint="../../../elsewhere")
    remote.push(store.path, uri, ["manifest.json"])
    with pytest.raises(UserError, match=r"\(fingerprint: String should match pattern"):
        open_store(uri)


@pytest.fixture
def upload(folder, bucket, request):
    """Copies the folder to a URI, which it returns."""

    def copy():
        location = bucket / request.node.name / "faces"
        location.push(folder, [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
        return str(location)

    return copy


def test_a_folder_at_a_uri_is_listed_once(folder, upload, cache, monkeypatch):
    uri, listings = upload(), []

    def listed(uri, real=remote.listed):
        listings.append(remote.name_of(uri))
        return real(uri)

    monkeypatch.setattr(remote, "listed", listed)
    data = find_data(uri)
    assert data.count_rows() == 8
    store = prepare(data, image_size=None)
    assert store.fingerprint == pack(folder, cache / "here", image_size=20).fingerprint
    assert (listings.count("images"), listings.count("annotations")) == (2, 2), "once a split"


def at(uri, folder):
    remote.pull(uri, folder, remote.names(uri, "*"))
    return files_of(folder)


def test_a_folder_at_a_uri_is_packed_as_one_on_a_disk(folder, tmp_path, upload, cache, capsys):
    (folder / "train_set/images/2.png").write_bytes(b"")
    (folder / "train_set/annotations/3_prob_rank.txt").write_text("")
    uri = upload()
    here = pack(folder, tmp_path / "here", image_size=20, skip_bad=True)
    there = pack(uri, tmp_path / "there", image_size=20, skip_bad=True)
    assert files_of(here.path) == files_of(there.path)
    with pytest.raises(UserError) as raised:
        pack(uri, tmp_path / "refused", image_size=20)
    assert [fault.partition(": ")[2].partition(" (")[0] for fault in raised.value.faults[:2]] == [
        "empty annotation",
        "image cannot be decoded",
    ]
    assert all(fault.startswith(f"{uri}: ") for fault in raised.value.faults)
    capsys.readouterr()
    assert find_data(uri).count_rows() == 8
    prepared = prepare(uri, image_size=None, skip_bad=True)
    assert (prepared.image_size, prepared.fingerprint) == (20, here.fingerprint)
    assert capsys.readouterr().err.startswith(f"{uri}: packed once, at 20 px, into {prepared.path}\n")
    assert prepare(uri, image_size=None, skip_bad=True).path == prepared.path
    assert capsys.readouterr().err == f"{prepared.path}: rejected rows: 2, see {prepared.path / 'rejected.csv'}\n"


def test_stores_at_uris_are_those_on_a_disk_and_gone_on_with(folder, tmp_path, bucket, small_shards, monkeypatch):
    dests = {size: bucket / "sizes" / f"{size}px" for size in (24, 16)}
    pushed = set()

    def push(folder, uri, names, real=remote.push):
        pushed.update(f"{remote.name_of(uri)}/{name}" for name in names)
        real(folder, uri, names)

    def broken_off(function, tasks):
        for number, task in enumerate(tasks):
            if number == 3:
                raise KeyboardInterrupt
            yield function(task)

    monkeypatch.setattr(remote, "push", push)
    with pytest.raises(KeyboardInterrupt):
        pack_sizes(Folder(folder), dests, pmap=broken_off)
    assert not any(map(is_store, dests.values()))
    assert {name for name in pushed if "24px" in name} == {f"24px/train-0000{i}.arrow" for i in range(6)}

    pushed.clear()
    picture(77).save(folder / "train_set/images/3.png")
    dests[24].delete(["train-00004.arrow"])
    pack_sizes(Folder(folder), dests, pmap=map)
    assert {name for name in pushed if "24px/train" in name} == {f"24px/train-0000{i}.arrow" for i in range(2, 8)}
    assert {name for name in pushed if "16px/train" in name} == {f"16px/train-0000{i}.arrow" for i in range(1, 4)}
    for size, dest in dests.items():
        alone = pack(folder, tmp_path / f"{size}", image_size=size)
        assert at(str(dest), tmp_path / f"at{size}") == files_of(alone.path)


def test_rows_at_fault_are_set_aside_at_a_uri_too_or_nothing_is_left(folder, tmp_path, small_shards):
    for id_ in (0, 1, 6):  # all of a shard, and one of another
        (folder / f"train_set/images/{id_}.png").write_bytes(b"")
    uri = (tmp_path / "at fault").as_uri()
    dest = Remote(uri)
    with pytest.raises(UserError, match=r"image cannot be decoded \(3 files\)"):
        pack_sizes(Folder(folder), {16: dest}, workers=1)
    assert remote.names(uri, "*") == []
    packed = pack(folder, tmp_path / "here", image_size=16, skip_bad=True)
    pack_sizes(Folder(folder), {16: dest}, workers=1, skip_bad=True)
    assert at(uri, tmp_path / "there") == files_of(packed.path)
