"""Backbones of a folder and of the hub."""

import json
import logging
import shutil

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models import save_for_hf

from raytune_emotion.config import DataConfig, ModelConfig, RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn.backbones import check_architecture, short_name
from raytune_emotion.learn.checkpoint import Best, read_best
from raytune_emotion.learn.combine import Soup
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.learn.model import build_model, check_weights, load_model, mean_std
from raytune_emotion.learn.origin import find_origin
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.tuning.report.dry_run import costs
from raytune_emotion.tuning.space.parser import load_space
from tests.support.training import CPU, reports_of_run, run_config

#: As a face backbone differs from the models of timm's registry.
ARGUMENTS = {"patch_size": 8, "img_size": 48, "class_token": False, "global_pool": "avg", "num_classes": 512}
HUB_NAME = "hf-hub:somebody/test_vit.cosface_ms1mv3"
FIRST = "patch_embed.proj.weight"


def saved(folder, *, safe=True):
    """A folder as timm saves a model, and the model."""
    torch.manual_seed(3)
    model = timm.create_model("test_vit", drop_path_rate=0.1, **ARGUMENTS)
    folder.mkdir(parents=True)
    save_for_hf(model, folder, safe_serialization=safe)
    return model


def cached(monkeypatch, tmp_path, **options):
    """A cache of the hub that holds the repository, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--somebody--test_vit.cosface_ms1mv3"
    model = saved(repository / "snapshots" / "0123456789abcdef", **options)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    return model


def configured(backbone, size=48, **model):
    return RunConfig(model=ModelConfig(backbone=backbone, **model), data=DataConfig(image_size=size))


def test_a_folder_is_a_backbone(tmp_path):
    model = saved(tmp_path / "face")
    backbone = f"local-dir:{tmp_path / 'face'}"
    check_weights(ModelConfig(backbone=backbone, pretrained=True))
    built = build_model(configured(backbone, pretrained=True))
    assert torch.equal(built.state_dict()[FIRST], model.state_dict()[FIRST])
    assert built(torch.zeros(1, 3, 48, 48)).shape == (1, 13)
    assert mean_std(built) == mean_std(model)
    # Another image size fits the position embeddings, as with timm's own names.
    assert build_model(configured(backbone, 32, pretrained=True))(torch.zeros(1, 3, 32, 32)).shape == (1, 13)


def test_from_scratch_is_from_scratch_also_where_weights_are_named(tmp_path, monkeypatch):
    model = cached(monkeypatch, tmp_path)
    saved(tmp_path / "weights" / "test_vit.cosface_ms1mv3")
    folder = f"local-dir:{tmp_path / 'weights' / 'test_vit.cosface_ms1mv3'}"
    for backbone, given in ((folder, None), (HUB_NAME, None), (HUB_NAME, str(tmp_path / "weights"))):
        built = build_model(configured(backbone, pretrained=False, weights_dir=given)).state_dict()
        assert built[FIRST].shape == model.state_dict()[FIRST].shape
        assert not torch.equal(built[FIRST], model.state_dict()[FIRST])


def test_a_repository_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    model = cached(monkeypatch, tmp_path)
    for name in (HUB_NAME, f"{HUB_NAME}@main"):
        built = build_model(configured(name, pretrained=True))
        assert torch.equal(built.state_dict()[FIRST], model.state_dict()[FIRST])


def test_a_repository_of_the_hub_is_taken_from_a_folder_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    model = saved(tmp_path / "weights" / short_name(HUB_NAME))
    built = build_model(configured(HUB_NAME, weights_dir=str(tmp_path / "weights"))).state_dict()
    assert torch.equal(built[FIRST], model.state_dict()[FIRST])
    for name in (HUB_NAME, f"{HUB_NAME}@refs/pr/1"):
        assert torch.equal(
            build_model(configured(name, weights_dir=str(tmp_path / "weights"))).state_dict()[FIRST], built[FIRST]
        )
        said = r"config.json of hf-hub:\S+ could not be fetched .* to a folder test_vit.cosface_ms1mv3 elsewhere"
        with pytest.raises(UserError, match=said) as caught:
            build_model(configured(name, pretrained=True))
        assert len(caught.value.faults) == 1


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_nothing_is_unpickled(tmp_path, monkeypatch, where):
    class Pickled:
        def __reduce__(self):
            return (tmp_path / "run").touch, ()

    if where == "hub":
        cached(monkeypatch, tmp_path, safe=False)
        backbone, said = HUB_NAME, "model.safetensors of hf-hub:.* could not be fetched"
    else:
        saved(tmp_path / "face", safe=False)
        backbone, said = f"local-dir:{tmp_path / 'face'}", "pytorch_model.bin would be unpickled, which can run any"
    for file in tmp_path.rglob("pytorch_model.bin"):
        torch.save({"state_dict": Pickled()}, file)
    with pytest.raises(UserError, match=said):
        build_model(configured(backbone, pretrained=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": {"checkpoint_path": "evil.pth"}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}},
        {"model_args": {"img_size": {"a": 1}}},
        {"architecture": "no_such_model"},
        {"architecture": ["test_vit"]},
        {"pretrained_cfg": 3},
        {"pretrained_cfg": {"std": [0, 0, 0]}},
        {"pretrained_cfg": {"mean": [0.5]}},
    ],
)
def test_a_configuration_that_is_not_plain_is_refused(tmp_path, changes):
    saved(tmp_path / "face")
    config = tmp_path / "face" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=r"config.json does not describe a model of timm") as caught:
        build_model(configured(f"local-dir:{tmp_path / 'face'}", pretrained=False))
    assert len(caught.value.faults) == 1


def test_where_weights_lie_is_not_taken_from_the_configuration(tmp_path):
    model = saved(tmp_path / "face")
    config = tmp_path / "face" / "config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"] |= {"file": "evil.pth", "url": "http://evil", "hf_hub_id": "evil/evil", "source": "url"}
    config.write_text(json.dumps(content))
    built = build_model(configured(f"local-dir:{tmp_path / 'face'}", pretrained=True))
    assert torch.equal(built.state_dict()[FIRST], model.state_dict()[FIRST])


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ("hf-hub:vit_tiny", "expected hf-hub:OWNER/NAME"),
        ("hf-hub:a/b/../c", "expected hf-hub:OWNER/NAME"),
        ("local-dir:faces/vit", "expected an absolute path"),
        ("s3:bucket/vit", "unknown source"),
        ("hf_hub:a/b", "unknown source; name a timm model, hf-hub:OWNER/NAME or local-dir:/PATH"),
    ],
)
def test_a_name_that_is_none_is_refused(backbone, said):
    with pytest.raises(UserError, match=said):
        check_architecture(backbone)


def test_a_folder_that_is_none_is_named(tmp_path):
    for pretrained in (True, False):
        with pytest.raises(UserError, match=rf"no file {tmp_path}/none/"):
            build_model(configured(f"local-dir:{tmp_path}/none", pretrained=pretrained))


def test_an_export_of_it_needs_nothing_else_and_names_the_licence(tmp_path, monkeypatch, caplog):
    cached(monkeypatch, tmp_path)
    config = configured(HUB_NAME, pretrained=True)
    model = build_model(config)
    report = {"report": 1, "epoch": 1.0, "val_js": 0.3}
    write_package(tmp_path / "best", Best(model.state_dict(), config.to_flat(), "f1a9", report))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    x_BCHW = torch.randn(2, 3, 48, 48)
    with torch.inference_mode(), caplog.at_level(logging.ERROR):
        wanted = model.eval()(x_BCHW)
        assert torch.allclose(load_package(tmp_path / "best").model.model(x_BCHW), wanted, atol=1e-6)
        by_timm = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
        assert torch.allclose(by_timm(x_BCHW), wanted, atol=1e-6)
    assert "only for non-commercial research" in (tmp_path / "best" / "README.md").read_text()


def exported(folder, config):
    """Export a model of a configuration as a training leaves it, and return the licence in its configuration."""
    model = build_model(config)
    origin = json.loads(json.dumps(find_origin(config.model, weights=False).description))
    report = {"report": 1, "epoch": 1.0, "val_js": 0.3}
    write_package(folder, Best(model.state_dict(), config.to_flat(), "f1a9", report, origin))
    return json.loads((folder / "config.json").read_text())["pretrained_cfg"].get("license")


def test_licence_of_the_starting_weights_stays_along_a_chain_of_exports(tmp_path, monkeypatch):
    cached(monkeypatch, tmp_path)
    config = configured(HUB_NAME, pretrained=True)
    for step in ("first", "second", "third"):
        assert "only for non-commercial research" in exported(tmp_path / step, config)
        assert "only for non-commercial research" in (tmp_path / step / "README.md").read_text()
        config = configured(f"local-dir:{tmp_path / step}", pretrained=True)
    from_scratch = configured(f"local-dir:{tmp_path / 'third'}", pretrained=False)
    assert exported(tmp_path / "from scratch", from_scratch) is None
    assert "non-commercial" not in (tmp_path / "from scratch" / "README.md").read_text()


def test_export_of_a_training_from_scratch_has_no_licence_of_weights(tmp_path):
    assert timm.get_pretrained_cfg("convnextv2_atto").license == "cc-by-nc-4.0"
    config = configured("convnextv2_atto", size=32, pretrained=False)
    assert exported(tmp_path / "best", config) is None
    assert "cc-by-nc" not in (tmp_path / "best" / "README.md").read_text()


def test_a_checkpoint_needs_the_start_of_its_training_no_more(tmp_path, store):
    saved(tmp_path / "face")
    config = run_config(model__backbone=f"local-dir:{tmp_path / 'face'}", model__pretrained=True, train__epochs=3)
    run = tmp_path / "run"
    reports_of_run(config, store, run, stop=1)
    shutil.rmtree(tmp_path / "face")
    # As after a death before the best weights were written.
    (run / BEST).unlink()
    assert len(reports_of_run(config, store, run)) == 2
    best = read_best(run / BEST)
    write_package(tmp_path / "best", best)
    x_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = load_model(best)(x_BCHW)
        assert torch.allclose(load_package(tmp_path / "best").model.model(x_BCHW), wanted, atol=1e-6)
    write_package(tmp_path / "soup", Soup([best, best], store, [], CPU).best([0, 1]))


def test_a_description_in_a_checkpoint_is_not_trusted():
    config = ModelConfig(backbone=HUB_NAME)
    described = {"architecture": "test_vit", "model_args": {"checkpoint_path": "evil.pth"}, "pretrained_cfg": {}}
    with pytest.raises(UserError, match="its checkpoint does not describe a model of timm"):
        find_origin(config, weights=False, description=described)


def test_the_cost_of_a_repository_of_the_hub_is_measured_without_a_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    saved(tmp_path / "weights" / short_name(HUB_NAME))
    fixed = {"model.backbone": HUB_NAME, "model.weights_dir": str(tmp_path / "weights")}
    (tmp_path / "a.yaml").write_text("optim.lr: {log_uniform: [1e-3, 1e-2]}\n")
    space = load_space(tmp_path / "a.yaml", overrides=fixed)
    (cost,) = costs(space, (48,), torch.device("cpu"), 1)
    assert cost.backbone == HUB_NAME
