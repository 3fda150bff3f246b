"""Pictures as the models see them: upright, RGB, square.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for less: a draft. Each picture is decoded at the least of these
that is no smaller than what is wanted of it, and resized from there.
"""

import contextlib
import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from isal import isal_zlib
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from raytune_emotion import __version__
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import File, Source, read, stamp

#: What files that are named as pictures turn out to hold; any other decoder of PIL (one calls Ghostscript) stays shut.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
#: Of a picture's pixels at one size.
DIGEST_BYTES = 4
_BUFFER_BYTES = 2**20
_LARGE_PX = 90e6  # PIL warns of more, and refuses twice as many

# How to turn a picture upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(file: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """A picture as the models see it: upright, RGB, transparency over white, squeezed to a square.

    The whole picture is kept and squeezed, not cropped: faces come as boxes around the face that are nearly
    square, and what a crop would cut off, brow and chin, is where the expression is.

    Returns:
        [H, W, 3], uint8, H = W = image_size.

    Raises:
        UserError: the file cannot be read or decoded whole.
    """
    with _quietly():
        try:
            return _decode(file.read_bytes(), (image_size,))[0]
        except OSError as error:
            raise UserError(f"{file}: {_cannot(error)}") from error
        except _Undecodable as error:
            raise UserError(f"{file}: {error}") from error


@dataclass(frozen=True)
class Region:
    """Where the pixels of a task's pictures lie at one size, one after the other."""

    file: str
    offset: int  # bytes
    done: tuple[str, bytes] | None  # key and digests of what an earlier attempt has written there


@dataclass(frozen=True)
class DecodeTask:
    source: Source
    files: Sequence[File]
    image_sizes: tuple[int, ...]
    into: tuple[Region, ...]  # one for each size; none: only try


@dataclass(frozen=True)
class Decoded:
    key: str  # see `files_key`
    digests: Sequence[bytes | str]  # for each file of its pixels at every size, or what is wrong with it


def decode_images(task: DecodeTask) -> Decoded:
    """Decodes pictures and writes their pixels, but for what is there already; one that is at fault leaves a gap."""
    key = files_key(task.source, task.files)
    if task.into and all(map(_is_done, task.into, task.image_sizes, itertools.repeat(key))):
        each = [region.done[1] for region in task.into if region.done is not None]
        steps = range(0, len(task.files) * DIGEST_BYTES, DIGEST_BYTES)
        return Decoded(key, [b"".join(digests[i : i + DIGEST_BYTES] for digests in each) for i in steps])
    return Decoded(key, write_images(task))


def write_images(task: DecodeTask) -> list[bytes | str]:
    """Decodes pictures and writes their pixels; the digests are as `Decoded` has them."""
    with contextlib.ExitStack() as stack:
        # Larger pieces cost the kernel less; what they are put together in stays in the processor's cache.
        outs = [stack.enter_context(Path(region.file).open("r+b", buffering=_BUFFER_BYTES)) for region in task.into]
        for out, region in zip(outs, task.into, strict=True):
            out.seek(region.offset)
        stack.enter_context(_quietly())
        contents = read(task.source, [file.name for file in task.files])
        # Room for most drafts, which are less than twice as wide as what they are for.
        scratch = bytearray(4 * picture_bytes(task.image_sizes[0])) if len(task.image_sizes) == 1 else None
        return [_decode_into(outs, content, task.image_sizes, scratch) for content in contents]


def _decode_into(
    outs: Sequence[BinaryIO], content: bytes | OSError, sides: Sequence[int], scratch: bytearray | None
) -> bytes | str:
    try:
        if isinstance(content, OSError):
            raise _cannot(content)
        squares = _decode(content, sides, scratch)
    except _Undecodable as error:
        for out, side in zip(outs, sides, strict=bool(outs)):
            out.seek(picture_bytes(side), os.SEEK_CUR)
        return str(error)
    for out, square in zip(outs, squares, strict=bool(outs)):
        out.write(square.data)
    return b"".join(pixels_digest(square.data) for square in squares)


def pixels_digest(pixels: bytes | memoryview) -> bytes:
    # Enough for pixels that nobody forges. Of the time of decoding, SHA-256 would take a third, zlib's CRC a fifteenth.
    return isal_zlib.crc32(pixels).to_bytes(DIGEST_BYTES, "big")


