import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raytune_emotion.data.affectnet import list_faces
from raytune_emotion.data.ferplus import NAMES, convert, probabilities
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.ferplus import main
from raytune_emotion.storage.locations import Folder

FOLDER_OF = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}


def face(seed):
    return np.random.default_rng(seed).integers(0, 256, (48, 48), np.uint8)


def row(usage, number, seed=None, unknown=0, nf=0, **votes):
    name = "" if number is None else f"fer{number:07d}.png"
    return usage, name, face(number if seed is None else seed), {**votes, "unknown": unknown, "NF": nf}


ROWS = [
    row("Training", 0, neutral=4, sadness=6),
    row("Training", 1, anger=10),
    row("Training", None, seed=2, nf=10),
    row("Training", 3, fear=4, unknown=4, nf=2),  # six of ten
    row("Training", 4, fear=5, unknown=4, nf=1),  # half
    row("Training", 5, seed=1, anger=9, disgust=1),  # the picture of 1
    row("Training", 6, seed=10, neutral=10),  # the picture of 10
    row("Training", 7, seed=20, neutral=10),  # the picture of 20
    row("PublicTest", 10, happiness=3, surprise=3, contempt=3, unknown=1),
    row("PublicTest", 11, seed=20, neutral=10),  # the picture of 20
    row("PrivateTest", 20, neutral=10),
]


