import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_emotion.data.affectnet import list_faces, parse_annotation
from raytune_emotion.data.faces import Flaw, Kind, sentences
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import Folder
from tests.support.faces import UNIFORM, picture, write_folder, write_row


def listed(folder):
    return list_faces(Folder(folder))


def sentences_on(folder):
    faces = listed(folder)
    return sentences(faces, faces.scan(EMOTIONS, map).faults, EMOTIONS)


distributions = (
    st.lists(st.floats(0, 1), min_size=13, max_size=13)
    .filter(lambda values: math.fsum(values) > 1e-3)
    .map(lambda values: [v / math.fsum(values) for v in values])
)


@given(distributions)
@settings(max_examples=60)
def test_floats_come_back_exactly(values):
    assert parse_annotation((",".join(map(repr, values)) + "\n").encode()) == tuple(values)


@given(distributions)
@settings(max_examples=60)
def test_six_decimals_come_back_as_written(values):
    assert parse_annotation(",".join(f"{v:.6f}" for v in values).encode()) == tuple(round(v, 6) for v in values)


@given(distributions, st.floats(0.0011, 0.5), st.sampled_from([-1, 1]))
@settings(max_examples=60)
def test_a_sum_that_is_not_one_is_a_flaw(values, error, sign):
    result = parse_annotation(",".join(repr(v * (1 + sign * error)) for v in values).encode())
    assert isinstance(result, Flaw)
    assert result.kind is Kind.SUM


def test_the_sums_of_the_published_files_are_one():
    values = [0.0] * 13
    for total in (0.999999, 1.000001, 0.9991, 1.0009):
        values[3] = total
        assert parse_annotation(",".join(map(str, values)).encode()) == tuple(values)


@given(st.one_of(st.binary(max_size=80), st.text("0123456789,.-e_ naif\n", max_size=80).map(str.encode)))
@settings(max_examples=200)
def test_junk_is_a_flaw_or_a_distribution(raw):
    result = parse_annotation(raw, ("a", "b"))
    if not isinstance(result, Flaw):
        assert len(result) == 2
        assert min(result) >= 0
        assert math.fsum(result) == pytest.approx(1, abs=1e-3)


def edited(**values):
    fields = UNIFORM.strip().split(",")
    for place, value in values.items():
        fields[EMOTIONS.index(place)] = value
    return ",".join(fields).encode()


@pytest.mark.parametrize(
    ("raw", "kind", "detail"),
    [
        (b"", Kind.EMPTY, ""),
        (b" \n\n", Kind.EMPTY, ""),
        (b"\xff\xfe0\x00", Kind.NOT_UTF8, "at byte 0"),
        (edited(sad="sad"), Kind.TEXT, "'sad'"),
        (edited(sad="0_1"), Kind.TEXT, "'0_1'"),
        (edited(sad="\u0661"), Kind.TEXT, "'\u0661'"),  # a digit to float()
        (UNIFORM.replace(",", " ").encode(), Kind.TEXT, "'" + UNIFORM.replace(",", " ")[:39] + "…'"),
        (UNIFORM.strip().encode() + b",", Kind.TEXT, "''"),
        (edited(sad="nan", quiet="NaN"), Kind.NOT_FINITE, "nan for sad, nan for quiet"),
        (edited(sad="1e999"), Kind.NOT_FINITE, "inf for sad"),
        (edited(fear="-0.1", happy="0.253846"), Kind.NEGATIVE, "-0.1 for fear"),
        (edited(fear="0.5"), Kind.SUM, "1.42308"),
        (b",".join([b"1e308"] * 13), Kind.SUM, "inf"),
    ],
)
def test_every_flaw_has_its_name(raw, kind, detail):
    assert parse_annotation(raw) == Flaw(kind, detail)


@pytest.mark.parametrize("values", [1, 8])
def test_a_wrong_number_of_values_is_counted(values):
    flaw = parse_annotation(b",".join([b"0.125"] * values))
    assert flaw == Flaw(Kind.COUNT, f"{values} values for 13 classes", values)


def test_a_byte_order_mark_and_spaces_are_no_flaw():
    expected = parse_annotation(UNIFORM.encode())
    assert not isinstance(expected, Flaw)
    assert parse_annotation(b"\xef\xbb\xbf" + UNIFORM.replace(",", ", ").replace("\n", "\r\n").encode()) == expected


def test_the_folder_as_it_is_in_the_wild(tmp_path):
    for id_, suffix in (("5", "jpg"), ("100002", "JPG"), ("clip_7_0042_affwild", "jpeg"), ("a.b", "PNG"), ("9", "BMP")):
        write_row(tmp_path, "train", id_, suffix=suffix)
    write_row(tmp_path, "val", "5", text=",".join(["1.7790682556841232e-07"] * 12 + ["0.9999978651180932"]))
    for beside in ("5_val.txt", "5_aro.npy", "._5_prob_rank.txt", "5_prob_rank.txt.bak"):
        (tmp_path / "train_set/annotations" / beside).write_text("-1")
    for beside in ("Thumbs.db", "._5.jpg", "5.gif"):
        (tmp_path / "train_set/images" / beside).write_text("-1")

    found = listed(tmp_path).scan(EMOTIONS, map)
    assert found.faults == []
    assert [row.id for row in found.rows["train"]] == ["100002", "5", "9", "a.b", "clip_7_0042_affwild"]
    names = [row.image.name.removeprefix("train_set/images/") for row in found.rows["train"]]
    assert names == ["100002.JPG", "5.jpg", "9.BMP", "a.b.PNG", "clip_7_0042_affwild.jpeg"]
    assert found.rows["val"][0].probs == (1.7790682556841232e-07,) * 12 + (0.9999978651180932,)


