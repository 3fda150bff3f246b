import contextlib
import json
import math
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from raytune_emotion.config import RunConfig
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.learn import export_folder
from raytune_emotion.learn.checkpoint import Best, read_best
from raytune_emotion.learn.evaluation import evaluate
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.learn.graphs import PixelsToProbabilities
from raytune_emotion.learn.model import build_model, mean_std
from raytune_emotion.learn.run_folder import BEST
from tests.support.exports import untrained_best

CPU = torch.device("cpu")
FILES = ["README.md", "config.json", "metrics.json", "model.safetensors"]


def logits_of(model: torch.nn.Module, size: int) -> torch.Tensor:
    x_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(x_BCHW)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("test_resnet", 32),
        ("test_resnet.r160_in1k", 48),
        ("test_efficientnet", 64),
        ("test_convnext", 48),
        ("test_nfnet", 64),
        ("test_vit", 64),
        ("test_vit3", 96),
        ("test_byobnet", 40),
        ("coat_lite_tiny", 64),  # its layers share parameters
    ],
)
def test_timm_and_load_package_give_the_model(tmp_path, backbone, size):
    dest = tmp_path / "an export, 1"
    best = untrained_best(backbone, size, classes=("calm", "glad", "sad"))
    write_package(dest, best)
    assert sorted(path.name for path in dest.iterdir()) == FILES
    model = build_model(RunConfig.from_flat({**best.settings, "model.weights_dir": None}), weights=False)
    model.load_state_dict(best.weights)
    wanted = logits_of(model, size)
    assert wanted.shape == (2, 3)

    by_timm = timm.create_model(f"local-dir:{dest}", pretrained=True)
    assert by_timm.num_classes == 3
    assert torch.allclose(logits_of(by_timm, size), wanted, atol=1e-6, rtol=0)

    loaded = load_package(dest)
    assert torch.equal(logits_of(loaded.model.model, size), wanted)
    assert (loaded.classes, loaded.image_size) == (("calm", "glad", "sad"), size)
    read = timm.data.resolve_model_data_config(by_timm)
    assert [tuple(read[key]) for key in ("input_size", "mean", "std")] == [(3, size, size), *mean_std(model)]
    images_NHWC = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    whole = PixelsToProbabilities(model.eval(), *mean_std(model))
    with torch.inference_mode():
        assert np.allclose(loaded.predict(images_NHWC), whole(torch.from_numpy(images_NHWC)), atol=1e-6)


def test_an_export_of_a_run_has_its_metrics(trained_run, store, tmp_path):
    folder, reports = trained_run
    write_package(tmp_path / "best", read_best(folder / BEST), ["Trial 0007."])
    report = min(reports, key=lambda report: report["val_js"])
    assert json.loads((tmp_path / "best" / "metrics.json").read_text()) == report
    loaded = load_package(tmp_path / "best")
    for name, value in evaluate(loaded.model.model, store.val, classes=loaded.classes, device=CPU).items():
        assert value == pytest.approx(report[f"val_{name}"], rel=1e-5, abs=1e-6)


def test_what_belongs_to_this_machine_alone_is_left_out(tmp_path):
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    for file in (tmp_path / "best").iterdir():
        assert b"somebody" not in file.read_bytes()
    own = json.loads((tmp_path / "best" / "config.json").read_text())["raytune_emotion"]
    assert own["data_fingerprint"] == "f1a9"
    assert RunConfig.from_flat(own["settings"]).model.backbone == "test_resnet"


BAD_SIZES = (
    [3, "x", "x"], [3, 0, 0], [3, -1, -1], [3, 32.0, 32.0], [3, True, True], [3, 20000, 20000],
    [3, 32], [3, 32, 48], [1, 32, 32], [], {}, None,
)  # fmt: skip


