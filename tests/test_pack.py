import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raytune_emotion.cli import command_main
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.prepare import find_data, prepare
from raytune_emotion.data.store import open_store
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.study.creation import new_spec
from raytune_emotion.tuning.study.request import SearchRequest
from raytune_emotion.tuning.study.trials import DATA
from tests.support.commands import heed_ctrl_c
from tests.support.faces import write_folder, write_row

#: What is said behind a command that takes long.
ASKED_FIRST = "  # --dry-run estimates how long it takes"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "faces")


def test_what_was_packed_is_told(folder, tmp_path, capsys):
    dest = tmp_path / "store"
    assert command_main("pack", [str(folder), str(dest), "--image-size", "32"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"{dest}: 6 images to train on and 3 to validate on"
    assert re.fullmatch(r"32 px, 13 classes, 0\.0 MB, rejected rows: 0", lines[1])
    assert re.fullmatch(r"\d+\.\d s, [\d,]+ images/s", lines[2])
    assert lines[3] == f"next: python -m raytune_emotion.search --data {dest}{ASKED_FIRST}"
    assert captured.err == ""
    assert open_store(dest).image_size == 32


def test_the_default_size_is_that_of_the_configuration(folder, tmp_path):
    assert command_main("pack", [str(folder), str(tmp_path / "store")]) == 0
    assert open_store(tmp_path / "store").image_size == 224


def test_a_destination_that_exists_is_refused(folder, tmp_path, capsys):
    (tmp_path / "store").mkdir()
    assert command_main("pack", [str(folder), str(tmp_path / "store")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'store'}: exists already")
    assert list((tmp_path / "store").iterdir()) == []


def test_faults_are_sentences_and_can_be_skipped(folder, tmp_path, capsys):
    (folder / "train_set/annotations/1_prob_rank.txt").write_text("0.5,0.5")
    (folder / "train_set/images/2.png").write_bytes(b"")
    command = [str(folder), str(tmp_path / "store"), "--image-size", "16"]
    assert command_main("pack", command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition(": ")[0] for line in captured.err.splitlines()] == ["error"] * 3
    assert "1_prob_rank.txt (2 values for 13 classes)" in captured.err
    assert "train_set/images/2.png" in captured.err
    assert not (tmp_path / "store").exists()

    assert command_main("pack", [*command, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "4 images to train on" in captured.out
    assert "rejected rows: 2" in captured.out
    assert captured.err == f"{tmp_path / 'store'}: rejected rows: 2, see {tmp_path / 'store/rejected.csv'}\n"


def test_other_classes_can_be_named(tmp_path):
    for split, id_ in (("train", "1"), ("val", "2")):
        write_row(tmp_path / "faces", split, id_, text="0.25,0.75,0")
    dest = tmp_path / "store"
    assert command_main("pack", [str(tmp_path / "faces"), str(dest), "--image-size", "16", "--classes", "a, b,c"]) == 0
    assert open_store(dest).classes == ("a", "b", "c")
    assert open_store(dest).val.prob_NK.tolist() == [[0.25, 0.75, 0]]
    assert len(EMOTIONS) == 13


def test_several_sizes_are_packed_side_by_side(folder, tmp_path, capsys):
    dest = tmp_path / "stores"
    assert command_main("pack", [str(folder), str(dest), "--image-size", "32", "16", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{dest}: 6 images to train on and 3 to validate on"
    assert [line.partition(",")[0] for line in lines[1:4]] == ["16 px", "24 px", "32 px"]
    assert lines[-1] == f"next: python -m raytune_emotion.search --data {dest / '16px'}{ASKED_FIRST}"
    for size in (16, 24, 32):
        alone = pack(folder, tmp_path / f"alone{size}", image_size=size)
        assert open_store(dest / f"{size}px").fingerprint == alone.fingerprint
        for file in alone.path.iterdir():
            assert (dest / f"{size}px" / file.name).read_bytes() == file.read_bytes()


def test_all_sizes_that_are_none_are_told_at_once(folder, tmp_path, capsys):
    sizes = ["-5", "0", "99999999999999", "32", "15"]
    assert command_main("pack", [str(folder), str(tmp_path / "store"), "--image-size", *sizes]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: --image-size: should be ") for line in errors)
    assert [line.rpartition(" ")[2] for line in errors] == ["-5", "0", "99999999999999", "15"]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (",,,", "expected a name before and after each comma, got ',,,'; name each class"),
        ("a,,b", "expected a name before and after each comma, got 'a,,b'; name each class"),
        ("a,b,a", "each class may be named only once, but these names occur again: a"),
    ],
)
@pytest.mark.parametrize(("option", "others"), [("--image-size=15", "--image-size"), ("--check", "--check")])
def test_classes_that_are_none_are_told_with_the_other_errors(folder, tmp_path, capsys, classes, said, option, others):
    assert command_main("pack", [str(folder), str(tmp_path / "store"), "--classes", classes, option]) == 2
    other, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: --classes: {said}")
    assert other.startswith(f"error: {others}: ")


def test_a_check_refuses_the_options_of_packing(folder, tmp_path, capsys):
    options = ["--check", "--skip-bad", "--address", "auto"]
    assert command_main("pack", [str(folder), str(tmp_path / "store"), *options]) == 2
    refused = [f"error: --check: packs nothing; leave {name} out" for name in ("DEST", "--skip-bad", "--address")]
    assert capsys.readouterr().err.splitlines() == refused


def test_a_store_can_be_verified(folder, tmp_path, capsys):
    dest = tmp_path / "stores"
    assert command_main("pack", [str(folder), str(dest), "--image-size", "16", "24"]) == 0
    capsys.readouterr()
    assert command_main("pack", [str(dest), "--check"]) == 0
    said = "all images and labels are unchanged since packing"
    assert capsys.readouterr().out.splitlines() == [f"{dest / size}: {said}" for size in ("16px", "24px")]
    shard = dest / "24px" / "val-00000.arrow"
    before, whole = shard.stat(), bytearray(shard.read_bytes())
    whole[whole.index(open_store(dest / "24px").val.gather(np.array([0])).tobytes())] ^= 1
    with shard.open("r+b") as file:
        file.write(whole)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk leaves no trace of it
    assert command_main("pack", [str(dest), "--check"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {dest / '24px'}: the files do not match manifest.json")
    with pytest.raises(UserError, match="the files do not match manifest"):
        prepare(dest, image_size=24)


def test_a_store_at_a_uri_is_verified_as_it_lies_there(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = tmp_path / "there"
    pack(folder, there.as_uri(), image_size=16)  # a sound copy is in the cache now
    assert command_main("pack", [there.as_uri(), "--check"]) == 0
    said = "all images and labels are unchanged since packing"
    assert capsys.readouterr().out == f"{there.as_uri()}: {said}\n"
    assert len(list((tmp_path / "cache" / "raytune_emotion" / "verified").iterdir())) == 1  # of the copy that stays
    shard = there / "val-00000.arrow"
    whole = bytearray(shard.read_bytes())
    whole[whole.index(open_store(there).val.gather(np.array([0])).tobytes())] ^= 1
    shard.unlink()  # what is mapped stays whole
    shard.write_bytes(whole)
    assert command_main("pack", [there.as_uri(), "--check"]) == 2
    assert capsys.readouterr().err == (
        f"error: {there.as_uri()}: the files do not match manifest.json; a copy or a disk may have failed; "
        "copy the store there again, or pack the folder again\n"
    )
    shard.unlink()
    assert command_main("pack", [there.as_uri(), "--check"]) == 2
    missing = f"error: {there.as_uri()}/val-00000.arrow: is missing; the store is damaged; pack the folder again\n"
    assert capsys.readouterr().err == missing


def test_a_disk_too_small_for_a_copy_to_be_verified_is_told_before_it_is_full(folder, tmp_path, capsys, monkeypatch):
    there = (tmp_path / "there").as_uri()
    assert command_main("pack", [str(folder), there, "--image-size", "16"]) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(remote, "pull", lambda uri, folder, names: names and pytest.fail("it is copied"))
    assert command_main("pack", [there, "--check"]) == 1
    said = f"{tempfile.gettempdir()}: needs [0-9.]+ kB, but only .* are free; choose another disk with TMPDIR\n"
    assert re.fullmatch(f"error: {said}", capsys.readouterr().err)


def test_stores_are_packed_to_a_uri_and_trained_on_from_there(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = (tmp_path / "there").as_uri()
    command = [str(folder), uri, "--image-size", "16", "24"]
    assert command_main("pack", command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python -m raytune_emotion.search --data {uri}/16px{ASKED_FIRST}"
    assert open_store(tmp_path / "there" / "24px").image_size == 24
    assert command_main("pack", command) == 2
    assert capsys.readouterr().err.startswith(f"error: {uri}/16px: exists already")

    model = ["--set", "model.backbone=test_resnet", "--set", "model.pretrained=false", "--epochs", "1"]
    command = ["--data", uri, *model, "--set", "data.image_size=16", "--results", str(tmp_path), "--name", "run"]
    assert command_main("train", command) == 0
    assert capsys.readouterr().err.startswith(f"{uri}/16px: fetched once, into {tmp_path}/cache/")
    assert (tmp_path / "run" / DATA).read_text() == f"{uri}/16px\n"


@pytest.mark.long
def test_ctrl_c_ends_it_and_another_attempt_goes_on(tmp_path):
    folder = write_folder(tmp_path / "faces", train=400)
    dest = tmp_path / "out" / "store"
    part = tmp_path / "out" / ".store.part"
    command = [sys.executable, "-m", "raytune_emotion.pack", str(folder), str(dest), "--image-size", "1024"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(part.glob(".train-*.done")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    said = "the packed images are kept; the same command continues\ninterrupted\n"
    assert (process.returncode, out, err) == (130, "", said)
    assert list((tmp_path / "out").iterdir()) == [part]


@pytest.mark.parametrize("sizes", [["16"], ["16", "32"]])
def test_what_is_printed_can_be_typed(tmp_path, capsys, monkeypatch, sizes):
    """Also with classes of one's own, which the store then knows."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for id_ in "12":
            write_row(tmp_path / "three faces", split, id_, text="0.25,0.25,0.5\n")
    argv = ["three faces", "my store", "--image-size", *sizes, "--classes", "calm,tense,sad"]
    assert command_main("pack", argv) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) not in out
    *_, line = out.splitlines()
    _, *command = shlex.split(line, comments=True)
    assert command[:3] == ["python", "-m", "raytune_emotion.search"]
    request = SearchRequest(results=Folder(tmp_path / "results"), data=Folder(Path(command[-1])), space=None)
    (tmp_path / "space.yaml").write_text("optim.lr: {log_uniform: [1e-3, 1e-2]}\nmodel.backbone: test_resnet\n")
    request = dataclasses.replace(request, space=tmp_path / "space.yaml")
    spec = new_spec(request, "mine", request.load_space(), find_data(request.data))
    assert spec.classes == ("calm", "tense", "sad")
    assert spec.settings({})["data.classes"] == ["calm", "tense", "sad"]
