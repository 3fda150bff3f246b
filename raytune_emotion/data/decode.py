"""Decode pictures as the models see them: upright, RGB, square.

A JPEG can be decoded faster at 1/2, 1/4 or 1/8 of its size; this is called a draft. Each picture is decoded as the
smallest draft that is at least as large as the wanted size, and is then resized.
"""

import contextlib
import hashlib
import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from raytune_emotion import __version__
from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.locations import File, Location

#: Formats that PIL may decode, whatever the extension. Others are disabled; one of them would call Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
#: Length of the digest of a picture's pixels at one size, bytes.
DIGEST_BYTES = 4

# Transposition that turns a picture upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImage(Exception):
    """Report that a picture cannot be decoded, with the reason."""


def decode_image(file: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """Decode a picture as the models see it: upright, RGB, transparency over white, squeezed to a square.

    The whole picture is kept and squeezed, not cropped: pictures are nearly square boxes around faces. A crop would cut
    off brow and chin, which show the expression. Threads decode inside of `ignore_decoder_warnings`, which one of them
    enters.

    Returns:
        [H, W, 3], uint8, H = W = image_size.

    Raises:
        UserError: the file cannot be read or completely decoded.
    """
    try:
        return decode_at_sizes(file.read_bytes(), (image_size,))[0]
    except OSError as error:
        raise UserError(f"{file}: {_cannot(error)}") from error
    except UndecodableImage as error:
        raise UserError(f"{file}: {error}") from error


def decode_at_sizes(content: bytes | OSError, sides: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
    """Decode a file's content at every size, [H, W, 3]. Each result is the same as if its size were the only one.

    Raises:
        UndecodableImage: the file could not be read, or contains no complete picture.
    """
    if isinstance(content, OSError):
        raise _cannot(content)
    squares: dict[int, npt.NDArray[np.uint8]] = {}
    try:
        while left := [side for side in sides if side not in squares]:
            draft = _draft(content, max(left))
            for side in left:
                if not draft.scaled or _scale(draft.whole, side) == _scale(draft.whole, max(left)):
                    squares[side] = _square(draft, side)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImage("no picture in JPEG, PNG, BMP, GIF or WebP format") from error
    except Exception as error:  # PIL's decoders raise many types: OSError, SyntaxError, struct.error, ...
        raise _cannot(error) from error
    return [squares[side] for side in sides]


@contextlib.contextmanager
def ignore_decoder_warnings() -> Iterator[None]:
    """Ignore warnings of PIL: pictures with unusual metadata or more than 90 megapixels are accepted.

    Warning filters belong to the process, so start a pool of threads inside of the block.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pixels_digest(pixels: bytes | memoryview) -> bytes:
    """Hash pixels, without protection against forgery. It takes 1/50 of the time of decoding, SHA-256 1/3."""
    return zlib.crc32(pixels).to_bytes(DIGEST_BYTES, "big")


def files_key(source: Location, files: Sequence[File]) -> str:
    """Hash the names, sizes and modification times of files, and the versions of this package and of PIL."""
    key = hashlib.sha256(f"{__version__}\0{pillow_version}".encode())
    for file in files:
        key.update(f"{file.name}\0{source.stamp(file)}\0".encode())
    return key.hexdigest()[:16]


def picture_bytes(side: int) -> int:
    return side * side * 3


def _cannot(error: Exception) -> UndecodableImage:
    what = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UndecodableImage(f"the picture cannot be decoded ({what})")


@dataclass(frozen=True)
class _Draft:
    """A picture at one of the sizes at which its format can be decoded."""

    image: Image.Image  # RGB or grey
    whole: tuple[int, int]  # the picture's full width and height, px
    scaled: bool  # whether the format has several such sizes
    turn: Image.Transpose | None


def _draft(content: bytes, side: int) -> _Draft:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        whole = image.size
        scaled = image.draft(None, (side, side)) is not None
        return _Draft(_rgb_or_grey(image), whole, scaled, _UPRIGHT.get(_orientation(image)))


def _square(draft: _Draft, side: int) -> npt.NDArray[np.uint8]:
    image = draft.image
    # The box keeps the fraction of a pixel at the edge.
    scale = _scale(draft.whole, side) if draft.scaled else 1
    box = (0, 0, draft.whole[0] / scale, draft.whole[1] / scale)
    if image.size != (side, side) or draft.whole != image.size:
        image = image.resize((side, side), Image.Resampling.BICUBIC, box)
    if draft.turn is not None:
        image = image.transpose(draft.turn)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scale(size: tuple[int, int], side: int) -> int:
    """Return the divisor of a JPEG's size for the smallest draft that contains a square of this side."""
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, min(size) // side))


def _rgb_or_grey(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data gives no orientation, but the picture itself is complete
        return 1