class TestReplacing:
    old, new = untrained_best("test_resnet", 32, seed=1), untrained_best("test_resnet", 32, seed=2)

    def shows(self, dest: Path, best: Best) -> bool:
        return all(
            torch.equal(tensor, best.weights[name]) for name, tensor in load_file(dest / "model.safetensors").items()
        )

    def test_the_new_takes_the_place_of_the_old(self, tmp_path):
        dest = tmp_path / "best"
        write_package(dest, self.old)
        (dest / ".DS_Store").touch()  # of somebody who has looked at it on a Mac
        write_package(dest, self.new)
        assert self.shows(dest, self.new)
        assert [path.name for path in tmp_path.iterdir()] == ["best"]

    def test_no_half_export_is_ever_there(self, tmp_path):
        dest = tmp_path / "best"
        write_package(dest, self.old)
        halves, looks, done = [], [], threading.Event()

        def watch():
            while not done.is_set():
                with contextlib.suppress(FileNotFoundError):
                    folder = os.open(dest, os.O_RDONLY)
                    try:
                        names = sorted(os.listdir(folder))  # noqa: PTH208
                        # What has left its place meanwhile is being deleted.
                        if os.path.samestat(os.fstat(folder), dest.stat()):
                            looks.append(1)
                            halves.extend([names] if names != FILES else [])
                    finally:
                        os.close(folder)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for best in (self.new, self.old) * 5:
                write_package(dest, best)
        finally:
            done.set()
            watcher.join()
        assert not halves
        assert len(looks) > 10

    @pytest.mark.parametrize("name", FILES)
    def test_a_failure_leaves_the_old(self, tmp_path, monkeypatch, name):
        dest = tmp_path / "best"
        write_package(dest, self.old)

        def full(path, *rest):
            if path.name == name:
                raise OSError(28, "No space left on device", str(path))
            return original(path, *rest)

        target = "atomic_write" if name == "model.safetensors" else "write_text"
        original = getattr(export_folder, target)
        monkeypatch.setattr(export_folder, target, full)
        with pytest.raises(Breakdown, match="best: no space left on the disk; free some space"):
            write_package(dest, self.new)
        assert self.shows(dest, self.old)
        assert [path.name for path in tmp_path.iterdir()] == ["best"]

    def test_a_failure_between_two_renames_leaves_the_old(self, tmp_path, monkeypatch):
        dest = tmp_path / "best"
        write_package(dest, self.old)
        rename = Path.rename

        def failing(path, target):
            if path.name.endswith(".part") and target == dest:
                raise OSError(5, "Input/output error", str(path))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(UserError, match="Input/output error"):
            write_package(dest, self.new)
        assert self.shows(dest, self.old)

    def test_what_a_killed_export_left_is_mended(self, tmp_path):
        dest = tmp_path / "best"
        write_package(dest, self.old)
        dest.rename(tmp_path / ".best.old")
        left = tmp_path / f".best.{socket.gethostname()}.0123456789ab.part"
        left.mkdir()
        (left / "torn").touch()
        os.utime(left, (0, 0))
        write_package(dest, self.new)
        assert self.shows(dest, self.new)
        assert [path.name for path in tmp_path.iterdir()] == ["best"]

    def test_two_exports_at_once_are_not_mixed(self, tmp_path, monkeypatch):
        dest, write_format = tmp_path / "best", export_folder._write_format

        def with_another(*args):
            monkeypatch.setattr(export_folder, "_write_format", write_format)
            write_package(dest, self.old)  # as another process, after the first file of this one
            return write_format(*args)

        monkeypatch.setattr(export_folder, "_write_format", with_another)
        write_package(dest, self.new)
        assert self.shows(dest, self.new)
        assert sorted(path.name for path in dest.iterdir()) == FILES

    def test_nothing_else_is_deleted(self, tmp_path):
        dest = tmp_path / "best"
        write_package(dest, self.old)
        (dest / "thesis.tex").touch()
        with pytest.raises(UserError, match=r"holds files that do not belong to an export \(thesis.tex\)"):
            write_package(dest, self.new)
        assert self.shows(dest, self.old)
        for name, text in (("README.md", "# My faces\n"), ("config.json", '{"architecture": "resnet18"}')):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).write_text(text)
            (tmp_path / name / "README.md").write_text("# Of somebody\n")
            with pytest.raises(UserError, match=rf"holds files that do not belong to an export \({name}\)"):
                write_package(tmp_path / name, self.new)
            assert (tmp_path / name / "README.md").read_text() == "# Of somebody\n"
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="is not a folder"):
            write_package(tmp_path / "file", self.new)
        with pytest.raises(UserError, match="cannot be written"):
            write_package(tmp_path / "file" / "best", self.new)
        (tmp_path / "empty").mkdir()
        write_package(tmp_path / "empty", self.new)
        assert self.shows(tmp_path / "empty", self.new)


