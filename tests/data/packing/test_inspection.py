"""`pack --check`: what it finds in a set of faces."""

import shutil

import numpy as np
import pytest
from PIL import Image

from raytune_emotion.cli import command_main
from raytune_emotion.data.packing.inspection import inspect
from raytune_emotion.storage.locations import Folder
from tests.support.faces import picture, write_folder, write_row


@pytest.fixture
def faces(tmp_path):
    """Six and three images of 20 px, of which one of each split is the same, in other formats, and two more."""
    folder = write_folder(tmp_path / "faces")
    Image.open(folder / "train_set/images/1.png").save(folder / "train_set/images/other.bmp")
    shutil.copy(folder / "train_set/annotations/1_prob_rank.txt", folder / "train_set/annotations/other_prob_rank.txt")
    Image.open(folder / "train_set/images/2.png").save(folder / "val_set/images/leak.bmp")
    spiked = "1" + ",0" * 12
    (folder / "val_set/annotations/leak_prob_rank.txt").write_text(spiked)
    return folder


def test_counts_labels_duplicates_and_leaks_are_found(faces):
    found = inspect(Folder(faces))
    train, val = found.splits["train"], found.splits["val"]
    assert (train.images, val.images, train.duplicates, val.duplicates) == (7, 4, 1, 0)
    assert found.leaks == [("train_set/images/2.png", "val_set/images/leak.bmp")]
    assert set(train.sides) == {(20, 20)}
    assert train.entropy == pytest.approx(np.log2(13), abs=1e-3)
    assert val.entropy == pytest.approx(np.log2(13) * 3 / 4, abs=1e-3)
    assert val.mean_K[0] == pytest.approx((1 + 3 / 13) / 4, abs=1e-3)
    assert found.faults == []


def test_command_prints_it_and_packs_nothing(faces, tmp_path, capsys):
    assert command_main("pack", [str(faces), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{faces}: 7 images to train on and 4 to validate on"
    assert lines[1] == "sizes: median 20 x 20 px, smallest 20 x 20, largest 20 x 20"
    assert "duplicates: 1 in train, 0 in val" in lines
    assert lines[-1] == (
        "leaks: 1 validation image also in train: val_set/images/leak.bmp is train_set/images/2.png; remove one of each"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_classes_that_cannot_be_packed_are_refused_here_too(tmp_path, capsys):
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "faces.csv").write_text("image,split,calm,\x1b[31mred\n1.png,train,0.5,0.5\n1.png,val,0.5,0.5\n")
    assert command_main("pack", [str(tmp_path / "faces.csv"), "--check"]) == 2
    said = "error: data: each class needs a name of printable characters, got '\\x1b[31mred'\n"
    assert capsys.readouterr() == ("", said)


def test_rows_at_fault_are_told_after_all_else(faces, capsys):
    (faces / "val_set/images/1000.png").write_bytes(b"no picture")
    write_row(faces, "train", "bad", text="0.5,0.5")
    assert command_main("pack", [str(faces), "--check"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{faces}: 7 images to train on and 3 to validate on")
    assert [line.split(": ")[2].partition(" (")[0] for line in err.splitlines()] == [
        "wrong number of values", "image cannot be decoded"
    ]  # fmt: skip


def test_destination_is_needed_to_pack(faces, capsys):
    assert command_main("pack", [str(faces)]) == 2
    assert capsys.readouterr().err == "error: DEST: name the store to write, or only inspect SRC with --check\n"