def _is_done(region: Region, side: int, key: str) -> bool:
    """Whether an earlier attempt has written the pixels of the same files, and they are still there."""
    if region.done is None or region.done[0] != key:
        return False
    digests = region.done[1]
    with Path(region.file).open("rb") as file:
        file.seek(region.offset)
        found = b"".join(pixels_digest(file.read(picture_bytes(side))) for _ in range(len(digests) // DIGEST_BYTES))
    return found == digests


def files_key(source: Source, files: Sequence[File]) -> str:
    """Another one where a name, a size or a modification time of the files is."""
    key = hashlib.sha256(f"{__version__}\0{pillow_version}\0{simplejpeg.__version__}".encode())
    for file in files:
        key.update(f"{file.name}\0{stamp(source, file)}\0".encode())
    return key.hexdigest()[:16]


def picture_bytes(side: int) -> int:
    return side * side * 3


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # Odd metadata, and pictures of more than 90 megapixels, are no reason to refuse a picture.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Undecodable(Exception):
    pass


def _cannot(error: Exception) -> _Undecodable:
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _Undecodable(f"the picture cannot be decoded ({what or type(error).__name__})")


def _decode(content: bytes, sides: Sequence[int], scratch: bytearray | None = None) -> list[npt.NDArray[np.uint8]]:
    """The picture at every size, [H, W, 3], each as it were if it were the only one.

    That of a single size may lie in the scratch: memory that is used again spares the system work.
    """
    squares: dict[int, npt.NDArray[np.uint8]] = {}
    try:
        while left := [side for side in sides if side not in squares]:
            draft = _draft_of_plain_jpeg(content, max(left), scratch) or _draft(content, max(left))
            for side in left:
                if not draft.scaled or _scale(draft.whole, side) == _scale(draft.whole, max(left)):
                    squares[side] = _square(draft, side)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise _Undecodable("no picture in JPEG, PNG, BMP, GIF or WebP format") from error
    except Exception as error:  # PIL raises what its decoders happen to: OSError, SyntaxError, struct.error, ...
        raise _cannot(error) from error
    return [squares[side] for side in sides]


@dataclass(frozen=True)
class _Draft:
    """A picture at one of the sizes that its format is decoded at."""

    pixels: npt.NDArray[np.uint8]  # [H, W, 3], or grey [H, W]
    whole: tuple[int, int]  # its own width and height, px
    scaled: bool  # whether there are several such sizes
    turn: Image.Transpose | None = None


def _draft(content: bytes, side: int) -> _Draft:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        whole = image.size
        scaled = image.draft(None, (side, side)) is not None
        return _Draft(np.asarray(_rgb(image)), whole, scaled, _UPRIGHT.get(_orientation(image)))


def _draft_of_plain_jpeg(content: bytes, side: int, scratch: bytearray | None = None) -> _Draft | None:
    """The same, bit for bit, in less time than PIL takes; none of what is no JPEG, or one that PIL should look at."""
    if not _is_plain_jpeg(content):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray", "RGB") or height * width > _LARGE_PX:
            return None
        scale = _scale((width, height), side)
        height_drafted, width_drafted = -(-height // scale), -(-width // scale)
        fits = scratch is not None and height_drafted * width_drafted * 3 <= len(scratch)
        pixels = simplejpeg.decode_jpeg(
            content, min_height=height_drafted, min_width=width_drafted, buffer=scratch if fits else None
        )
    except ValueError:  # PIL knows what is wrong with it, or that nothing is
        return None
    return _Draft(pixels, (width, height), scaled=True)


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether it is a JPEG without a segment that may tell how to turn it: Exif or XMP."""
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while (marker := content[at : at + 2])[:1] == b"\xff" and marker not in (b"\xff\xe1", b"\xff\xda"):
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return marker == b"\xff\xda"  # the pixels


def _square(draft: _Draft, side: int) -> npt.NDArray[np.uint8]:
    if draft.pixels.shape == (side, side, 3) and draft.whole == (side, side) and draft.turn is None:
        return draft.pixels
    image = Image.fromarray(draft.pixels)
    # The box keeps the fraction of a pixel at the edge.
    scale = _scale(draft.whole, side) if draft.scaled else 1
    box = (0, 0, draft.whole[0] / scale, draft.whole[1] / scale)
    if image.size != (side, side) or draft.whole != image.size:
        image = image.resize((side, side), Image.Resampling.BICUBIC, box)
    return np.asarray((image if draft.turn is None else image.transpose(draft.turn)).convert("RGB"))


def _scale(size: tuple[int, int], side: int) -> int:
    """What a JPEG's size is divided by in a draft of at least a square of this side."""
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, min(size) // side))


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, or in grey."""
    image.load()
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
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
    except Exception:  # EXIF that is damaged tells no way up; the picture itself is whole
        return 1