def test_orphans_and_doubles_are_faults(tmp_path):
    write_folder(tmp_path)
    train = tmp_path / "train_set"
    (train / "images/1.png").unlink()
    (train / "annotations/2_prob_rank.txt").unlink()
    picture(0).save(train / "images/3.JPG")
    (train / "annotations/4_prob_rank.txt").write_text("")

    faces = listed(tmp_path)
    found = faces.scan(EMOTIONS, map)
    assert [(f.split, f.file, f.flaw.kind, faces.row_of(f)) for f in found.faults] == [
        ("train", "train_set/annotations/1_prob_rank.txt", Kind.NO_IMAGE, "1"),
        ("train", "train_set/annotations/4_prob_rank.txt", Kind.EMPTY, "4"),
        ("train", "train_set/images/2.png", Kind.NO_ANNOTATION, "2"),
        ("train", "train_set/images/3.JPG", Kind.SEVERAL_IMAGES, "3"),
    ]
    assert found.faults[3].reason == "several images for one id: 3.JPG, 3.png"
    assert [row.id for row in found.rows["train"]] == ["0", "5"]
    assert {image.name for image in found.unlabelled["train"]} == {
        f"train_set/images/{name}" for name in ("3.JPG", "3.png", "4.png")
    }


def test_names_and_files_that_cannot_be_read_are_faults(tmp_path):
    write_folder(tmp_path)
    strange = os.fsdecode(b"\xe9_prob_rank.txt")
    (tmp_path / "train_set/annotations" / strange).write_text(UNIFORM)
    faces = listed(tmp_path)
    faults = faces.scan(EMOTIONS, map).faults
    assert [(f.file, f.flaw.kind) for f in faults] == [("train_set/annotations/\\xe9_prob_rank.txt", Kind.NAME)]
    assert sentences(faces, faults, EMOTIONS)[0].encode() == (
        f"{tmp_path}: name is not UTF-8 (1 file): train_set/annotations/\\xe9_prob_rank.txt".encode()
    )


def test_the_layout_is_told_where_it_is_missed(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        listed(tmp_path / "nowhere")
    write_row(tmp_path, "train", 1)
    (tmp_path / "val_set" / "images").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        listed(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: not a folder in the layout of AffectNetFused, which has train_set/annotations, train_set/images,"
        " val_set/annotations, val_set/images; missing is val_set/annotations"
    )


def test_a_sentence_names_file_count_classes_and_the_way_out(tmp_path):
    write_folder(tmp_path)
    for id_, count in ((1, 8), (4, 14)):
        (tmp_path / f"train_set/annotations/{id_}_prob_rank.txt").write_text(",".join([repr(1 / count)] * count))
    assert sentences_on(tmp_path) == [
        f"{tmp_path}: wrong number of values (2 files): train_set/annotations/1_prob_rank.txt (8 values for 13"
        " classes), train_set/annotations/4_prob_rank.txt (14 values for 13 classes); expected one value for each of"
        f" the 13 classes {', '.join(EMOTIONS)}: if the folder was made with another list of classes, set data.classes"
        " to it"
    ]
    eight = EMOTIONS[:8]
    assert [row.id for row in listed(tmp_path).scan(eight, map).rows["train"]] == ["1"]


@pytest.mark.parametrize("count", [8, 15])
def test_sentence_says_how_to_name_the_classes_of_public_annotations(tmp_path, count):
    write_folder(tmp_path)
    for file in tmp_path.glob("*/annotations/*"):
        file.write_text(",".join([repr(1 / count)] * count))
    (sentence,) = sentences_on(tmp_path)
    assert sentence.endswith(
        "the public annotations of AffectNetFused hold 15 values; to use "
        f"{count} values, name their classes in the order of the values, by `pack --classes A,B,… ({count} names)`, by "
        f"`data.classes: [A,B,… ({count} names)]` in the search space, or by `train --set data.classes=[A,B,… ({count} "
        "names)]`"
    )


def test_the_quick_fingerprint_sees_what_matters_and_nothing_else(tmp_path):
    write_folder(tmp_path)
    first = listed(tmp_path).quick_fingerprint()
    (tmp_path / "train_set/annotations/1_val.txt").write_text("0.3")
    (tmp_path / "train_set/images/Thumbs.db").write_text("")
    assert listed(tmp_path).quick_fingerprint() == first

    annotation = tmp_path / "train_set/annotations/1_prob_rank.txt"
    os.utime(annotation, (1, 1))
    touched = listed(tmp_path).quick_fingerprint()
    annotation.write_text(UNIFORM + "\n")
    os.utime(annotation, (1, 1))
    longer = listed(tmp_path).quick_fingerprint()
    annotation.rename(annotation.with_name("77_prob_rank.txt"))
    assert len({first, touched, longer, listed(tmp_path).quick_fingerprint()}) == 4
