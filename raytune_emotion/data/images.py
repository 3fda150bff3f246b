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
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from raytune_emotion import __version__
from raytune_emotion.data.source import File, Source, read, stamp
from raytune_emotion.errors import UserError

#: What files that are named as pictures turn out to hold; any other decoder of PIL (one calls Ghostscript) stays shut.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
#: Of a picture's pixels at one size.
DIGEST_BYTES = 4

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


def decode_image(file: Path | BinaryIO, image_size: int) -> npt.NDArray[np.uint8]:
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
            return np.asarray(_decode(file, (image_size,))[0])
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
        outs = [stack.enter_context(Path(region.file).open("r+b", buffering=0)) for region in task.into]
        for out, region in zip(outs, task.into, strict=True):
            out.seek(region.offset)
        stack.enter_context(_quietly())
        contents = read(task.source, [file.name for file in task.files])
        return [_decode_into(outs, content, task.image_sizes) for content in contents]


def _decode_into(outs: Sequence[io.FileIO], content: bytes | OSError, sides: Sequence[int]) -> bytes | str:
    try:
        if isinstance(content, OSError):
            raise _cannot(content)
        pictures = _decode(io.BytesIO(content), sides)
    except _Undecodable as error:
        for out, side in zip(outs, sides, strict=bool(outs)):
            out.seek(_bytes(side), os.SEEK_CUR)
        return str(error)
    # One at a time: what is hashed and written is in the processor's cache then, and its memory is used again.
    digests = []
    for i, picture in enumerate(pictures):
        pixels = picture.tobytes()
        digests.append(pixels_digest(pixels))
        if outs:
            _write(outs[i], pixels)
    return b"".join(digests)


def _write(out: io.FileIO, content: bytes) -> None:
    # Without a buffer, that of a full disk may be a part.
    left = memoryview(content)
    while left:
        left = left[out.write(left) :]


def pixels_digest(pixels: bytes | memoryview) -> bytes:
    # Enough for pixels that nobody forges, where SHA-256 would take a third of the time of decoding.
    return zlib.crc32(pixels).to_bytes(DIGEST_BYTES, "big")


def _is_done(region: Region, side: int, key: str) -> bool:
    """Whether an earlier attempt has written the pixels of the same files, and they are still there."""
    if region.done is None or region.done[0] != key:
        return False
    digests = region.done[1]
    with Path(region.file).open("rb") as file:
        file.seek(region.offset)
        found = b"".join(pixels_digest(file.read(_bytes(side))) for _ in range(len(digests) // DIGEST_BYTES))
    return found == digests


def files_key(source: Source, files: Sequence[File]) -> str:
    """Another one where a name, a size or a modification time of the files is."""
    key = hashlib.sha256(f"{__version__}\0{pillow_version}".encode())
    for file in files:
        key.update(f"{file.name}\0{stamp(source, file)}\0".encode())
    return key.hexdigest()[:16]


def _bytes(side: int) -> int:
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


def _decode(file: Path | BinaryIO, sides: Sequence[int]) -> list[Image.Image]:
    """The picture at every size, each as it were if it were the only one."""
    squares: dict[int, Image.Image] = {}
    try:
        while left := [side for side in sides if side not in squares]:
            with Image.open(file, formats=FORMATS) as image:
                largest, whole = max(left), image.size
                draft = image.draft(None, (largest, largest))
                if draft is not None:
                    left = [side for side in left if _scale(whole, side) == _scale(whole, largest)]
                # The box keeps the fraction of a pixel at the edge.
                box = draft[1] if draft is not None and image.size != whole else None
                picture, turn = _rgb(image), _UPRIGHT.get(_orientation(image))
            for side in left:
                square = picture
                if box is not None or picture.size != (side, side):
                    square = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
                squares[side] = square if turn is None else square.transpose(turn)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise _Undecodable("no picture in JPEG, PNG, BMP, GIF or WebP format") from error
    except Exception as error:  # PIL raises what its decoders happen to: OSError, SyntaxError, struct.error, ...
        raise _cannot(error) from error
    return [square.convert("RGB") if square.mode != "RGB" else square for square in map(squares.__getitem__, sides)]


def _scale(size: tuple[int, int], side: int) -> int:
    """What PIL divides a JPEG's size by in a draft of at least a square of this side."""
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
