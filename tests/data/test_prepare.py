import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from raytune_emotion.data import prepare as prepare_module
from raytune_emotion.data.decode import decode_image
from raytune_emotion.data.packing.pack import pack, pack_sizes
from raytune_emotion.data.prepare import find_data, prepare, prepare_sizes
from raytune_emotion.data.store import is_store
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.locations import Folder
from tests.support.faces import picture, write_row
from tests.support.s3 import SECRET


def written(store):
    stat = (store.path / "manifest.json").stat()
    return stat.st_ino, stat.st_mtime_ns


def test_a_folder_is_packed_once(folder, cache, capsys):
    first = prepare(folder, image_size=16)
    packed = written(first)
    assert first.path.parent == cache
    assert capsys.readouterr().err == f"{folder}: packing once, at 16 px, into {first.path}\n"
    again = prepare(folder, image_size=16)
    assert (again.path, written(again)) == (first.path, packed)
    assert capsys.readouterr().err == ""


def test_what_changes_the_content_is_packed_anew(folder, cache):
    paths = {prepare(folder, image_size=16).path, prepare(folder, image_size=20).path}
    paths.add(prepare(folder, image_size=16, classes=EMOTIONS[::-1]).path)
    paths.add(prepare(folder, image_size=16, skip_bad=True).path)
    picture(77).save(folder / "train_set/images/2.png")
    latest = prepare(folder, image_size=16)
    paths.add(latest.path)
    assert len(paths) == len(list(cache.iterdir())) == 5
    np.testing.assert_array_equal(
        latest.train.gather(np.array([2]))[0], decode_image(folder / "train_set/images/2.png", 16)
    )


@pytest.mark.parametrize("names", [list(EMOTIONS[::-1]), np.array(EMOTIONS[::-1])], ids=["list", "array"])
def test_classes_may_be_any_sequence(folder, cache, tmp_path, names):
    first = prepare(folder, image_size=16, classes=names)
    assert first.classes == EMOTIONS[::-1]
    assert prepare(folder, image_size=16, classes=EMOTIONS[::-1]).path == first.path
    assert prepare(first.path, image_size=16, classes=names).fingerprint == first.fingerprint
    assert pack(folder, tmp_path / "store", image_size=16, classes=names).fingerprint == first.fingerprint


def test_the_default_size_of_a_folder_is_that_of_its_images_but_no_more_than_the_configuration_has(folder, cache):
    for name, side, packed_at in (("small", 40, 40), ("large", 400, 224)):
        copy = Path(shutil.copytree(folder, folder.parent / name))
        for image in copy.glob("train_set/images/*"):
            picture(5).resize((side, side + 9)).save(image)
        assert prepare(copy, image_size=None).image_size == packed_at


def test_a_store_is_used_as_it_is_or_refused(folder, tmp_path, cache):
    packed = pack(folder, tmp_path / "store", image_size=16)
    assert prepare(packed.path, image_size=None).path == packed.path
    assert prepare(packed.path, image_size=16).fingerprint == packed.fingerprint
    with pytest.raises(UserError) as raised:
        prepare(packed.path, image_size=32, classes=("a", "b"))
    size, classes = raised.value.faults
    assert "holds images of 16 px, but data.image_size is 32" in size
    assert "data.classes is a, b" in classes
    assert not cache.exists()


def test_a_damaged_store_in_the_cache_is_packed_again(folder, cache):
    first = prepare(folder, image_size=16)
    packed = written(first)
    (first.path / "val-00000.arrow").unlink()
    again = prepare(folder, image_size=16)
    assert again.path == first.path
    assert again.fingerprint == first.fingerprint
    assert written(again) != packed


def prepare_here(folder: Path) -> tuple[str, str]:
    prepared = prepare(folder, image_size=16)
    return str(prepared.path), prepared.fingerprint


def test_two_processes_may_prepare_at_once(folder, cache):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        first, second = executor.map(prepare_here, [folder, folder])
    assert first == second
    assert len(list(cache.iterdir())) == 1


def test_faults_of_a_folder_reach_who_prepares_it(folder, cache, capsys):
    (folder / "train_set/images/2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_set/images/2\.png"):
        prepare(folder, image_size=16)
    assert list(cache.iterdir()) == []
    assert prepare(folder, image_size=16, skip_bad=True).rejected == 1
    capsys.readouterr()
    assert prepare(folder, image_size=16, skip_bad=True).rejected == 1
    assert "rejected rows: 1, see" in capsys.readouterr().err


