import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from raytune_emotion.data import synthetic
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.synthetic import draw_face, draw_point, sample_folder, write_sample
from raytune_emotion.emotions import EMOTIONS, VALENCE_AROUSAL, label_distribution
from raytune_emotion.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def annotation(folder: Path, split: str, index: int) -> str:
    return (folder / split / "annotations" / f"{index}_prob_rank.txt").read_text()


def probabilities(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def face_at(valence: float, arousal: float, person: int = 0) -> npt.NDArray[np.float64]:
    return draw_face(valence, arousal, np.random.default_rng(person), 64).astype(np.float64)


def test_the_folder_is_what_packing_reads(tmp_path: Path) -> None:
    write_sample(tmp_path / "faces", train=11, val=4, image_size=24)
    store = pack(tmp_path / "faces", tmp_path / "store", image_size=24, workers=1)
    assert sorted(store.train.ids, key=int) == [str(i) for i in range(11)]
    assert sorted(store.val.ids, key=int) == [str(i) for i in range(4)]
    for row, id_ in enumerate(store.train.ids):
        with Image.open(tmp_path / "faces" / "train_set" / "images" / f"{id_}.jpg") as image:
            np.testing.assert_array_equal(store.train.gather(np.array([row]))[0], np.asarray(image))
        expected = probabilities(annotation(tmp_path / "faces", "train_set", int(id_)))
        np.testing.assert_allclose(store.train.prob_NK[row], expected, rtol=1e-6)


def test_annotations_look_as_in_the_wild_and_are_the_labels_of_the_points(tmp_path: Path) -> None:
    write_sample(tmp_path / "faces", train=40, val=40, image_size=16, seed=3)
    for number, split in enumerate(("train_set", "val_set")):
        for index in range(40):
            text = annotation(tmp_path / "faces", split, index)
            assert text.endswith("\n")
            assert text.count("\n") == 1
            assert " " not in text
            probs = probabilities(text)
            assert text.strip() == ",".join(map(repr, probs))
            assert len(probs) == len(EMOTIONS)
            assert min(probs) >= 0
            assert sum(probs) == pytest.approx(1, abs=1e-9)
            valence, arousal = draw_point(np.random.default_rng((3, number, index)))
            assert probs == label_distribution(np.array([valence]), np.array([arousal]))[0].tolist()


def test_a_sample_is_the_first_part_of_every_larger_one(tmp_path: Path) -> None:
    write_sample(tmp_path / "small", train=7, val=2, image_size=20, seed=5)
    write_sample(tmp_path / "large", train=12, val=6, image_size=20, seed=5)
    small, large = contents(tmp_path / "small"), contents(tmp_path / "large")
    assert len(small) == 2 * (7 + 2)
    assert len(large) == 2 * (12 + 6)
    assert small.items() <= large.items()


def test_seeds_splits_and_numbers_give_different_faces(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_sample(tmp_path / str(seed), train=5, val=5, image_size=20, seed=seed)
    images = [data for seed in "01" for name, data in contents(tmp_path / seed).items() if name.endswith(".jpg")]
    assert len(images) == len(set(images)) == 20


def test_a_folder_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "mine").touch()
    with pytest.raises(UserError, match="faces"):
        write_sample(tmp_path / "faces", train=1, val=1, image_size=16)
    assert list(contents(tmp_path)) == ["faces/mine"]


def test_a_sample_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_sample(tmp_path / "faces", train=1, val=1, image_size=16)
    assert list(tmp_path.iterdir()) == []


def test_points_lie_in_the_plane_and_every_class_leads_somewhere() -> None:
    rng = np.random.default_rng(0)
    valence, arousal = np.array([draw_point(rng) for _ in range(5000)]).T
    assert np.abs(valence).max() <= 1
    assert np.abs(arousal).max() <= 1
    leads = np.bincount(label_distribution(valence, arousal).argmax(1), minlength=len(EMOTIONS))
    assert leads.min() >= 1
    assert np.median(leads) > 5000 / 25
    assert leads.max() < 5000 / 5


@pytest.mark.parametrize("size", [16, 48, 225])
def test_faces_of_any_size(size: int) -> None:
    face = draw_face(0.5, -0.5, np.random.default_rng(0), size)
    assert face.shape == (size, size, 3)
    assert face.dtype == np.uint8
    assert face.std() > 15


@pytest.mark.parametrize("person", range(4))
def test_the_point_moves_the_features_and_not_the_surroundings(person: int) -> None:
    rest = face_at(0, 0, person)
    np.testing.assert_array_equal(rest, face_at(0, 0, person))
    for emotion in ("happy", "sad", "surprised", "fear", "serene", "quiet"):
        valence, _, arousal, _ = VALENCE_AROUSAL[emotion]
        changed = np.abs(face_at(valence, arousal, person) - rest).max(axis=2) > 8
        assert changed.mean() > 0.005
        assert not changed[:5].any()
        assert not changed[:30, :5].any()
        assert not changed[:30, -5:].any()


def test_small_steps_in_the_plane_are_small_steps_in_the_picture() -> None:
    step = np.abs(face_at(0.42, 0.40) - face_at(0.40, 0.40)).mean()
    leap = np.abs(face_at(0.90, -0.60) - face_at(0.40, 0.40)).mean()
    assert 0 < step < leap / 3


def test_valence_and_arousal_can_be_learned_but_not_at_a_glance() -> None:
    # Ridge regression on raw pixels, which knows nothing of position: it finds something, and leaves much.
    train, test, points, faces = 600, 150, [], []
    for index in range(train + test):
        rng = np.random.default_rng((9, index))
        points.append(draw_point(rng))
        faces.append(draw_face(*points[-1], rng, 32).ravel())
    y, x = np.array(points), np.array(faces) / 255
    x -= x[:train].mean(0)
    weights = np.linalg.solve(x[:train] @ x[:train].T + 30 * np.eye(train), y[:train] - y[:train].mean(0))
    guess = x[train:] @ x[:train].T @ weights
    for axis in range(2):
        assert 0.4 < np.corrcoef(guess[:, axis], y[train:, axis])[0, 1] < 0.9


@pytest.fixture
def small_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "TRAIN", 30)
    monkeypatch.setattr(synthetic, "VAL", 5)
    return tmp_path


def test_the_built_in_sample_is_made_once(small_built_in: Path) -> None:
    folder = sample_folder()
    assert folder.is_relative_to(small_built_in)
    assert len(contents(folder)) == 2 * (30 + 5)
    mark = folder / "mark"
    mark.touch()
    assert sample_folder() == folder
    assert mark.exists()


def test_the_built_in_sample_may_be_made_by_several_at_once(small_built_in: Path) -> None:
    start, folders = threading.Barrier(4), []

    def make() -> None:
        start.wait()
        folders.append(sample_folder())

    makers = [threading.Thread(target=make) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert len(contents(folders[0])) == 2 * (30 + 5)
    assert [f.name for f in folders[0].parent.iterdir()] == [folders[0].name]


def test_the_built_in_sample_in_a_cache_that_cannot_be_written(
    small_built_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_built_in / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_built_in / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        sample_folder()
