"""Tables of faces: what they may hold, what is refused, and that a study is packed from one as from a folder."""

import errno
import hashlib
import os
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.packing.validate import read_rows
from raytune_emotion.data.prepare import find_data, prepare
from raytune_emotion.data.progress import progress
from raytune_emotion.data.sources import list_source
from raytune_emotion.data.table import list_table
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import Folder, Remote
from tests.support.faces import picture

SPLITS = ["train", "train", "train", "val"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "faces").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "faces" / f"{number}.png")
    return tmp_path


def write(folder, lines, header="image,split,happy,sad,calm", name="faces.csv"):
    (folder / name).write_text("\n".join([header, *lines]) + "\n")
    return Folder(folder / name)


def rows(values="0.5,0.25,0.25"):
    return [f"faces/{n}.png,{split},{values}" for n, split in enumerate(SPLITS)]


def test_no_bar_waits_for_annotations_that_are_read_already(folder):
    faces, bars = list_table(write(folder, rows())), progress(shown=False)
    read_rows(faces, faces.own_classes, map, bars, skip_bad=False)
    assert bars.tasks == []


def faults_of(place, **options):
    with pytest.raises(UserError) as error:
        pack(place, place.path.parent / "store", image_size=16, **options)
    assert not (place.path.parent / "store").exists()
    return error.value.faults


def test_probabilities_of_a_table_are_packed_as_they_are(folder, capsys):
    store = pack(write(folder, rows("0.5,0.1,0.4")), folder / "store", image_size=16)
    assert store.classes == ("happy", "sad", "calm")
    assert list(store.train.ids) == [f"faces/{n}.png" for n in range(3)]
    assert list(store.val.ids) == ["faces/3.png"]
    assert np.allclose(store.train.prob_NK, [0.5, 0.1, 0.4])
    assert capsys.readouterr().err == ""


def test_parquet_and_csv_give_the_same_store(folder):
    place = write(folder, rows("0.5,0.1,0.4"))
    pd.read_csv(place.path).to_parquet(folder / "faces.parquet")
    names = ("faces.csv", "faces.parquet")
    first, second = (pack(folder / name, folder / f"{name}.store", image_size=16) for name in names)
    assert first.fingerprint == second.fingerprint


def test_images_within_a_table_are_refused_in_a_short_sentence(folder):
    table = pd.read_csv(write(folder, rows("0.5,0.1,0.4")).path)
    table["image"] = [{"bytes": b"\xff" * 10_000, "path": name} for name in table["image"]]
    table.to_parquet(folder / "faces.parquet")
    (fault,) = faults_of(Folder(folder / "faces.parquet"))
    assert fault.endswith("the column image must hold paths of images, found dict; write the images as files")


def test_a_long_cell_is_cut_in_its_fault(folder):
    (fault, *_) = faults_of(write(folder, rows("0.5,0.1," + "x" * 5000)))
    assert "'" + "x" * 39 + "…'" in fault
    assert len(fault) < 400


def test_decimal_numbers_of_parquet_are_numbers(folder):
    table = pd.read_csv(write(folder, rows("0.5,0.1,0.4")).path)
    decimals = {name: [Decimal(str(value)) for value in table[name]] for name in ("happy", "sad", "calm")}
    table.assign(**decimals).to_parquet(folder / "faces.parquet")
    store = pack(folder / "faces.parquet", folder / "store", image_size=16)
    assert np.allclose(store.train.prob_NK, [0.5, 0.1, 0.4])


def test_index_of_a_data_frame_is_no_class(folder):
    place = write(folder, rows("5,1,4"))
    pd.read_csv(place.path).iloc[[2, 0, 3, 1]].to_parquet(folder / "faces.parquet")
    store = pack(folder / "faces.parquet", folder / "store", image_size=16)
    assert store.classes == ("happy", "sad", "calm")
    assert np.allclose(store.train.prob_NK, [0.5, 0.1, 0.4])