class TestFaults:
    @pytest.fixture
    def dest(self, tmp_path):
        write_package(tmp_path / "best", untrained_best("test_resnet", 32))
        return tmp_path / "best"

    def test_a_folder_that_is_no_export(self, dest, tmp_path):
        with pytest.raises(UserError, match=f"did you mean {dest}"):
            load_package(tmp_path)
        with pytest.raises(UserError, match="none: no such folder"):
            load_package(tmp_path / "none")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda dest: (dest / "config.json").write_text("{"),
            lambda dest: (dest / "config.json").write_text("[]"),
            lambda dest: (dest / "config.json").write_text("{}"),
            lambda dest: (dest / "config.json").write_bytes(b"\xff"),
            lambda dest: (dest / "model.safetensors").write_bytes(b"\x00" * 100),
            lambda dest: save_file({"a": torch.zeros(1)}, dest / "model.safetensors"),
            lambda dest: edit(dest, architecture="test_byobnet"),
            lambda dest: edit(dest, architecture="no_such_net"),
            lambda dest: edit(dest, label_names=["a", "b"]),
            lambda dest: edit(dest, label_names=["\x1b[2J", *EMOTIONS[1:]]),
            lambda dest: edit(dest, label_names=[EMOTIONS[1], *EMOTIONS[1:]]),
            lambda dest: edit(dest, model_args={"depth": "deep"}),
            *(lambda dest, size=size: edit_images(dest, input_size=size) for size in BAD_SIZES),
            lambda dest: edit_images(dest, mean="x"),
            lambda dest: edit_images(dest, mean=[0.5, 0.5, math.nan]),
            lambda dest: edit_images(dest, std=[0, 0, 0]),
            lambda dest: save_file(
                {name: weight * math.nan for name, weight in load_file(dest / "model.safetensors").items()},
                dest / "model.safetensors",
            ),
        ],
    )
    def test_a_damaged_export(self, dest, damage):
        damage(dest)
        with pytest.raises(UserError, match="a damaged export"):
            load_package(dest)

    @pytest.mark.parametrize(
        "changes",
        [
            {"model_args": {"checkpoint_path": "evil.pth"}},
            {"architecture": "local-dir:.", "model_args": {"pretrained": True}},
            {"architecture": "hf-hub:someone/something"},
        ],
    )
    def test_an_export_that_was_tampered_with_is_not_obeyed(self, dest, monkeypatch, changes):
        class Pickled:
            def __reduce__(self):
                return Path.touch, (dest.parent / "run",)

        monkeypatch.chdir(dest)
        torch.save({"state_dict": Pickled()}, dest / "evil.pth")
        edit(dest, **changes)
        with pytest.raises(UserError, match="a damaged export"):
            load_package(dest)
        assert not (dest.parent / "run").exists()

    def test_images_that_do_not_fit_into_memory_together_are_predicted_in_parts(self, dest):
        package = load_package(dest)
        images_NHWC = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
        wanted_NK, counts, forward = package.predict(images_NHWC, mirror=True), [], package.model.forward

        def narrow(x_BHWC):
            counts.append(len(x_BHWC))
            if len(x_BHWC) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(x_BHWC)

        package.model.forward = narrow
        assert np.abs(package.predict(images_NHWC, mirror=True) - wanted_NK).max() < 1e-6
        assert counts == [11, 5, *[2] * 10, 1, 1]

    def test_many_images_are_predicted_in_parts_and_none_are_no_error(self, dest, monkeypatch):
        package = load_package(dest)
        images_NHWC = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
        wanted_NK, counts, forward = package.predict(images_NHWC), [], package.model.forward
        monkeypatch.setattr(export_folder, "rows_of_side", lambda side: 4)
        package.model.forward = lambda x_BHWC: counts.append(len(x_BHWC)) or forward(x_BHWC)
        assert np.abs(package.predict(images_NHWC) - wanted_NK).max() < 1e-6
        assert counts == [4, 4, 3]
        assert package.predict(images_NHWC[:0]).shape == (0, len(package.classes))

    @pytest.mark.parametrize("change", [lambda x: x / 255.0, lambda x: x[:, :16], lambda x: x[0], lambda x: x[..., :1]])
    def test_images_of_another_kind_are_refused(self, dest, change):
        """Floats from 0 to 1 would be taken for almost black images."""
        images_NHWC = np.zeros((2, 32, 32, 3), np.uint8)
        with pytest.raises(UserError, match=r"images: expected uint8 \[N, 32, 32, 3\], got "):
            load_package(dest).predict(change(images_NHWC))

    def test_weights_of_another_model(self, tmp_path):
        best = untrained_best("test_resnet", 32)
        other = Best(untrained_best("test_byobnet", 32).weights, best.settings, best.fingerprint, best.report)
        with pytest.raises(UserError, match="the weights do not fit test_resnet"):
            write_package(tmp_path / "best", other)
        assert not list(tmp_path.iterdir())


def edit_images(dest: Path, **changes) -> None:
    """Change how an export reads images."""
    config = json.loads((dest / "config.json").read_text())
    edit(dest, pretrained_cfg=config["pretrained_cfg"] | changes)


def edit(dest: Path, **changes) -> None:
    config = json.loads((dest / "config.json").read_text())
    (dest / "config.json").write_text(json.dumps(config | changes))
