"""Convert FER+ to the layout of AffectNetFused.

FER+ gives each face of FER2013 the votes of ten people for eight emotions, `unknown` and `NF` (not a face). The votes
for emotions become probabilities; the other five classes are zero. Two kinds of faces are left out: those for which
`unknown` and `NF` have more than half of the votes, and repeated pictures.

The split is FER2013's own: Training becomes train_set and PublicTest val_set. PrivateTest is left out, for a final test
of the chosen model. For the same reason, a picture that occurs in several parts is removed from training first, then
from validation.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from raytune_emotion.data.affectnet import SPLITS
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import atomic_folder

#: Name of each emotion in this project, by FER+'s name, in the order of FER+'s columns.
NAMES = {
    "neutral": "neutral",
    "happiness": "happy",
    "surprise": "surprised",
    "sadness": "sad",
    "anger": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "contempt": "contempt",
}
_NO_EMOTION = ("unknown", "NF")
SIDE = 48  # px
#: Split of each part of FER2013. A repeated picture is kept in the first of these parts.
_SPLIT_OF: dict[str, str | None] = {"PrivateTest": None, "PublicTest": "val", "Training": "train"}
_Picture = npt.NDArray[np.uint8]  # [H, W]
#: Largest number of faults of one kind that a sentence names.
_NAMED = 10


@dataclass(frozen=True)
class Votes:
    """One row of FER+."""

    usage: str
    image: str  # file name; empty if the picture is not a face
    emotions: tuple[int, ...]  # in the order of NAMES
    no_emotion: int

    @property
    def counts(self) -> bool:
        return bool(self.image) and 0 < sum(self.emotions) >= self.no_emotion


def convert(pixels_or_folder: Path, votes_csv: Path, dest: Path) -> Mapping[str, int]:
    """Write a folder in the layout of AffectNetFused, with greyscale PNG files, so that no pixel changes.

    Args:
        pixels_or_folder: fer2013.csv (emotion, pixels, Usage), with the same rows as votes_csv; or a folder with
            pictures named as in FER+ (fer0000000.png), directly or in FER2013Train, FER2013Valid, FER2013Test.
        votes_csv: fer2013new.csv (Usage, Image name, the votes).
        dest: the new folder.

    Returns:
        The number of faces written to `train` and `val`, and the number left out as `no emotion`, `repeated` (picture
        or name) and `PrivateTest`.

    Raises:
        UserError: the files do not have FER+'s format, or do not belong together; dest exists.
    """
    votes = _read_votes(votes_csv)
    pictures = (
        _from_folder(pixels_or_folder, votes)
        if pixels_or_folder.is_dir()
        else _from_csv(pixels_or_folder, votes, votes_csv)
    )
    counts: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
    by_usage: dict[str, list[tuple[Votes, _Picture]]] = defaultdict(list)
    for row, picture in zip(votes, pictures, strict=True):
        if picture is None:
            counts["no emotion"] += 1
        else:
            by_usage[row.usage].append((row, picture))

    seen: set[bytes | str] = set()
    with atomic_folder(dest) as folder:
        for name in SPLITS.values():
            (folder / name / "images").mkdir(parents=True)
            (folder / name / "annotations").mkdir()
        for usage, split in _SPLIT_OF.items():
            for row, picture in by_usage[usage]:
                pixels = picture.tobytes()
                if pixels in seen or row.image in seen:
                    counts["repeated"] += 1
                    continue
                seen |= {pixels, row.image}
                counts[split or usage] += 1
                if split is not None:
                    id_ = Path(row.image).stem.removeprefix("fer")
                    Image.fromarray(picture).save(folder / SPLITS[split] / "images" / f"{id_}.png")
                    annotation = folder / SPLITS[split] / "annotations" / f"{id_}_prob_rank.txt"
                    annotation.write_text(",".join(map(repr, probabilities(row.emotions))) + "\n", encoding="ascii")
        if empty := [usage for usage, split in _SPLIT_OF.items() if split is not None and not counts[split]]:
            raise UserError(f"{votes_csv}: no face with votes for an emotion in {' and '.join(empty)}")
    return counts


def probabilities(votes: Sequence[int]) -> tuple[float, ...]:
    """Return the shares of votes (in the order of NAMES) as a distribution over EMOTIONS; votes must not all be 0."""
    share = {ours: count / sum(votes) for ours, count in zip(NAMES.values(), votes, strict=True)}
    return tuple(share.get(emotion, 0.0) for emotion in EMOTIONS)


def _read_votes(path: Path) -> list[Votes]:
    columns = ("Usage", "Image name", *NAMES, *_NO_EMOTION)
    votes, faults = [], []
    for line, row in _read_csv(path, columns):
        usage, image, *counts = row
        if usage not in _SPLIT_OF:
            faults.append(f"{path}: line {line}: Usage: expected one of {', '.join(_SPLIT_OF)}, got {usage!r}")
        elif not all(count.isascii() and count.isdigit() for count in counts):
            faults.append(f"{path}: line {line}: votes: expected whole numbers, got {', '.join(counts)}")
        elif Path(image).name != image:
            faults.append(f"{path}: line {line}: Image name: expected a file name without a folder, got {image!r}")
        else:
            numbers = tuple(map(int, counts))
            votes.append(Votes(usage, image, numbers[: len(NAMES)], sum(numbers[len(NAMES) :])))
    _refuse(faults)
    return votes


def _from_csv(path: Path, votes: Sequence[Votes], votes_csv: Path) -> list[_Picture | None]:
    """Return the picture of each row of votes; None for a row that is left out."""
    faults: list[str] = []
    pictures: list[_Picture | None] = []
    for told, row in zip_longest(_read_csv(path, ("Usage", "pixels")), votes):
        if told is None or row is None:
            raise UserError(f"{path} and {votes_csv}: the numbers of rows differ; use files of the same release")
        line, (usage, pixels) = told
        if usage != row.usage:
            faults.append(f"{path}: line {line}: Usage is {usage!r}, but {row.usage!r} in the same row of {votes_csv}")
        elif not row.counts:
            pictures.append(None)
        else:
            try:
                flat = np.frombuffer(bytes(map(int, pixels.split())), np.uint8)
                pictures.append(flat.reshape(SIDE, SIDE))
            except ValueError:
                faults.append(f"{path}: line {line}: pixels: expected {SIDE * SIDE} whole numbers from 0 to 255")
    _refuse(faults)
    return pictures


def _from_folder(folder: Path, votes: Sequence[Votes]) -> list[_Picture | None]:
    subfolders = ("FER2013Test", "FER2013Valid", "FER2013Train", ".")
    found = {file.name: file for sub in subfolders for file in (folder / sub).glob("*.png")}
    if missing := [row.image for row in votes if row.counts and row.image not in found]:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UserError(
            f"{folder}: {len(missing)} pictures with votes are missing, here and in"
            f" {', '.join(subfolders[:-1])}: {', '.join(missing[:_NAMED])}{more}"
        )
    faults: list[str] = []
    pictures: list[_Picture | None] = []
    for row in votes:
        if not row.counts:
            pictures.append(None)
            continue
        try:
            with Image.open(found[row.image], formats=("PNG",)) as image:
                pictures.append(np.array(image.convert("L")))
        except (OSError, SyntaxError, ValueError) as error:
            faults.append(f"{found[row.image]}: the picture cannot be decoded ({error})")
    _refuse(faults)
    return pictures


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number of every row and its values of the named columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            if missing := [name for name in columns if name not in header]:
                raise UserError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(header)}")
            places = [header.index(name) for name in columns]
            for row in rows:
                if len(row) != len(header):
                    raise UserError(f"{path}: line {rows.line_num}: {len(row)} values for {len(header)} columns")
                yield rows.line_num, [row[place].strip() for place in places]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from error


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        more = [f"and {len(faults) - _NAMED} more such lines"] if len(faults) > _NAMED else []
        raise UserError([*faults[:_NAMED], *more])
