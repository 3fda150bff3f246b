import huggingface_hub.constants
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn

from raytune_emotion.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn import hub
from raytune_emotion.learn.backbones import split_source
from raytune_emotion.learn.model import build_model, check_backbone, check_weights, mean_std, to_device
from raytune_emotion.learn.origin import WeightsUnavailableError, successor
from raytune_emotion.tuning.space.library import packaged_spaces
from raytune_emotion.tuning.space.parser import load_space

CLASSIFIER = {"test_resnet": "fc", "test_efficientnet": "classifier", "test_vit": "head"}


def configured(backbone="test_resnet", image_size=32, seed=0, **model):
    return RunConfig(
        model=ModelConfig(backbone=backbone, **model),
        data=DataConfig(image_size=image_size),
        train=TrainConfig(seed=seed),
    )


def weights_in(folder, backbone, **options):
    """A folder with weights of another task, and these weights."""
    torch.manual_seed(5)
    weights = timm.create_model(backbone, **options).state_dict()
    save_file(weights, folder / f"{backbone}.safetensors")
    return str(folder), weights


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "resnet50", "efficientnet_b0", "vit_base_patch16_224", "test_resnet", "test_vit", "test_efficientnet"],
)
def test_a_backbone_has_a_head_of_thirteen(backbone):
    model = build_model(configured(backbone, dropout=0.4))
    assert model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 13)
    assert model.drop_rate == 0.4 if hasattr(model, "drop_rate") else model.head_drop.p == 0.4