def test_votes_are_divided_by_their_sum_and_that_is_said(folder, capsys):
    lines = [*rows("8,2,0")[:3], "faces/3.png,val,1,0,0"]
    store = pack(write(folder, lines), folder / "store", image_size=16)
    assert np.allclose(store.train.prob_NK, [0.8, 0.2, 0])
    assert store.val.prob_NK.tolist() == [[1, 0, 0]]
    assert capsys.readouterr().err == f"{folder}/faces.csv: the numbers are votes; each row is divided by its sum\n"


def test_probabilities_that_do_not_sum_to_one_are_no_votes(folder):
    told = faults_of(write(folder, [*rows()[:3], "faces/3.png,val,0.5,0.5,1"]))
    assert told[0].startswith(f"{folder}/faces.csv: sum is not one (1 row): faces/3.png (line 5: 2)")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("nan,1,2", "values that are not finite (1 row): faces/3.png (line 5: nan for happy)"),
        ("1,inf,2", "values that are not finite (1 row): faces/3.png (line 5: inf for sad)"),
        ("1e308,1e308,1", "values that are not finite (1 row): faces/3.png (line 5: their sum)"),
        ("2,1,-1", "negative values (1 row): faces/3.png (line 5: -1 for calm)"),
        ("0,0,0", "no votes (1 row): faces/3.png (line 5)"),
    ],
)
def test_wrong_votes_are_faults_of_their_row_alone(folder, values, said):
    told = faults_of(write(folder, [*rows("8,2,0")[:3], f"faces/3.png,val,{values}"]))
    assert told == (f"{folder}/faces.csv: {said}",)


def test_split_by_hash_of_the_path_is_stated_and_depends_on_the_path_alone(folder, capsys):
    for number in range(4, 60):
        picture(number).save(folder / "faces" / f"{number}.png")
    lines = [f"faces/{number}.png,0.5,0.25,0.25" for number in range(60)]
    place = write(folder, lines, "image,happy,sad,calm")
    store = pack(place, folder / "store", image_size=16)

    def share(path):
        return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64

    wanted = sorted(path for number in range(60) if share(path := f"faces/{number}.png") < 0.1)
    assert list(store.val.ids) == wanted
    assert capsys.readouterr().err == (
        f"{place}: has no column split; about 10% of the rows, chosen by a hash of the path, are used for validation "
        f"({len(wanted)} of 60); if several images show one person or come from one video, add the column, so that "
        f"none is on both sides\n"
    )


def test_table_without_splits_and_too_small_for_a_validation_set_is_told_to_name_them(folder):
    lines = [f"faces/{number}.png,0.5,0.25,0.25" for number in range(1, 4)]  # of training, by their hashes
    advice = "add a column split, with train or val in each row"
    (told,) = faults_of(write(folder, lines, "image,happy,sad,calm"))
    assert told == f"{folder}/faces.csv, split val: no valid row; {advice}"
    (told,) = faults_of(write(folder, rows()[:3]))
    assert told == f"{folder}/faces.csv, split val: no valid row"


def test_rows_of_a_test_split_are_left_out(folder, capsys):
    lines = [*rows(), "faces/none.png,test,9,9,9"]
    assert len(pack(write(folder, lines), folder / "store", image_size=16).train) == 3
    assert "leaving out 1 row of the split test" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/etc/face.png", "../face.png", "faces/../../face.png", "", "faces//1.png"])
def test_paths_that_leave_the_folder_are_refused(folder, path):
    picture(9).save(folder.parent / "face.png")
    told = faults_of(write(folder, [*rows(), f"{path},train,0.5,0.25,0.25"]))
    assert told[0].startswith(f"{folder}/faces.csv: path is empty or leaves the folder of the table (1 row): ")


