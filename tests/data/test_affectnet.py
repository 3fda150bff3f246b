import io
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from raytune_emotion.data.affectnet import (
    SPLITS,
    DecodeTask,
    Flaw,
    Kind,
    decode_image,
    decode_images,
    is_folder,
    parse_annotation,
    quick_fingerprint,
    scan,
    sentences,
)
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError

UNIFORM = ",".join(["0.076923"] * 13) + "\n"


def picture(seed, size=(20, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_row(folder: Path, split, id_, text=UNIFORM, suffix="png", size=(20, 20)):
    """One good row, unless text says otherwise."""
    images, annotations = folder / SPLITS[split] / "images", folder / SPLITS[split] / "annotations"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    picture(zlib.crc32(str(id_).encode()), size).save(images / f"{id_}.{suffix}")
    (annotations / f"{id_}_prob_rank.txt").write_text(text)


def write_folder(folder: Path, train=6, val=3):
    for i in range(train):
        write_row(folder, "train", i)
    for i in range(val):
        write_row(folder, "val", 1000 + i)
    return folder


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
        (b",".join([b"0.125"] * 8), Kind.COUNT, "8 values for 13 classes"),
        (b"1", Kind.COUNT, "1 values for 13 classes"),
        (edited(sad="nan", quiet="NaN"), Kind.NOT_FINITE, "nan for sad, nan for quiet"),
        (edited(sad="1e999"), Kind.NOT_FINITE, "inf for sad"),
        (edited(fear="-0.1", happy="0.253846"), Kind.NEGATIVE, "-0.1 for fear"),
        (edited(fear="0.5"), Kind.SUM, "1.42308"),
    ],
)
def test_every_flaw_has_its_name(raw, kind, detail):
    assert parse_annotation(raw) == Flaw(kind, detail)


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

    found = scan(tmp_path)
    assert found.faults == []
    assert [row.id for row in found.rows["train"]] == ["100002", "5", "9", "a.b", "clip_7_0042_affwild"]
    names = [row.image.name for row in found.rows["train"]]
    assert names == ["100002.JPG", "5.jpg", "9.BMP", "a.b.PNG", "clip_7_0042_affwild.jpeg"]
    assert found.rows["val"][0].probs == (1.7790682556841232e-07,) * 12 + (0.9999978651180932,)


def test_orphans_and_doubles_are_faults(tmp_path):
    write_folder(tmp_path)
    train = tmp_path / "train_set"
    (train / "images/1.png").unlink()
    (train / "annotations/2_prob_rank.txt").unlink()
    picture(0).save(train / "images/3.JPG")
    (train / "annotations/4_prob_rank.txt").write_text("")

    found = scan(tmp_path)
    assert [(f.split, f.file, f.kind, f.id) for f in found.faults] == [
        ("train", "train_set/annotations/1_prob_rank.txt", Kind.NO_IMAGE, "1"),
        ("train", "train_set/annotations/4_prob_rank.txt", Kind.EMPTY, "4"),
        ("train", "train_set/images/2.png", Kind.NO_ANNOTATION, "2"),
        ("train", "train_set/images/3.JPG", Kind.SEVERAL_IMAGES, "3"),
    ]
    assert found.faults[3].reason == "several images for one id: 3.JPG, 3.png"
    assert [row.id for row in found.rows["train"]] == ["0", "5"]
    assert {image.name for image in found.unlabelled["train"]} == {"3.JPG", "3.png", "4.png"}


def test_names_and_files_that_cannot_be_read_are_faults(tmp_path):
    write_folder(tmp_path)
    strange = os.fsdecode(b"\xe9_prob_rank.txt")
    (tmp_path / "train_set/annotations" / strange).write_text(UNIFORM)
    faults = scan(tmp_path).faults
    assert [(f.file, f.kind) for f in faults] == [("train_set/annotations/\\xe9_prob_rank.txt", Kind.NAME)]
    assert sentences(tmp_path, faults)[0].encode() == (
        f"{tmp_path}: name is not UTF-8 (1 file): train_set/annotations/\\xe9_prob_rank.txt".encode()
    )