def test_weights_are_a_function_of_the_seed_and_leave_no_trace():
    before = torch.get_rng_state()
    first, same, other = (build_model(configured(seed=seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_colours_are_those_of_the_pretraining():
    assert mean_std(build_model(configured("test_vit"))) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert mean_std(build_model(configured("resnet18")))[0] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet81", "resnet18"), ("resnet18.a1_in2k", "resnet18.a1_in1k"), ("vit_base_patch16", "vit_")]
)
def test_an_unknown_backbone_is_refused_with_its_neighbours(name, near):
    with pytest.raises(UserError, match=near) as caught:
        check_backbone(name)
    assert len(caught.value.faults) == 1
    with pytest.raises(UserError, match=near):
        build_model(configured(name))


def test_a_known_backbone_is_let_pass():
    check_backbone("resnet18")
    check_backbone("resnet18.a1_in1k")


def test_a_backbone_that_cannot_take_the_image_size_is_refused():
    with pytest.raises(UserError, match=r"efficientformer_l1 cannot take images of 96 px \(data.image_size\)"):
        build_model(configured("efficientformer_l1", image_size=96))


class TestWeightsFromAFile:
    @pytest.mark.parametrize("backbone", CLASSIFIER)
    def test_all_but_a_classifier_of_another_size_is_taken(self, tmp_path, backbone):
        folder, weights = weights_in(tmp_path, backbone, **({"img_size": 32} if backbone == "test_vit" else {}))
        built = build_model(configured(backbone, weights_dir=folder)).state_dict()
        assert built.keys() == weights.keys()
        head = CLASSIFIER[backbone]
        for name, value in built.items():
            if name.startswith(f"{head}."):
                assert len(value) == 13
            else:
                assert torch.equal(value, weights[name]), name

    def test_a_classifier_of_the_same_size_is_taken_too(self, tmp_path):
        folder, weights = weights_in(tmp_path, "test_resnet", num_classes=13)
        built = build_model(configured(weights_dir=folder)).state_dict()
        assert torch.equal(built["fc.weight"], weights["fc.weight"])

    def test_weights_without_a_classifier_are_taken(self, tmp_path):
        folder, weights = weights_in(tmp_path, "test_resnet", num_classes=0)
        built = build_model(configured(weights_dir=folder)).state_dict()
        assert torch.equal(built["conv1.0.weight"], weights["conv1.0.weight"])
        assert built["fc.weight"].shape[0] == 13

    def test_position_embeddings_of_another_image_size_are_fitted(self, tmp_path):
        folder, weights = weights_in(tmp_path, "test_vit")
        built = build_model(configured("test_vit", weights_dir=folder)).state_dict()
        assert built["pos_embed"].shape[1] < weights["pos_embed"].shape[1]
        assert torch.equal(built["norm.weight"], weights["norm.weight"])

    def test_every_mismatch_is_named_at_once(self, tmp_path):
        _, weights = weights_in(tmp_path, "test_resnet")
        weights["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
        weights["nowhere.weight"] = weights.pop("layer2.0.conv1.weight")
        save_file(weights, tmp_path / "test_resnet.safetensors")
        with pytest.raises(UserError) as caught:
            build_model(configured(weights_dir=str(tmp_path)))
        for name in ("layer1.0.conv1.weight", "layer2.0.conv1.weight", "nowhere.weight"):
            assert any(name in fault for fault in caught.value.faults), name

    @pytest.mark.parametrize("damage", [b"", b"not weights", None])
    def test_a_damaged_or_missing_file_is_named(self, tmp_path, damage):
        file = tmp_path / "test_resnet.safetensors"
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(UserError, match=str(file)):
            build_model(configured(weights_dir=str(tmp_path)))

    def test_they_are_taken_unless_the_model_is_to_start_from_scratch(self, tmp_path):
        folder, weights = weights_in(tmp_path, "test_resnet")
        flat = {"model.backbone": "test_resnet", "data.image_size": 32, "model.weights_dir": folder}
        for more, taken in (({}, True), ({"model.pretrained": True}, True), ({"model.pretrained": False}, False)):
            built = build_model(RunConfig.from_flat(flat | more)).state_dict()
            assert torch.equal(built["conv1.0.weight"], weights["conv1.0.weight"]) == taken

    def test_they_can_be_left_out(self, tmp_path):
        build_model(configured(weights_dir=str(tmp_path / "moved")), weights=False)


def test_without_a_hub_there_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of test_resnet could not be fetched .* model.weights_dir") as caught:
        build_model(configured(pretrained=True))
    assert len(caught.value.faults) == 1


class Unreachable(Exception):
    """As a network library of the hub's client raises it: no OSError."""


@pytest.mark.parametrize(
    "error", [Unreachable("407 Proxy Authentication Required"), SafetensorError("header too large")]
)
def test_whatever_keeps_the_weights_away_is_one_clear_sentence(monkeypatch, error):
    create = timm.create_model

    def away(name, *, pretrained=False, **options):
        if pretrained:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", away)
    monkeypatch.setattr(hub, "_why_silent", lambda: "")
    with pytest.raises(
        UserError, match=rf"weights of test_resnet could not be fetched .*{error}.*HTTPS_PROXY"
    ) as caught:
        build_model(configured(pretrained=True))
    assert len(caught.value.faults) == 1


def test_a_repository_without_safetensors_is_not_asked_again(monkeypatch):
    create = timm.create_model

    def lacking(name, *, pretrained=False, **options):
        if pretrained:
            raise EntryNotFoundError("404 Client Error")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", lacking)
    monkeypatch.setattr(hub, "_why_silent", lambda: "")
    with pytest.raises(UserError, match="no safetensors of test_resnet; other files would be unpickled") as caught:
        build_model(configured(pretrained=True))
    assert not isinstance(caught.value, WeightsUnavailableError)


def test_only_weights_in_safetensors_are_taken_from_the_hub():
    """Those of every space of the package are."""
    spaces = map(load_space, packaged_spaces().values())
    named = {name for space in spaces for name in space.values_of("model.backbone") if not split_source(name)[0]}
    backbones = {name for name in named if timm.get_pretrained_cfg(name).has_weights}
    assert {"resnet18", "vit_base_patch16_224", "swin_base_patch4_window7_224"} < backbones
    for backbone in backbones:
        check_weights(ModelConfig(backbone=backbone, pretrained=True))
    # The source of these is a file at GitHub, which would be unpickled.
    with pytest.raises(UserError, match=r"no safetensors of gcvit_tiny; .* gcvit_tiny.safetensors"):
        check_weights(ModelConfig(backbone="gcvit_tiny", pretrained=True))


def test_an_image_size_that_a_backbone_cannot_take_is_no_fault_of_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot take images of 96 px"):
        build_model(configured("efficientformer_l1", image_size=96, pretrained=True))


def test_an_old_name_is_taken_for_its_successor():
    assert successor("tv_resnet34") == "resnet34.tv_in1k"
    assert successor("resnet34") == "resnet34"
    check_weights(ModelConfig(backbone="tv_resnet34", pretrained=True))
    old, new = (build_model(configured(name)).state_dict() for name in ("tv_resnet34", "resnet34.tv_in1k"))
    assert all(torch.equal(old[name], new[name]) for name in new)


def test_what_timm_has_no_weights_for_is_said_before_anything_is_built():
    without = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(UserError, match="no pretrained weights"):
        check_weights(ModelConfig(backbone=without, pretrained=True))


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_blocks_are_skipped_as_configured_also_where_timm_has_another_default(drop_path):
    model = build_model(configured("swin_tiny_patch4_window7_224", 224, drop_path=drop_path))
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == pytest.approx(drop_path)


def test_a_model_without_blocks_to_skip_is_built():
    assert not any(isinstance(module, DropPath) for module in build_model(configured("vgg11", 64)).modules())


def test_a_backbone_with_weights_of_five_dimensions_is_moved_in_its_own_format():
    deep = to_device(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv2d(3, 4, 3)), torch.device("cpu"))
    flat = to_device(nn.Conv2d(3, 4, 3), torch.device("cpu"))
    assert [p.is_contiguous() for p in deep.parameters()] == [True] * 4
    assert flat.weight.is_contiguous(memory_format=torch.channels_last)
