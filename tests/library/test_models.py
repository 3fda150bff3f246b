import pytest
import torch
from safetensors.torch import save_file

from raytune_emotion import create_model
from raytune_emotion.config import RunConfig
from raytune_emotion.data.augment import normalise
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.learn.model import build_model, mean_std


def test_its_output_is_a_distribution_over_the_13_emotions():
    model = create_model("test_resnet", pretrained=False).eval()
    prob_BK = model(torch.rand(2, 3, 64, 64))
    assert prob_BK.shape == (2, 13)
    assert (prob_BK >= 0).all()
    torch.testing.assert_close(prob_BK.sum(-1), torch.ones(2))
    assert model.classes == EMOTIONS


def test_it_is_the_model_of_the_commands():
    config = RunConfig.from_flat({"model.backbone": "test_resnet", "data.image_size": 32, "train.seed": 4})
    expected = build_model(config).eval()
    model = create_model("test_resnet", pretrained=False, image_size=32, seed=4).eval()
    pixels_BHWC = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    logits_BK = expected(normalise(pixels_BHWC, *mean_std(expected)))
    images = pixels_BHWC.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(model.logits(images), logits_BK, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images), logits_BK.softmax(-1), rtol=0, atol=1e-6)


def test_dropout_is_0_3():
    assert create_model("test_resnet", pretrained=False, image_size=32).backbone.drop_rate == 0.3


def test_pretrained_weights_come_from_a_folder(tmp_path):
    other = create_model("test_resnet", pretrained=False, image_size=32, seed=1)
    save_file(other.backbone.state_dict(), tmp_path / "test_resnet.safetensors")
    model = create_model("test_resnet", weights_dir=tmp_path, image_size=32)
    own, given = model.backbone.state_dict(), other.backbone.state_dict()
    assert torch.equal(
        own["conv1.weight" if "conv1.weight" in own else next(iter(own))],
        given["conv1.weight" if "conv1.weight" in given else next(iter(given))],
    )


def test_an_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"resnet8.*did you mean"):
        create_model("resnet8", pretrained=False)