def test_row_of_a_folder_that_cannot_be_listed_is_at_fault_alone(folder):
    long = "a" * 300
    (folder / "loop").symlink_to("loop")
    place = write(folder, [*rows(), f"{long}/1.png,train,0.5,0.25,0.25", "loop/1.png,val,0.5,0.25,0.25"])
    told = faults_of(place)
    assert told[0] == f"{place}: image is missing (2 rows): {long}/1.png (line 6), loop/1.png (line 7)"
    assert len(pack(place, folder / "store", image_size=16, skip_bad=True).train) == 3


def test_folder_that_may_not_be_listed_is_told_from_a_disk_that_fails(folder, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    place = write(folder, rows())
    monkeypatch.setattr(Folder, "list_files", refuse)
    number = errno.EACCES
    assert list_table(place).there == {}
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        list_table(place)


def test_all_faults_of_rows_are_named_at_once(folder):
    (folder / "faces/torn.png").write_bytes(b"no picture")
    lines = [
        *rows(),
        "faces/none.png,train,0.5,0.25,0.25",
        "faces/1.png,val,0.5,0.25,0.25",
        "faces/torn.png,train,0.5,0.25,0.25",
        "faces/2.png,train,0.5",
        "faces/a.png,train,0.5,lots,0.25",
        "faces/b.png,holdout,0.5,0.25,0.25",
    ]
    for name in "ab":
        picture(7).save(folder / "faces" / f"{name}.png")
    told = [fault.removeprefix(f"{folder}/faces.csv: ") for fault in faults_of(write(folder, lines))]
    assert told == [
        "text in place of numbers (1 row): faces/a.png (line 10: 'lots')",
        "image cannot be decoded (1 file): faces/torn.png (no picture in JPEG, PNG, BMP, GIF or WebP format)",
        "wrong number of cells (1 row): faces/2.png (line 9: 3 cells for 5 columns)",
        "image is missing (1 row): faces/none.png (line 6)",
        "image is named twice (1 row): faces/1.png (line 7)",
        "split is neither train nor val nor test (1 row): faces/b.png (line 11: 'holdout')",
        "nothing is packed because of these faults; repair them, or leave these rows out with --skip-bad",
    ]
    store = pack(folder / "faces.csv", folder / "store", image_size=16, skip_bad=True)
    assert (len(store.train), len(store.val)) == (3, 1)
    assert len((folder / "store/rejected.csv").read_text().splitlines()) == 7


def test_a_number_with_a_space_that_is_not_ascii_is_text(folder):
    (fault, _) = faults_of(write(folder, [*rows()[1:], "faces/0.png,train,0.5,\u00a00.25,0.25"]))
    assert fault.endswith(r"text in place of numbers (1 row): faces/0.png (line 5: '\xa00.25')")


def test_rejected_rows_are_counted_by_their_lines(folder):
    (folder / "faces/torn.png").write_bytes(b"no picture")
    lines = [
        *rows(),
        ",train,0.5,0.25,0.25",
        ",train,0.5,0.25,0.25",
        "faces/1.png,train,0.5,0.25,0.25",
        "faces/1.png,train,0.5,0.25,0.25",
        "faces/torn.png,test,0.5,0.25,0.25",
        "faces/torn.png,train,2,0.25,0.25",  # two faults in one row
        "faces/torn.png,train,0.5,0.25,0.25",
    ]
    store = pack(write(folder, lines), folder / "store", image_size=16, skip_bad=True)
    assert store.rejected == 6
    assert len((folder / "store/rejected.csv").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("picture,happy,sad", "has the columns picture, happy, sad; exactly one must be named image"),
        ("image,path,happy,sad", "exactly one must be named image"),
        ("image,happy,happy", "column names are empty or repeated: 'happy'; give each column its own name"),
        ("image,happy", "has fewer than two classes; each column beside image and split is one"),
        ("image,split,Split,happy,sad", "has several columns named split, ignoring case; keep one"),
        ("image,split,happy,sad", "has no row below its header"),
        ("", "faces.csv: has no header; the first line must name the columns, one of them image"),
    ],
)
def test_table_without_the_right_columns_is_refused_at_once(folder, header, said):
    with pytest.raises(UserError) as error:
        find_data(write(folder, [], header))
    assert said in str(error.value)