def write_votes(path, rows=ROWS):
    columns = ["Usage", "Image name", *NAMES, "unknown", "NF"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for usage, name, _, votes in rows:
            writer.writerow([usage, name, *(votes.get(column, 0) for column in columns[2:])])
    return path


def write_pixels(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        writer.writerows([0, " ".join(map(str, pixels.reshape(-1))), usage] for usage, _, pixels, _ in rows)
    return path


@pytest.fixture
def votes(tmp_path):
    return write_votes(tmp_path / "fer2013new.csv")


@pytest.fixture
def pixels(tmp_path):
    return write_pixels(tmp_path / "fer2013.csv")


@given(st.lists(st.integers(0, 10), min_size=8, max_size=8).filter(any))
def test_votes_become_shares_of_our_classes(votes):
    shares = dict(zip(EMOTIONS, probabilities(votes), strict=True))
    assert sum(shares.values()) == pytest.approx(1)
    for name, count in zip(NAMES, votes, strict=True):
        assert shares[NAMES[name]] == count / sum(votes)
    assert sum(share > 0 for share in shares.values()) == sum(count > 0 for count in votes)


def test_a_release_becomes_a_folder(pixels, votes, tmp_path):
    counts = convert(pixels, votes, tmp_path / "faces")
    assert counts == {"train": 3, "val": 1, "no emotion": 2, "repeated": 4, "PrivateTest": 1}
    found = list_faces(Folder(tmp_path / "faces")).scan(EMOTIONS, map)
    assert found.faults == []
    assert [r.id for r in found.rows["train"]] == ["0000000", "0000001", "0000004"]
    (public,) = found.rows["val"]
    assert public.id == "0000010"
    third = {"happy": 1 / 3, "surprised": 1 / 3, "contempt": 1 / 3}
    assert public.probs == tuple(third.get(emotion, 0.0) for emotion in EMOTIONS)
    assert found.rows["train"][0].probs[:3] == (0.4, 0.0, 0.6)
    assert found.rows["train"][2].probs[EMOTIONS.index("fear")] == 1

    packed = pack(tmp_path / "faces", tmp_path / "store", image_size=48)
    expected = np.repeat(np.stack([face(0), face(1), face(4)])[..., None], 3, axis=3)
    np.testing.assert_array_equal(packed.train.gather(np.arange(3)), expected)


def test_a_face_without_a_vote_is_left_out(tmp_path):
    rows = [*ROWS[:-1], row("Training", 20)]
    votes = write_votes(tmp_path / "votes.csv", rows)
    counts = convert(write_pixels(tmp_path / "pixels.csv", rows), votes, tmp_path / "faces")
    assert counts["no emotion"] == 3


@pytest.mark.parametrize("subfolders", [False, True])
def test_the_pictures_may_lie_in_folders(pixels, votes, tmp_path, subfolders):
    for usage, name, image, _ in ROWS:
        if name:
            folder = tmp_path / "png" / (FOLDER_OF[usage] if subfolders else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
    convert(pixels, votes, tmp_path / "from_csv")
    convert(tmp_path / "png", votes, tmp_path / "from_png")
    files = [sorted(p for p in (tmp_path / name).rglob("*.*")) for name in ("from_csv", "from_png")]
    assert len(files[0]) == 8
    for one, other in zip(*files, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def refused(pixels, votes, tmp_path):
    with pytest.raises(UserError) as raised:
        convert(pixels, votes, tmp_path / "faces")
    assert not (tmp_path / "faces").exists()
    return raised.value.faults


def test_files_that_do_not_belong_together_are_refused(votes, tmp_path):
    shorter = write_pixels(tmp_path / "fer2013.csv", ROWS[:-1])
    assert refused(shorter, votes, tmp_path) == (
        f"{shorter} and {votes}: the numbers of rows differ; use files of the same release",
    )
    shuffled = write_pixels(tmp_path / "fer2013.csv", ROWS[::-1])
    faults = refused(shuffled, votes, tmp_path)
    assert f"{shuffled}: line 2: Usage is 'PrivateTest', but 'Training' in the same row of {votes}" in faults


def test_pictures_that_are_missing_or_damaged_are_named(votes, tmp_path):
    (tmp_path / "png").mkdir()
    Image.fromarray(face(0)).save(tmp_path / "png/fer0000000.png")
    (fault,) = refused(tmp_path / "png", votes, tmp_path)
    assert "8 pictures with votes are missing, here and in FER2013Test, FER2013Valid, FER2013Train" in fault
    assert "fer0000001.png, fer0000004.png" in fault
    for _, name, _, _ in ROWS:
        if name:
            (tmp_path / "png" / name).write_bytes(b"")
    assert len(refused(tmp_path / "png", votes, tmp_path)) == 9


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Training,fer0000001", "Other,fer0000001", "line 3: Usage: expected one of PrivateTest, PublicTest, Training"),
        (",10,", ",ten,", "line 3: votes: expected whole numbers, got 0, 0, 0, 0, ten"),
        ("fer0000001.png", "../1.png", "line 3: Image name: expected a file name without a folder, got '../1.png'"),
        ("contempt,", "", "has no column contempt; its columns are Usage, Image name, neutral"),
        ("fer0000001.png,", "", "line 3: 11 values for 12 columns"),
    ],
)
def test_votes_that_are_wrong_are_named_by_line(pixels, votes, tmp_path, old, new, fault):
    text = votes.read_text()
    assert old in text
    votes.write_text(text.replace(old, new, 1))
    assert fault in refused(pixels, votes, tmp_path)[0]


@pytest.mark.parametrize("wrong", ["1 2 3", "256 " * 2304, "-1 " * 2304, "x " * 2304])
def test_pixels_that_are_wrong_are_named_by_line(pixels, votes, tmp_path, wrong):
    with pixels.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[2][1] = wrong
    with pixels.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert refused(pixels, votes, tmp_path) == (f"{pixels}: line 3: pixels: expected 2304 whole numbers from 0 to 255",)


def test_files_that_are_no_csv_are_refused(pixels, votes, tmp_path):
    assert "cannot be read (No such file or directory)" in refused(pixels, tmp_path / "none.csv", tmp_path)[0]
    votes.write_bytes(b"\xff\xfe\x00")
    assert "not a CSV file in UTF-8" in refused(pixels, votes, tmp_path)[0]


def test_a_split_without_faces_is_refused(tmp_path):
    rows = [r for r in ROWS if r[0] != "PublicTest"]
    pixels, votes = write_pixels(tmp_path / "fer2013.csv", rows), write_votes(tmp_path / "fer2013new.csv", rows)
    assert refused(pixels, votes, tmp_path) == (f"{votes}: no face with votes for an emotion in PublicTest",)


def test_an_interrupted_conversion_cleans_up(pixels, votes, tmp_path):
    """It ends as every command does, so a half-made folder is deleted."""
    votes.unlink()
    os.mkfifo(votes)  # whoever opens it waits for a writer
    command = [sys.executable, "-m", "raytune_emotion.ferplus", str(pixels), str(votes), str(tmp_path / "faces")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, votes.open("w"):
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted\n")
    assert not list(tmp_path.glob(".faces*"))


def test_it_runs_from_the_command_line(pixels, votes, tmp_path, capsys):
    assert main([str(pixels), str(votes), str(tmp_path / "faces")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'faces'}: 3 train, 1 val, 2 no emotion,")
    assert f"next: python -m raytune_emotion.pack {tmp_path / 'faces'} DEST --image-size 48" in out

    command = [sys.executable, "-m", "raytune_emotion.ferplus", str(pixels), str(votes), str(tmp_path / "faces")]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == (f"error: {tmp_path / 'faces'}: exists already; name another destination, or remove it\n")
