import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raytune_emotion.cli import command_main
from raytune_emotion.config import RunConfig
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.pictures import PictureFiles, list_pictures
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.learn.loop import fit
from raytune_emotion.learn.model import mean_std
from raytune_emotion.learn.prediction_table import CsvTable, JsonLines
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.storage.locations import Folder, Remote
from raytune_emotion.tuning.study.spec import write_spec
from tests.support.exports import untrained_best
from tests.support.faces import picture
from tests.support.studies import spec_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    """A study folder with the weights of two trials, as far as `export` looks at it."""
    folder = tmp_path_factory.mktemp("results") / "a study"
    for number in (3, 5):
        settings = {"data.image_size": 32, "model.backbone": "test_resnet", "train.epochs": 1, "train.seed": number}
        trial = folder / "trials" / f"{number:04d}"
        list(fit(RunConfig.from_flat(settings), store, device=CPU, folder=trial))
        (trial / "params.json").write_text(json.dumps(settings))
    write_spec(folder, spec_of(store))
    return folder


@pytest.fixture(scope="module")
def export(study):
    write_package(study / "best", read_best(study / "trials" / "0005" / BEST))
    return study / "best"


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def seed_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["raytune_emotion"]["settings"]["train.seed"]


class TestExport:
    def test_trial_is_exported_by_name(self, study, tmp_path, capsys):
        assert command_main("export", [str(study), str(tmp_path / "one"), "--trial", "0005"]) == 0
        assert capsys.readouterr().out == f"trial 0005 is exported to {tmp_path / 'one'}\n"
        assert seed_of(tmp_path / "one") == 5
        assert "- Trial 0005 of the study a study.\n" in (tmp_path / "one" / "README.md").read_text()
        assert command_main("export", [str(study), str(tmp_path / "one"), "--trial", "0003"]) == 0
        assert seed_of(tmp_path / "one") == 3

    @pytest.mark.parametrize("trial", ["0004", "../trials/0003", ""])
    def test_a_trial_that_is_not_there(self, study, tmp_path, capsys, trial):
        assert command_main("export", [str(study), str(tmp_path / "x"), f"--trial={trial or 'x'}"]) == 2
        assert f"no trial {trial or 'x'}; there are 0003, 0005" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_no_study(self, tmp_path, capsys):
        assert command_main("export", [str(tmp_path), str(tmp_path / "x")]) == 2
        assert command_main("export", [str(tmp_path), str(tmp_path / "x"), "--trial", "0001"]) == 2
        assert capsys.readouterr().err.count("not a study, because it has no study.yaml; ") == 2


