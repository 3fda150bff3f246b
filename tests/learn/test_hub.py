"""The hub of pretrained weights where it does not answer: one sentence at once, and what is in its cache is used."""

import logging

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from raytune_emotion.config import DataConfig, ModelConfig, RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn import hub
from raytune_emotion.learn.hub import hub_client
from raytune_emotion.learn.model import build_model

PRETRAINED = RunConfig(model=ModelConfig(backbone="test_resnet", pretrained=True), data=DataConfig(image_size=32))


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_that_does_not_answer_is_asked_once_and_said_in_a_sentence(silent_hub, monkeypatch, capsys):
    create, asked = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **o: asked.append(o.get("pretrained")) or create(*args, **o)
    )
    with pytest.raises(UserError, match=r"of test_resnet could not be fetched .*127.0.0.1:1 does not answer: ") as told:
        build_model(PRETRAINED)
    assert len(told.value.faults) == 1
    assert True not in asked, "timm would have its client try again for a minute"
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def cached(silent_hub, monkeypatch):
    """The cache of what the hub has of the model; it is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = silent_hub / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef")
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    return snapshot


def test_what_is_in_the_cache_needs_no_answer(cached):
    torch.manual_seed(5)
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, cached / "model.safetensors")
    assert torch.equal(build_model(PRETRAINED).state_dict()["conv1.0.weight"], weights["conv1.0.weight"])


def test_nothing_is_unpickled(cached):
    """As timm does where there is no other file."""
    torch.save(timm.create_model("test_resnet").state_dict(), cached / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights of test_resnet could not be fetched"):
        build_model(PRETRAINED)


def test_the_log_of_the_client_is_kept_from_the_user_within_the_block(monkeypatch):
    monkeypatch.setattr(hub, "_why_silent", lambda: "")
    log = logging.getLogger("huggingface_hub.utils._http")  # which writes a line for each try
    assert log.isEnabledFor(logging.WARNING)
    with hub_client("timm/anything"):
        assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.WARNING)