def test_stores_side_by_side_are_chosen_by_size(folder, tmp_path, cache):
    pack_sizes(Folder(folder), {size: Folder(tmp_path / "stores" / f"{size}px") for size in (16, 32)})
    place = tmp_path / "stores"
    assert is_store(place)
    data = find_data(place)
    assert {size: store.address for size, (store, _) in data.manifests.items()} == {
        size: str(place / f"{size}px") for size in (16, 32)
    }
    assert prepare(place, image_size=32).path == place / "32px"
    assert {size: store.image_size for size, store in prepare_sizes(data, (32, 16)).items()} == {16: 16, 32: 32}
    with pytest.raises(UserError) as raised:
        prepare(place, image_size=None)
    advice = f"choose one with data.image_size, or name one, such as {place / '32px'}"
    assert str(raised.value) == f"{place}: holds stores of 16, 32 px; {advice}"
    with pytest.raises(UserError, match=r"holds images of 16, 32 px, but data\.image_size is 24; set .* to 16 or 32"):
        prepare_sizes(data, (16, 24))
    assert not cache.exists()


@pytest.mark.parametrize("change", ["a label", "a row"])
def test_stores_side_by_side_with_other_faces_or_labels_are_refused(folder, tmp_path, cache, change):
    place = tmp_path / "stores"
    pack_sizes(Folder(folder), {size: Folder(place / f"{size}px") for size in (16, 24)})
    write_row(folder, "train", "0" if change == "a label" else "new", text=",".join("1" + "0" * 12))
    pack_sizes(Folder(folder), {32: Folder(place / "32px")})
    data = find_data(place)
    assert prepare_sizes(data, (16, 24)).keys() == {16, 24}
    with pytest.raises(UserError, match=r"the store of 16 px has other faces or labels than 32 px, so"):
        prepare_sizes(data, (16, 24, 32))


def test_a_folder_is_prepared_at_several_sizes_in_one_pass(folder, cache, monkeypatch):
    first = prepare(folder, image_size=16)
    packed, passes = written(first), []

    def pack_once(faces, dests, *, real=pack_sizes, **options):
        passes.append(sorted(dests))
        return real(faces, dests, **options)

    monkeypatch.setattr(prepare_module, "pack_sizes", pack_once)
    stores = prepare_sizes(find_data(folder), (16, 24, 32))
    assert passes == [[24, 32]]
    assert written(stores[16]) == packed
    assert stores[24].fingerprint == pack(folder, cache / "alone", image_size=24).fingerprint


@pytest.fixture
def upload(folder, bucket, request):
    """Copies the folder to a URI, which it returns."""

    def copy():
        location = bucket / request.node.name / "faces"
        location.push(folder, [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
        return str(location)

    return copy


def test_a_folder_at_a_uri_is_listed_once(folder, upload, cache, monkeypatch):
    uri, listings = upload(), []

    def listed(uri, real=remote.list_folder):
        listings.append(remote.name_of(uri))
        return real(uri)

    monkeypatch.setattr(remote, "list_folder", listed)
    data = find_data(uri)
    assert data.count_rows() == 8
    store = prepare(data, image_size=None)
    assert store.fingerprint == pack(folder, cache / "here", image_size=20).fingerprint
    assert (listings.count("images"), listings.count("annotations")) == (2, 2), "once a split"


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.long
def test_a_folder_at_a_uri_is_packed_as_one_on_a_disk(folder, tmp_path, upload, cache, capsys):
    (folder / "train_set/images/2.png").write_bytes(b"")
    (folder / "train_set/annotations/3_prob_rank.txt").write_text("")
    uri = upload()
    here = pack(folder, tmp_path / "here", image_size=20, skip_bad=True)
    there = pack(uri, tmp_path / "there", image_size=20, skip_bad=True)
    assert files_of(here.path) == files_of(there.path)
    with pytest.raises(UserError) as raised:
        pack(uri, tmp_path / "refused", image_size=20)
    assert [fault.partition(": ")[2].partition(" (")[0] for fault in raised.value.faults[:2]] == [
        "empty annotation",
        "image cannot be decoded",
    ]
    assert all(fault.startswith(f"{uri}: ") for fault in raised.value.faults)
    capsys.readouterr()
    assert find_data(uri).count_rows() == 8
    prepared = prepare(uri, image_size=None, skip_bad=True)
    assert (prepared.image_size, prepared.fingerprint) == (20, here.fingerprint)
    assert capsys.readouterr().err.startswith(f"{uri}: packing once, at 20 px, into {prepared.path}\n")
    assert prepare(uri, image_size=None, skip_bad=True).path == prepared.path
    assert capsys.readouterr().err == f"{prepared.path}: rejected rows: 2, see {prepared.path / 'rejected.csv'}\n"


def test_a_uri_without_a_store_or_with_credentials_is_one_clear_sentence(bucket, stored):
    store, uri = stored
    with pytest.raises(UserError, match="no such folder"):
        prepare(bucket / "nothing", image_size=None)
    with pytest.raises(UserError, match="exists already"):
        pack(store.path.parent / "faces", uri, image_size=16)
    with pytest.raises(UserError, match=r"holds images of 16 px, but data\.image_size is 32"):
        prepare(uri, image_size=32)
    assert prepare(uri, image_size=None).fingerprint == store.fingerprint
    with pytest.raises(UserError, match="contains credentials") as raised:
        is_store(uri.replace("s3://", f"s3://key:{SECRET}@"))
    assert SECRET not in str(raised.value)
