import csv
import errno
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytune_emotion.data.affectnet import list_faces
from raytune_emotion.data.decode import decode_at_sizes, decode_image
from raytune_emotion.data.faces import Kind
from raytune_emotion.data.packing import blocks
from raytune_emotion.data.packing import pack as pack_module
from raytune_emotion.data.packing.pack import pack, pack_sizes, tell_rejected
from raytune_emotion.data.store import is_store, open_store, read_manifest
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.storage import locations, remote
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.locations import Folder, Remote, check_disk_space
from tests.support.faces import UNIFORM, picture, write_row
from tests.support.folders import files_of


def spiked(place):
    return ",".join("0.9999999999999" if i == place else "1e-14" for i in range(13))


def test_a_store_holds_what_the_folder_holds(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    assert is_store(tmp_path / "store")
    assert (packed.path, packed.image_size, packed.classes, packed.rejected) == (tmp_path / "store", 16, EMOTIONS, 0)
    rows = list_faces(Folder(folder)).scan(EMOTIONS, map).rows
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


def test_the_number_of_workers_and_of_shards_changes_nothing(folder, tmp_path, request):
    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    (spoiled / "train_set/images/3.png").write_bytes(b"")
    one = pack(spoiled, tmp_path / "one", image_size=16, workers=1, skip_bad=True)
    # The two begin anew with a script, also with one that does not ask whether it is the main module.
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom raytune_emotion.data.packing.pack import pack\n"
        "print('once')\n"
        "pack(Path(sys.argv[1]), Path(sys.argv[2]), image_size=16, workers=2, skip_bad=True)\n"
    )
    command = [sys.executable, str(script), str(spoiled), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "once\n", 1), done.stderr
    two = open_store(tmp_path / "two")
    assert one.rejected == two.rejected == 1
    assert one.fingerprint == two.fingerprint
    assert files_of(one.path) == files_of(two.path)
    whole = pack(folder, tmp_path / "whole", image_size=16, workers=1)
    request.getfixturevalue("small_shards")
    sharded = pack(folder, tmp_path / "sharded", image_size=16, workers=1)
    assert [len(shard) for shard in sharded.train.shards] == [2, 2, 2, 2]
    assert sharded.fingerprint == whole.fingerprint


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
    (train / "annotations/32_prob_rank.txt").symlink_to("/proc/self/clear_refs")  # which not even root can read
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
    "meanwhile",
    ["nothing", "a picture changes", "a row is added", "a record is torn", "a record is short", "a shard is torn"],
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
    elif meanwhile == "a record is short":
        record = part / ".train-00000004.done"
        known = json.loads(record.read_text())
        record.write_text(json.dumps({**known, "digests": known["digests"][: len(known["digests"]) // 2]}))
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
    of_tables = {Kind.CELLS, Kind.OUTSIDE, Kind.MISSING, Kind.TWICE, Kind.SPLIT, Kind.NO_VOTES}
    assert set(expected) == set(Kind) - of_tables
    with pytest.raises(UserError) as raised:
        pack(folder, tmp_path / "there" / "store", image_size=16)
    *told, last = raised.value.faults
    assert len(told) == len(expected)
    for sentence, (kind, files) in zip(told, expected.items(), strict=True):
        assert sentence.startswith(f"{folder}: {kind.value} ({len(files)} file")
        assert all(f"train_set/{file}" in sentence for file in files)
    advice = "repair them, or leave these rows out with --skip-bad"
    assert last == f"{folder}: nothing is packed because of these faults; {advice}"
    assert list((tmp_path / "there").iterdir()) == []


def test_skip_bad_sets_aside_exactly_the_bad_rows(folder, tmp_path, small_shards, capsys):
    good = pack(folder, tmp_path / "good", image_size=16)
    expected = spoil(folder)
    packed = pack(folder, tmp_path / "store", image_size=16, skip_bad=True, workers=1)
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
    assert raised.value.faults[-1] == f"{folder / 'val_set'}: no valid row"
    assert "(3 files)" in raised.value.faults[0]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("skip_bad", [False, True])
def test_empty_splits_are_told_beside_the_faults_of_all_rows_only_if_these_are_skipped(folder, tmp_path, skip_bad):
    with pytest.raises(UserError) as raised:
        pack(folder, tmp_path / "store", image_size=16, classes=("a", "b", "c"), skip_bad=skip_bad)
    assert any("expected one value for each of the 3 classes a, b, c" in fault for fault in raised.value.faults)
    empty = [f"{folder / split}: no valid row" for split in ("train_set", "val_set")]
    assert [fault for fault in raised.value.faults if fault in empty] == (empty if skip_bad else [])


def test_settings_and_sources_that_make_no_sense_are_refused(folder, tmp_path):
    packed = pack(folder, tmp_path / "store", image_size=16)
    with pytest.raises(UserError, match="exists already"):
        pack(folder, tmp_path / "store", image_size=16)
    with pytest.raises(UserError, match="already a packed store"):
        pack(packed.path, tmp_path / "other", image_size=16)
    with pytest.raises(UserError, match="image_size"):
        pack(folder, tmp_path / "other", image_size=0)
    with pytest.raises(UserError, match="not a folder in the layout of AffectNetFused"):
        pack(tmp_path, tmp_path / "other", image_size=16)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is not a folder"):
        pack(folder, tmp_path / "file" / "other", image_size=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "file", "store"]


def test_a_disk_too_small_for_all_sizes_together_is_told_before_it_is_full(folder, tmp_path, monkeypatch):
    dests = {size: Folder(tmp_path / "stores" / f"{size}px") for size in (16, 24)}
    # Of 11 images, 8.4 kB at 16 px and 19 kB at 24 px.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    said = rf"^{tmp_path}/stores: needs 27\.5 kB, but only 20 kB are free; choose a disk with room"
    with pytest.raises(Breakdown, match=said):
        pack_sizes(Folder(folder), dests, workers=1)
    assert list((tmp_path / "stores").iterdir()) == []
    pack_sizes(Folder(folder), {24: dests[24]}, workers=1)


def test_what_lies_on_a_disk_already_needs_no_more_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    (tmp_path / "there").mkdir()
    write_text(tmp_path / "there" / "shard", "." * 100_000)
    needed = {Folder(tmp_path): 0, Folder(tmp_path / "there"): 100_000, Remote("s3://bucket/a"): 10**15}
    check_disk_space(needed, "choose another disk")
    with pytest.raises(Breakdown, match=r": needs 600 kB, but only .* are free; choose another disk"):
        check_disk_space(needed | {Folder(tmp_path): 500_000}, "choose another disk")


def test_packing_goes_on_after_a_disk_was_full(folder, tmp_path, small_shards, monkeypatch):
    written, room = [], 2

    def write_shard(path, *args, real=blocks.write_shard):
        if len(written) == room:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        real(path, *args)

    monkeypatch.setattr(blocks, "write_shard", write_shard)
    said = "store: No space left on device while packing; free some space, and the same command continues; or choose"
    with pytest.raises(Breakdown, match=said):
        pack(folder, tmp_path / "store", image_size=16, workers=1)
    room = 1000
    pack(folder, tmp_path / "store", image_size=16, workers=1)
    assert len(written) == len(list((tmp_path / "store").glob("*.arrow"))) == 6


def test_a_bad_picture_is_not_decoded_again_but_a_file_that_cannot_be_read_is_tried_again(
    folder, tmp_path, small_shards, monkeypatch
):
    (folder / "train_set/images/1.png").write_bytes(b"")
    (folder / "train_set/images/3.png").unlink()
    (folder / "train_set/images/3.png").symlink_to("/proc/self/clear_refs")
    begun, most = [], 3

    def pack_rows(block, *, real=blocks._pack):
        if len(begun) == most:
            interrupt()
        begun.append((block.split, block.start))
        return real(block)

    monkeypatch.setattr(blocks, "_pack", pack_rows)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "store", image_size=16, skip_bad=True, workers=1)
    assert begun == [("train", 0), ("train", 2), ("train", 4)]
    begun, most = [], 1000
    packed = pack(folder, tmp_path / "store", image_size=16, skip_bad=True, workers=1)
    assert {("train", 0), ("train", 2), ("train", 4)} & set(begun) == {("train", 2)}
    fresh = pack(folder, tmp_path / "fresh", image_size=16, skip_bad=True, workers=1)
    assert (packed.fingerprint, packed.rejected) == (fresh.fingerprint, 2)


@pytest.mark.parametrize("which", ["images/3.png", "annotations/3_prob_rank.txt"])
def test_a_storage_that_fails_for_a_moment_makes_no_row_bad(folder, tmp_path, small_shards, monkeypatch, which):
    class Failing(io.FileIO):
        def readall(self):
            if str(self.name).endswith(which) and fails:
                raise OSError(errno.EIO, "Input/output error", self.name)
            return super().readall()

    fails = True
    monkeypatch.setattr(locations.io, "FileIO", Failing)
    with pytest.raises(OSError, match="Input/output error"):
        pack(folder, tmp_path / "store", image_size=16, skip_bad=True, workers=1)
    fails = False
    assert pack(folder, tmp_path / "store", image_size=16, skip_bad=True, workers=1).rejected == 0


def test_a_machine_without_the_folder_is_one_clear_sentence(folder, tmp_path):
    def elsewhere(function, tasks):
        folder.rename(tmp_path / "not shared")
        return map(function, tasks)

    with pytest.raises(Breakdown, match=r"faces: not found on .*; share it under this path with every node, or"):
        pack_sizes(Folder(folder), {16: Folder(tmp_path / "store")}, pmap=elsewhere)


@given(
    annotation=st.binary(max_size=60) | st.text("0123456789.,-e+nai ", max_size=60).map(str.encode),
    image=st.binary(max_size=60)
    | st.sampled_from([b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP"]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_annotation_and_image_is_packed_or_refused_by_a_sentence(annotation, image, folder, tmp_path, exit_code_of):
    write_row(folder, "train", "odd")
    (folder / "train_set/annotations/odd_prob_rank.txt").write_bytes(annotation)
    (folder / "train_set/images/odd.png").write_bytes(image)
    dest = tmp_path / "store"
    assert exit_code_of(lambda: pack(folder, dest, image_size=16, workers=1)) == 2
    assert not dest.exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def at(uri, folder):
    remote.pull(uri, folder, remote.names(uri, "*"))
    return files_of(folder)


@pytest.mark.long
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
    assert {name for name in pushed if "24px/train" in name} == {f"24px/train-0000{i}.arrow" for i in range(6)}

    pushed.clear()
    picture(77).save(folder / "train_set/images/3.png")
    dests[24].delete(["train-00004.arrow"])
    pack_sizes(Folder(folder), dests, pmap=map)
    assert {name for name in pushed if "24px/train" in name} == {f"24px/train-0000{i}.arrow" for i in range(2, 8)}
    assert {name for name in pushed if "16px/train" in name} == {f"16px/train-0000{i}.arrow" for i in range(1, 4)}
    for size, dest in dests.items():
        alone = pack(folder, tmp_path / f"{size}", image_size=size)
        assert at(str(dest), tmp_path / f"at{size}") == files_of(alone.path)


def assert_nothing_is_packed_again(folder, dests, monkeypatch):
    """Go on with an attempt that broke off, and look for whole stores and nothing beside them."""
    monkeypatch.setattr(blocks, "_pack", interrupt)
    pack_sizes(Folder(folder), dests, workers=1)
    store = ["manifest.json", "train-00000.arrow", "val-00000.arrow"]
    assert [dest.find("*") for dest in dests.values()] == [store] * len(dests)


def test_attempt_that_breaks_off_between_two_manifests_is_gone_on_with(folder, tmp_path, monkeypatch):
    dests = {size: Remote((tmp_path / "there").as_uri()) / f"{size}px" for size in (16, 24)}

    def write_first(dest, content, i, *args, real=pack_module.write_manifest):
        interrupt() if i else real(dest, content, i, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_manifest", write_first)
        with pytest.raises(KeyboardInterrupt):
            pack_sizes(Folder(folder), dests, workers=1)
    assert_nothing_is_packed_again(folder, dests, monkeypatch)


def test_files_of_somebody_else_at_a_uri_are_left_as_they_are(folder, tmp_path):
    dest, theirs = Remote((tmp_path / "there").as_uri()), ["train-00000.arrow", ".notes.done"]
    for name in theirs:
        with dest.write(name) as path:
            path.write_text(name)
    with pytest.raises(UserError, match="there: exists already; name another destination, or remove it"):
        pack_sizes(Folder(folder), {16: dest}, workers=1)
    assert files_of(tmp_path / "there") == {name: name.encode() for name in theirs}


def test_source_that_is_wrong_by_now_leaves_nothing_at_a_uri(folder, tmp_path, small_shards, monkeypatch):
    dest = Remote((tmp_path / "there").as_uri())
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_delete_leftovers", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack_sizes(Folder(folder), {16: dest}, workers=1)
    assert dest.find("*.done", "manifest.json")
    next((folder / "val_set" / "annotations").iterdir()).write_bytes(b"")
    with pytest.raises(UserError, match="nothing is packed because of these faults"):
        pack_sizes(Folder(folder), {16: dest}, workers=1)
    assert dest.find("*") == []


@pytest.mark.parametrize("at_uri", [False, True])
def test_option_that_is_wrong_leaves_what_an_attempt_has_packed(folder, tmp_path, monkeypatch, at_uri):
    there = tmp_path / "there"
    dests = {16: Remote(there.as_uri()) if at_uri else Folder(there)}
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack_sizes(Folder(folder), dests, workers=1)
    with pytest.raises(UserError, match="13 values for 2 classes"):
        pack_sizes(Folder(folder), dests, classes=("a", "b"), workers=1)
    assert_nothing_is_packed_again(folder, dests, monkeypatch)


def test_attempt_that_breaks_off_at_its_very_end_packs_nothing_again(folder, tmp_path, monkeypatch):
    dests = {size: Remote((tmp_path / "there").as_uri()) / f"{size}px" for size in (16, 24)}

    def delete(uri, names, real=remote.delete):
        interrupt() if ".begun" in names else real(uri, names)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "delete", delete)
        with pytest.raises(KeyboardInterrupt):
            pack_sizes(Folder(folder), dests, workers=1)
    assert_nothing_is_packed_again(folder, dests, monkeypatch)


def test_place_of_a_file_below_a_uri_keeps_the_query_at_its_end(bucket, capsys):
    tell_rejected(bucket / "store", 3)
    uri, _, query = str(bucket).partition("?")
    assert capsys.readouterr().err.endswith(f" rejected rows: 3, see {uri}/store/rejected.csv?{query}\n")
    with (bucket / "damaged").write("manifest.json") as path:
        path.write_text("{")
    with pytest.raises(UserError, match=f"^{re.escape(f'{uri}/damaged/manifest.json?{query}')}: not a description of"):
        read_manifest(bucket / "damaged")


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