class TestPredict:
    def test_the_table(self, export, store, faces, capsys):
        folder = faces / "val_set" / "images"
        assert command_main("predict", [str(export), str(folder)]) == 0
        header, *rows = rows_of(capsys.readouterr().out)
        assert header == ["image", *EMOTIONS]
        assert [Path(row[0]).stem for row in rows] == sorted(store.val.ids)
        assert all(len(number.partition(".")[2]) == 6 for row in rows for number in row[1:])
        prob_NK = np.array([row[1:] for row in rows], float)
        assert np.allclose(prob_NK.sum(axis=1), 1, atol=1e-5)

        # The pixels and the numbers of training: those of the packed store, by the loop's own evaluation.
        from raytune_emotion.data.augment import normalise

        network = load_package(export).model.model
        pixels = torch.from_numpy(store.val.gather(np.arange(len(store.val))))
        with torch.inference_mode():
            wanted = network(normalise(pixels, *mean_std(network))).softmax(-1)
        order = [sorted(store.val.ids).index(id_) for id_ in store.val.ids]
        assert np.allclose(prob_NK[order], wanted, atol=2e-6)

    def test_mirror_gives_the_mean_of_an_image_and_its_mirror_image(self, export, store, faces, capsys):
        folder = faces / "val_set" / "images"
        found = {}
        for options in ((), ("--mirror",)):
            assert command_main("predict", [str(export), str(folder), *options]) == 0
            rows = rows_of(capsys.readouterr().out)[1:]
            found[options] = {Path(row[0]).stem: np.array(row[1:], float) for row in rows}
        package, images_NHWC = load_package(export), store.val.gather(np.arange(len(store.val)))
        mirrored_NK = package.predict(images_NHWC, mirror=True)
        views = package.predict(images_NHWC), package.predict(np.ascontiguousarray(images_NHWC[:, :, ::-1]))
        assert np.allclose(mirrored_NK, np.mean(views, axis=0), atol=1e-6)
        for id_, expected_K in zip(store.val.ids, mirrored_NK, strict=True):
            assert np.allclose(found["--mirror",][id_], expected_K, atol=2e-6)
        assert max(np.abs(found[()][id_] - found["--mirror",][id_]).max() for id_ in store.val.ids) > 1e-4

    def test_images_and_folders_in_the_order_given(self, export, faces, tmp_path, capsys):
        source = sorted((faces / "val_set" / "images").iterdir())
        folder = tmp_path / "faces, many"
        folder.mkdir()
        for name in ("b.png", "a.JPG", ".hidden.png"):
            Image.open(source[0]).save(folder / name, format="PNG")
        (folder / "notes.txt").touch()
        odd = tmp_path / "without an ending"
        odd.write_bytes(source[1].read_bytes())
        assert command_main("predict", [str(export), str(odd), str(folder), str(odd), "--device", "cpu"]) == 0
        rows = rows_of(capsys.readouterr().out)[1:]
        assert [row[0] for row in rows] == [str(odd), str(folder / "a.JPG"), str(folder / "b.png"), str(odd)]
        assert rows[0] == rows[3]
        assert rows[1][1:] == rows[2][1:]

    def test_a_prediction_does_not_depend_on_the_other_images(self, export, faces, capsys):
        files = [str(file) for file in sorted((faces / "train_set" / "images").iterdir())[:70]]
        assert command_main("predict", [str(export), *files]) == 0
        rows = rows_of(capsys.readouterr().out)[1:]
        assert command_main("predict", [str(export), files[0], files[-1]]) == 0
        alone = rows_of(capsys.readouterr().out)[1:]
        assert np.allclose(
            np.array([rows[0][1:], rows[-1][1:]], float), np.array([r[1:] for r in alone], float), atol=2e-6
        )

    def test_every_unreadable_image_is_named_and_all_others_are_predicted(self, export, faces, tmp_path, capsys):
        good = next((faces / "val_set" / "images").iterdir())
        text, torn = tmp_path / "a.jpg", tmp_path / "b.jpg"
        text.write_text("no picture")
        Image.new("RGB", (300, 300), "red").save(torn, quality=95)
        torn.write_bytes(torn.read_bytes()[:900])
        many = [str(good)] * 70
        assert command_main("predict", [str(export), str(text), *many, str(torn)]) == 3
        out, err = capsys.readouterr()
        assert [row[0] for row in rows_of(out)] == ["image", *many]
        *named, last = err.splitlines()
        assert [line.partition(str(tmp_path))[2][:7] for line in named] == ["/a.jpg:", "/b.jpg:"]
        assert last == "2 images could not be read; all others were predicted"
        assert command_main("predict", [str(export), str(text)]) == 3
        assert capsys.readouterr().err.endswith("\n1 image could not be read; nothing was predicted\n")

    def test_a_link_in_a_folder_that_leads_nowhere_is_named(self, export, tmp_path, capsys):
        picture(1).save(tmp_path / "a.png")
        (tmp_path / "b.png").symlink_to("nowhere")
        (tmp_path / "c.png").symlink_to("a.png")
        assert command_main("predict", [str(export), str(tmp_path)]) == 3
        out, err = capsys.readouterr()
        assert [row[0] for row in rows_of(out)] == ["image", f"{tmp_path}/a.png", f"{tmp_path}/c.png"]
        assert err.startswith(f"error: {tmp_path}/b.png: the picture cannot be decoded (No such file or directory)\n")

    def test_a_missing_image_among_others_is_named_and_these_are_predicted(self, export, faces, tmp_path, capsys):
        good = next((faces / "val_set" / "images").iterdir())
        (tmp_path / "empty").mkdir()
        missing = [tmp_path / "empty", tmp_path / "none.jpg"]
        assert command_main("predict", [str(export), str(missing[0]), str(good), str(missing[1])]) == 3
        out, err = capsys.readouterr()
        assert [row[0] for row in rows_of(out)] == ["image", str(good)]
        assert err.splitlines() == [
            f"error: {missing[0]}: no image in this folder; name the images, or their folder",
            f"error: {missing[1]}: no such image; name an existing one",
            "2 images could not be read; all others were predicted",
        ]

    def test_one_image_in_a_terminal_is_a_list_with_the_likeliest_first(self, export, faces, capsys, monkeypatch):
        folder = faces / "val_set" / "images"
        face = str(next(folder.iterdir()))
        assert command_main("predict", [str(export), face]) == 0
        header, row = rows_of(capsys.readouterr().out)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert command_main("predict", [str(export), face]) == 0
        name, *lines = capsys.readouterr().out.splitlines()
        wanted = sorted(zip(map(float, row[1:]), header[1:], strict=True), key=lambda pair: -pair[0])
        assert name == face
        assert [line.split()[-1] for line in lines] == [emotion for _, emotion in wanted]
        assert lines[0] == f"{100 * wanted[0][0]:6.1f} %  {wanted[0][1]}"
        for more in ([face, face], [face, "--format", "csv"]):
            assert command_main("predict", [str(export), *more]) == 0
            assert capsys.readouterr().out.startswith("image,neutral,")

    def test_rows_are_written_while_later_images_are_read(self, export, faces, monkeypatch):
        """So that a million images need no more memory than a batch."""
        from raytune_emotion import predict

        written, read = [], []
        files = [file.name for file in sorted((faces / "train_set" / "images").iterdir())[:10]]

        class Counted(PictureFiles):
            def decode(self, image_size, at_once):
                for each in super().decode(image_size, at_once):
                    read.append(each[0])
                    yield each

        monkeypatch.setattr(predict, "_BATCH", 3)
        source = Counted(Folder(faces / "train_set" / "images"), files)
        for batch in predict.predict(load_package(export), [source]):
            written += batch.names
            assert len(read) == len(written)
        assert [Path(name).name for name in written] == files

    def test_formats_hold_the_same(self, export, faces, tmp_path, capsysbinary):
        folder = faces / "val_set" / "images"
        found = {}
        for name in ("csv", "jsonl", "parquet"):
            assert command_main("predict", [str(export), str(folder), "--format", name]) == 0
            (tmp_path / name).write_bytes(capsysbinary.readouterr().out)
        _, *rows = rows_of((tmp_path / "csv").read_text())
        found["csv"] = {row[0]: [float(p) for p in row[1:]] for row in rows}
        lines = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
        assert list(lines[0]["probabilities"]) == list(EMOTIONS)
        found["jsonl"] = {line["image"]: list(line["probabilities"].values()) for line in lines}
        table = pq.read_table(tmp_path / "parquet")
        assert table.column_names == ["image", *EMOTIONS]
        found["parquet"] = {row["image"]: [row[name] for name in EMOTIONS] for row in table.to_pylist()}
        assert found["csv"] == found["jsonl"]
        assert list(found["csv"]) == list(found["parquet"])
        for name, probs in found["csv"].items():
            assert found["parquet"][name] == pytest.approx(probs, abs=1e-6)

    def test_packed_store_is_predicted_as_its_images_are(self, export, store, faces, capsys, tmp_path):
        assert command_main("predict", [str(export), str(store.path)]) == 0
        _, *rows = rows_of(capsys.readouterr().out)
        assert [row[0] for row in rows] == [f"train/{i}" for i in store.train.ids] + [f"val/{i}" for i in store.val.ids]
        image = faces / "val_set" / "images" / f"{store.val.ids[0]}.jpg"
        assert command_main("predict", [str(export), str(image)]) == 0
        _, alone = rows_of(capsys.readouterr().out)
        assert np.allclose(np.array(rows[-33][1:], float), np.array(alone[1:], float), atol=2e-6)
        pack(faces, tmp_path / "store", image_size=16)
        assert command_main("predict", [str(export), str(tmp_path / "store")]) == 2
        assert capsys.readouterr().err.startswith(
            f"error: {tmp_path / 'store'}: holds images of 16 px, but the model takes 32 px; name the folder"
        )

    def test_files_and_folders_at_uris(self, export, faces, capsys):
        folder = faces / "val_set" / "images"
        face = sorted(folder.iterdir())[0]
        assert command_main("predict", [str(export), face.as_uri(), folder.as_uri()]) == 0
        _, first, *rows = rows_of(capsys.readouterr().out)
        assert len(rows) == 33
        assert first == rows[0]
        assert first[0] == face.as_uri()
        assert command_main("predict", [str(export), f"{folder.as_uri()}/none.jpg"]) == 2
        assert capsys.readouterr().err == f"error: {folder.as_uri()}/none.jpg: no such image; name an existing one\n"

    def test_a_study_at_a_uri_in_place_of_its_export_is_not_copied(self, study, export, tmp_path, monkeypatch, capsys):
        picture(1).save(tmp_path / "face.png")
        pull, pulled = Remote.pull, []

        def log(remote, folder, names):
            pulled.extend(names := list(names))
            pull(remote, folder, names)

        monkeypatch.setattr(Remote, "pull", log)
        assert command_main("predict", [study.as_uri(), str(tmp_path / "face.png")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {study.as_uri()}: not an export, because it has no config.json")
        assert f"did you mean {export.as_uri()}" in said
        assert pulled == ["best/config.json"]

    @pytest.mark.long
    def test_as_a_module_without_ray_a_closed_pipe_is_no_traceback(self, export, faces, tmp_path):
        for name in ("ray", "optuna"):
            (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not needed')")
        surroundings = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
        images = [faces / "train_set" / "images"] * 5  # more than a pipe holds
        command = [sys.executable, "-m", "raytune_emotion.predict", export, *images]
        with subprocess.Popen(
            command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline().startswith("image,neutral")
            assert len(process.stdout.readline().split(",")) == 14
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(60) == 1

    def test_paths_that_are_not_there_are_named_together(self, export, tmp_path, capsys):
        assert command_main("predict", [str(export), str(tmp_path), str(tmp_path / "x.jpg")]) == 2
        assert capsys.readouterr() == (
            "",
            f"error: {tmp_path}: no image in this folder; name the images, or their folder\n"
            f"error: {tmp_path / 'x.jpg'}: no such image; name an existing one\n",
        )

    @pytest.mark.parametrize("device", ["cuda:7", "mars", "meta", "hpu", "ipu"])
    def test_a_device_that_is_not_here(self, export, tmp_path, capsys, device):
        (tmp_path / "face.jpg").touch()
        assert command_main("predict", [str(export), str(tmp_path / "face.jpg"), "--device", device]) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith(f"error: --device {device}: not a")
        assert len(told) < 300


def test_json_lines_are_valid_in_any_encoding_of_the_output():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")  # as commands write
    JsonLines(stream, ["fröhlich"]).write(["Zoë.jpg"], np.ones((1, 1)))
    assert json.loads(stream.buffer.getvalue()) == {"image": "Zoë.jpg", "probabilities": {"fröhlich": 1.0}}


def test_names_are_escaped_for_a_terminal_alone():
    odd = "a\x1b[2J.jpg"
    shown = {}
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        CsvTable(stream, ["happy"]).write([odd], np.ones((1, 1)))
        shown[terminal] = stream.getvalue()
    assert odd in shown[False]
    assert "\x1b" not in shown[True]
    assert shown[True].endswith("\na.jpg,1.000000\n")


def test_files_that_are_named_one_by_one_are_predicted_in_batches(tmp_path):
    places = []
    for folder, names in (("a", ["2", "1"]), ("b", ["1"]), ("a", ["3", "2"])):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in names:
            picture(1).save(tmp_path / folder / f"{name}.png")
            places.append(Folder(tmp_path / folder / f"{name}.png"))
    found, faults = list_pictures(places)
    assert [[*pictures.files] for pictures in found] == [["2.png", "1.png"], ["1.png"], ["3.png", "2.png"]]
    assert faults == []
    labels = [name for pictures in found for name, _ in pictures.decode(16, 64)]
    assert labels == [str(place) for place in places]


def test_images_beside_a_mistyped_uri_are_not_lost(tmp_path):
    picture(1).save(tmp_path / "a.png")
    found, faults = list_pictures([Folder(tmp_path / "a.png"), Remote("ftp://host/b.png")])
    assert [list(pictures.files) for pictures in found] == [["a.png"]]
    (fault,) = faults
    assert fault.startswith("ftp://host/b.png: cannot be used (")


def test_the_mirror_image_is_predicted_too(tmp_path):
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    package = load_package(tmp_path / "best")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    both = (package.predict(images_NHWC) + package.predict(images_NHWC[:, :, ::-1].copy())) / 2
    assert np.allclose(package.predict(images_NHWC, mirror=True), both)
    assert not np.allclose(package.predict(images_NHWC), both)
