import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from raytune_emotion.data.decode import (
    UndecodableImage,
    decode_at_sizes,
    decode_image,
    files_key,
    ignore_decoder_warnings,
    pixels_digest,
)
from raytune_emotion.data.synthetic import draw_face
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import File, Folder
from tests.support.faces import picture


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


@pytest.mark.parametrize(("file", "side", "most"), [(224, 96, 1.5), (224, 112, 1.5), (640, 96, 0.7)])
def test_drafts_are_as_exact_as_is_said(tmp_path, file, side, most):
    rng = np.random.default_rng(file)
    face = saved(tmp_path, Image.fromarray(draw_face(0.3, 0.4, rng, file)), "face.jpg", quality=92)
    exact = np.asarray(Image.open(face).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    error = np.abs(decode_image(face, side) - exact).mean()
    assert 0 < error < most


def test_the_ending_need_not_be_true(tmp_path):
    image = picture(5)
    for format_ in ("PNG", "GIF", "WEBP"):
        assert decode_image(saved(tmp_path, image, "photo.jpg", format=format_), 20).shape == (20, 20, 3)


def test_damaged_exif_does_not_spoil_a_picture(tmp_path):
    image = picture(6)
    file = saved(tmp_path, image, "exif.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_image(file, 20), np.asarray(image))


@pytest.mark.parametrize(
    ("format_", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {})]
)
def test_what_is_cut_short_is_refused(tmp_path, format_, options):
    buffer = io.BytesIO()
    picture(7, (300, 300)).save(buffer, format_, **options)
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


def test_digest_of_a_picture_is_that_of_its_pixels(tmp_path):
    image = picture(9)
    touched = np.array(image)
    touched[13, 7, 2] ^= 1
    files = [
        saved(tmp_path, kind, name)
        for kind, name in ((image, "a.png"), (image, "b.bmp"), (Image.fromarray(touched), "c.png"))
    ]
    a, b, c = (pixels_digest(decode_image(file, 20).data) for file in files)
    assert a == b != c


def test_picture_at_several_sizes_is_at_each_what_it_is_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        saved(tmp_path, smooth(230, 210), "turned.jpg", exif=exif),
        saved(tmp_path, Image.fromarray(grey_ramp(np.uint8, 255)), "grey.png"),
        saved(tmp_path, picture(4, (100, 100)), "noise.jpg"),
    ]
    sizes = (50, 16, 100, 224, 105, 64)
    for file in files:
        for size, square in zip(sizes, decode_at_sizes(file.read_bytes(), sizes), strict=True):
            np.testing.assert_array_equal(square, decode_image(file, size))


def test_key_of_files_changes_with_each_of_them(tmp_path):
    files = [saved(tmp_path, picture(i), f"{i}.png") for i in range(2)]
    listed = [File(file.name, "") for file in files]
    before = files_key(Folder(tmp_path), listed)
    assert files_key(Folder(tmp_path), listed) == before
    os.utime(files[1], (1, 1))
    assert files_key(Folder(tmp_path), listed) != before
    assert files_key(Folder(tmp_path), listed[:1]) != before


def test_threads_that_decode_leave_the_filters_of_warnings_alone(tmp_path):
    file = saved(tmp_path, picture(1).quantize(4), "odd.png", transparency=b"\x00\xff\x80\x00")
    before = list(warnings.filters)
    with ignore_decoder_warnings(), ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lambda _: decode_image(file, 20), range(200)))) == 200
    assert warnings.filters == before


@settings(max_examples=150)
@given(
    format_=st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "WEBP"]),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20),
    kept=st.floats(0.0, 1.0),
)
def test_damaged_picture_is_decoded_or_refused_by_a_sentence(format_, damage, kept):
    buffer = io.BytesIO()
    picture(3, (40, 30)).save(buffer, format_)
    content = bytearray(buffer.getvalue())
    for place, value in damage:
        content[place % len(content)] = value
    sentence, squares = "", []
    try:
        with ignore_decoder_warnings():
            squares = decode_at_sizes(bytes(content[: int(kept * len(content))]), (16,))
    except UndecodableImage as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert bool(sentence) or [(square.shape, square.dtype) for square in squares] == [((16, 16, 3), np.uint8)]