def test_files_that_are_no_table(folder):
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        list_table(Folder(folder / "none.csv"))
    (folder / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read as a table \("):
        list_table(Folder(folder / "bad.parquet"))
    (folder / "latin.csv").write_bytes(b"image,a,b\n\xe9.png,1,0\n")
    with pytest.raises(UserError, match=r"latin\.csv: cannot be read as a table \("):
        list_table(Folder(folder / "latin.csv"))


def test_table_behind_a_link_is_known_by_either_name(folder):
    """As in a cache of the Hugging Face hub, and as a short name for a long path."""
    (folder / "blobs").mkdir()
    write(folder, rows("0.5,0.1,0.4")).path.rename(folder / "blobs" / "0a1b")
    (folder / "train.csv").symlink_to("blobs/0a1b")
    store = pack(folder / "train.csv", folder / "store", image_size=16)
    assert (store.classes, len(store.train)) == (("happy", "sad", "calm"), 3)
    pd.read_csv(folder / "train.csv").to_parquet(folder / "faces.parquet")
    (folder / "blobs" / "short").symlink_to("../faces.parquet")
    again = pack(folder / "blobs" / "short", folder / "again", image_size=16)
    assert again.fingerprint == store.fingerprint


def test_folder_with_the_name_of_a_table_is_told_as_such(folder):
    (folder / "real.parquet").mkdir()
    (folder / "link.csv").symlink_to("real.parquet")
    here, there = Folder(folder), Remote(folder.as_uri())
    for place in (here / "real.parquet", here / "link.csv", there / "real.parquet"):
        with pytest.raises(UserError, match="is a folder with the extension of a table; name a file, or rename the"):
            find_data(place)
    (folder / "dangling.csv").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"dangling\.csv: no such file"):
        find_data(folder / "dangling.csv")


def test_classes_may_be_reordered_but_not_renamed(folder):
    place = write(folder, rows("0.5,0.1,0.4"))
    store = pack(place, folder / "store", image_size=16, classes=("calm", "happy", "sad"))
    assert np.allclose(store.train.prob_NK, [0.4, 0.5, 0.1])
    with pytest.raises(UserError, match="columns are the classes happy, sad, calm, but the classes calm, glad, sad"):
        pack(place, folder / "other", image_size=16, classes=("calm", "glad", "sad"))


def test_study_is_trained_on_a_table_which_is_packed_once(folder, capsys):
    place = write(folder, rows("0.5,0.1,0.4"))
    store = prepare(place, image_size=None)
    assert (store.image_size, store.classes) == (20, ("happy", "sad", "calm"))
    assert "packing once, at 20 px" in capsys.readouterr().err
    assert prepare(place, image_size=None).path == store.path
    picture(9, (30, 30)).save(folder / "faces/0.png")
    assert prepare(place, image_size=20).path != store.path
    write(folder, rows("0.5,0.2,0.3"))
    assert prepare(place, image_size=20).train.prob_NK[0].tolist() == pytest.approx([0.5, 0.2, 0.3])


def test_table_at_a_mistyped_uri_is_refused_by_a_sentence():
    with pytest.raises(UserError, match=r"^ftp://host/faces\.csv: cannot be used \(.*; name a folder, or a URI"):
        find_data("ftp://host/faces.csv")


def test_table_at_a_uri(folder):
    write(folder, rows("0.5,0.1,0.4"))
    faces = list_source(find_data((folder / "faces.csv").as_uri()).location)
    assert [len(files) for files in faces.images.values()] == [3, 1]
    there = pack((folder / "faces.csv").as_uri(), folder / "from uri", image_size=16)
    assert there.fingerprint == pack(folder / "faces.csv", folder / "from here", image_size=16).fingerprint