def test_the_layout_is_told_where_it_is_missed(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        scan(tmp_path / "nowhere")
    write_row(tmp_path, "train", 1)
    (tmp_path / "val_set" / "images").mkdir(parents=True)
    assert is_folder(tmp_path)
    with pytest.raises(UserError) as raised:
        scan(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: not a folder in the layout of AffectNetFused, which has train_set/annotations, train_set/images,"
        " val_set/annotations, val_set/images; missing is val_set/annotations"
    )
    assert not is_folder(tmp_path / "train_set")


def test_a_sentence_names_file_count_classes_and_the_way_out(tmp_path):
    write_folder(tmp_path)
    for id_, count in ((1, 8), (4, 14)):
        (tmp_path / f"train_set/annotations/{id_}_prob_rank.txt").write_text(",".join([repr(1 / count)] * count))
    assert sentences(tmp_path, scan(tmp_path).faults) == [
        f"{tmp_path}: wrong number of values (2 files): train_set/annotations/1_prob_rank.txt (8 values for 13"
        " classes), train_set/annotations/4_prob_rank.txt (14 values for 13 classes); expected are the 13 classes"
        f" {', '.join(EMOTIONS)}: if the folder was made with another list, name it in data.classes"
    ]
    eight = EMOTIONS[:8]
    assert [row.id for row in scan(tmp_path, eight).rows["train"]] == ["1"]


def test_a_sentence_names_ten_files_and_counts_the_rest(tmp_path):
    write_folder(tmp_path, train=13)
    for annotation in (tmp_path / "train_set/annotations").iterdir():
        annotation.write_text("")
    (sentence,) = sentences(tmp_path, scan(tmp_path).faults)
    assert "empty annotation (13 files)" in sentence
    assert sentence.count("_prob_rank.txt") == 10
    assert sentence.endswith(", and 3 more")


def test_the_quick_fingerprint_sees_what_matters_and_nothing_else(tmp_path):
    write_folder(tmp_path)
    first = quick_fingerprint(tmp_path)
    (tmp_path / "train_set/annotations/1_val.txt").write_text("0.3")
    (tmp_path / "train_set/images/Thumbs.db").write_text("")
    assert quick_fingerprint(tmp_path) == first

    annotation = tmp_path / "train_set/annotations/1_prob_rank.txt"
    os.utime(annotation, (1, 1))
    touched = quick_fingerprint(tmp_path)
    annotation.write_text(UNIFORM + "\n")
    os.utime(annotation, (1, 1))
    longer = quick_fingerprint(tmp_path)
    annotation.rename(annotation.with_name("77_prob_rank.txt"))
    assert len({first, touched, longer, quick_fingerprint(tmp_path)}) == 4


# Pictures


def smooth(width, height):
    """A picture without fine detail, so that ways of resizing agree on it; no two of its corners are alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [255 * x, 255 * y, 127 + 100 * np.sin(4 * x + 3 * y)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(tmp_path, smooth(60, 40), "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
    assert np.abs(decode_image(file, 24).astype(int) - np.asarray(upright)).max() <= 1


def test_a_picture_of_the_right_size_is_not_touched(tmp_path):
    image = picture(3, (24, 24))
    np.testing.assert_array_equal(decode_image(saved(tmp_path, image, "a.png"), 24), np.asarray(image))


def test_the_whole_picture_is_squeezed_to_the_square(tmp_path):
    wide = Image.new("RGB", (90, 30))
    wide.paste((255, 0, 0), (0, 0, 30, 30))
    wide.paste((0, 0, 255), (60, 0, 90, 30))
    pixels = decode_image(saved(tmp_path, wide, "wide.bmp"), 18)
    assert tuple(pixels[9, 0]) == (255, 0, 0)
    assert tuple(pixels[9, 17]) == (0, 0, 255)
    assert pixels[9, 9].max() <= 1


def grey_ramp(dtype, top):
    return np.linspace(0, top, 30 * 30).reshape(30, 30).astype(dtype)


def test_every_colour_mode_becomes_rgb(tmp_path):
    ramp = grey_ramp(np.uint8, 255)
    as_rgb = np.repeat(ramp[:, :, None], 3, axis=2)
    grey = saved(tmp_path, Image.fromarray(ramp), "grey.png")
    np.testing.assert_array_equal(decode_image(grey, 30), as_rgb)

    sixteen = saved(tmp_path, Image.fromarray(grey_ramp(np.uint16, 65535)), "sixteen.png")
    np.testing.assert_allclose(decode_image(sixteen, 30), as_rgb, atol=1)

    colour = smooth(30, 30)
    cmyk = saved(tmp_path, colour.convert("CMYK"), "cmyk.jpg", quality=100, subsampling=0)
    np.testing.assert_allclose(decode_image(cmyk, 30), np.asarray(colour), atol=8)

    bits = saved(tmp_path, Image.fromarray(ramp > 127), "bits.png")
    np.testing.assert_array_equal(decode_image(bits, 30), np.where(as_rgb > 127, 255, 0))


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:, 10:] = (0, 0, 255, 255)
    rgba[:10, 10:, 3] = 51
    expected = np.full((20, 20, 3), 255, np.uint8)
    expected[:10, 10:] = (204, 204, 255)
    expected[10:, 10:] = (0, 0, 255)
    image = Image.fromarray(rgba)
    np.testing.assert_allclose(decode_image(saved(tmp_path, image, "rgba.png"), 20), expected, atol=1)

    palette = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) % 2, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    pixels = decode_image(saved(tmp_path, palette, "palette.png", transparency=b"\x00\xff"), 20)
    assert {tuple(p) for p in pixels.reshape(-1, 3).tolist()} == {(255, 255, 255), (0, 255, 0)}


@pytest.mark.parametrize(("size", "side"), [((451, 397), 48), ((900, 1200), 64)])
def test_large_jpegs_are_drafted_without_harm(tmp_path, size, side):
    image = smooth(*size)
    file = saved(tmp_path, image, "large.jpg", quality=95)
    exact = np.asarray(Image.open(file).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode_image(file, side) - exact).mean() < 0.5


def test_the_ending_need_not_be_true(tmp_path):
    image = picture(5)
    for format_ in ("PNG", "GIF", "WEBP"):
        assert decode_image(saved(tmp_path, image, "photo.jpg", format=format_), 20).shape == (20, 20, 3)


def test_damaged_exif_does_not_spoil_a_picture(tmp_path):
    image = picture(6)
    file = saved(tmp_path, image, "exif.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(file, 20), np.asarray(image))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("progressive", [False, True])
def test_what_is_cut_short_is_refused(tmp_path, format_, progressive):
    buffer = io.BytesIO()
    picture(7, (300, 300)).save(buffer, format_, **({"progressive": progressive} if format_ == "JPEG" else {}))
    file = tmp_path / "cut.jpg"
    file.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])
    for side in (300, 32):  # 32 px: the draft of a JPEG
        with pytest.raises(UserError, match=r"cut\.jpg: the picture cannot be decoded \(.*truncated"):
            decode_image(file, side)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    saved(tmp_path, picture(8), "tagged.png", format="TIFF")
    for name in ("empty.png", "text.jpg", "tagged.png"):
        with pytest.raises(UserError, match="no picture in JPEG, PNG, BMP, GIF or WebP format"):
            decode_image(tmp_path / name, 20)
    with pytest.raises(UserError, match="No such file"):
        decode_image(tmp_path / "none.png", 20)


def test_pixels_are_written_in_their_places_and_damage_leaves_a_gap(tmp_path):
    files = [str(saved(tmp_path, picture(i), f"{i}.png")) for i in range(3)]
    Path(files[1]).write_bytes(b"GIF89a")
    into = tmp_path / "pixels"
    into.write_bytes(b"\7" * (100 + 3 * 1200 + 9))
    first, second, third = decode_images(DecodeTask(files, 20, (str(into), 100)))
    assert isinstance(first, bytes)
    assert isinstance(third, bytes)
    assert first != third
    assert isinstance(second, Flaw)
    assert second.kind is Kind.UNDECODABLE
    written = into.read_bytes()
    assert written[:100] == b"\7" * 100
    assert written[-9:] == b"\7" * 9
    pixels = np.frombuffer(written[100:-9], np.uint8).reshape(3, 20, 20, 3)
    np.testing.assert_array_equal(pixels[[0, 2]], [np.asarray(picture(0)), np.asarray(picture(2))])
    assert decode_images(DecodeTask(files, 20, None)) == [first, second, third]


def test_the_digest_of_a_picture_is_that_of_its_pixels(tmp_path):
    image = picture(9)
    touched = np.array(image)
    touched[13, 7, 2] ^= 1
    files = [
        str(saved(tmp_path, kind, name))
        for kind, name in ((image, "a.png"), (image, "b.bmp"), (Image.fromarray(touched), "c.png"))
    ]
    a, b, c = decode_images(DecodeTask(files, 20, None))
    assert a == b != c
