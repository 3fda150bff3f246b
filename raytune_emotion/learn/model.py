"""Build any timm backbone with a head of K classes, from scratch or from pretrained weights."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from raytune_emotion.config import ModelConfig, RunConfig
from raytune_emotion.errors import UserError, suggest
from raytune_emotion.known_errors import in_one_line
from raytune_emotion.learn.backbones import check_architecture, split_source
from raytune_emotion.learn.checkpoint import Best
from raytune_emotion.learn.hub import hub_client
from raytune_emotion.learn.origin import (
    Colour,
    Origin,
    WeightsUnavailableError,
    describe_weights,
    find_origin,
    is_absent,
    safe_file,
    successor,
    weights_file,
    weights_folder,
    weights_setting,
)
from raytune_emotion.learn.torch_patches import misfits_of

#: Layers with statistics of batches; those of timm are subclasses.
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

_UNBUILDABLE = (TypeError, ValueError, AssertionError, RuntimeError, IndexError, KeyError, ZeroDivisionError)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, in the format that trains fastest: on a CPU, channels-last is up to 1.7 times as fast.

    PyTorch has this format for four dimensions alone. A few backbones have weights of five, and keep their format.
    """
    if any(parameter.dim() > 4 for parameter in model.parameters()):
        return model.to(device)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def build_model(config: RunConfig, *, weights: bool = True, description: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the backbone with its head, on the CPU, in training mode. Its weights are a function of the configuration.

    If `model.pretrained` is true, it starts from pretrained weights: from `model.weights_dir` or the backbone's own
    folder, else from the hub or its cache. A classifier of another size is left out and initialised at random; all
    other weights must fit.

    Args:
        config: configuration of the run.
        weights: False leaves pretrained weights out, for a caller that loads a checkpoint into the model.
        description: of the backbone, which such a checkpoint has.

    Raises:
        UserError: the backbone is unknown or does not accept the image size, or its weights are missing or do not fit.
    """
    check_backbone(config.model.backbone)
    weights = weights and config.model.pretrained
    if weights:
        check_weights(config.model)
    origin = find_origin(config.model, weights=weights, description=description)
    options: dict[str, Any] = {**origin.arguments, "num_classes": len(config.data.classes)}
    options["drop_rate"] = config.model.dropout
    # Some of timm's models skip blocks by default.
    options["drop_path_rate"] = config.model.drop_path
    # timm marks models whose parameters depend on the image size. They accept img_size.
    if origin.fixed_input_size:
        options["img_size"] = config.data.image_size
    if origin.known is not None:
        options["pretrained_cfg"] = {**origin.known, "architecture": origin.architecture}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        if not weights:
            return _create(config, origin, options)
        if origin.weights is not None:
            return _create(config, origin, options | _from_file(config.model, origin))
        try:
            with hub_client(describe_weights(origin.architecture).get("hf_hub_id") or ""):
                overlay = {"hf_hub_filename": safe_file(origin.architecture)}
                return _create(config, origin, options | {"pretrained": True, "pretrained_cfg_overlay": overlay})
        except Exception as error:
            # The hub's client, its network library and the reader of a damaged file have different error classes. First
            # create the model without weights, to raise errors that are not about the weights.
            _create(config, origin, options)
            if is_absent(error):
                raise _would_be_unpickled(config.model) from error
            raise WeightsUnavailableError(
                f"model.pretrained: the weights of {origin.architecture} could not be fetched ({in_one_line(error)}); "
                f"connect this machine to the Hugging Face hub (through a proxy: HTTPS_PROXY), or save timm's weights "
                f"elsewhere as {config.model.backbone}.safetensors and set model.weights_dir to their folder"
            ) from error


def _create(config: RunConfig, origin: Origin, options: dict[str, Any]) -> nn.Module:
    """Create the model with timm, and test whether it accepts the image size."""
    name, size, n_classes = origin.architecture, config.data.image_size, len(config.data.classes)
    try:
        model: nn.Module = timm.create_model(name, **options)
        if options["num_classes"] != n_classes:
            model.reset_classifier(n_classes)  # type: ignore[operator]
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except _UNBUILDABLE as error:
        if "drop_path_rate" in str(error) and config.model.drop_path:
            raise UserError(
                f"model.drop_path: {name} has no blocks to skip; set it to 0, or choose another backbone"
            ) from error
        if "drop_path_rate" in str(error):
            return _create(config, origin, {key: value for key, value in options.items() if key != "drop_path_rate"})
        if (misfits := misfits_of(error)) and origin.weights is not None:
            raise UserError(
                f"{weights_setting(config.model)}: {origin.weights} does not fit {name}: {misfit}" for misfit in misfits
            ) from error
        raise UserError(
            f"model.backbone: {name} cannot take images of {size} px (data.image_size): {in_one_line(error)}"
        ) from error
    return model.train()


def check_backbone(name: str) -> None:
    """Check that timm knows a model, without building it.

    Raises:
        UserError: timm does not know it; the error suggests similar names.
    """
    check_architecture(name)
    if split_source(name)[0]:
        return
    architecture, _, tag = name.partition(".")
    if tag and name not in (known := timm.list_pretrained(f"{architecture}.*")):
        raise UserError(
            f"model.backbone: {name}: timm has no weights of that name for {architecture}{suggest(name, known, 3)}"
        )


def check_weights(config: ModelConfig) -> None:
    """Check that the configured pretrained weights exist, as far as this is possible without a network.

    Raises:
        UserError: there is no such file, or timm has no weights for the model.
    """
    if not config.pretrained:
        return
    if config.weights_dir is not None or weights_folder(config) is not None:
        weights_file(config)
    elif not split_source(config.backbone)[0]:
        name = successor(config.backbone)
        if not getattr(timm.get_pretrained_cfg(name), "has_weights", False):
            raise UserError(
                f"model.pretrained: timm has no pretrained weights for {config.backbone}; choose another backbone, or "
                f"set model.pretrained to false"
            )
        if safe_file(name) is None:
            raise _would_be_unpickled(config)


def _would_be_unpickled(config: ModelConfig) -> UserError:
    return UserError(
        f"model.pretrained: the hub has no safetensors of {config.backbone}; other files would be unpickled, which can "
        f"run any code; choose another backbone, or save its weights as {config.backbone}.safetensors and name their "
        f"folder as model.weights_dir"
    )


def load_model(best: Best) -> nn.Module:
    """Build the model of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        UserError: the weights do not fit the model of the settings.
    """
    config = RunConfig.from_flat(best.settings)
    model = build_model(config, weights=False, description=best.origin)
    try:
        model.load_state_dict(best.weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit {config.model.backbone} of the installed timm {timm.__version__}; install the "
            f"version with which they were trained"
        ) from error
    return model.eval()


def mean_std(model: nn.Module) -> tuple[Colour, Colour]:
    """Return the mean and the standard deviation of the colours in the backbone's pretraining, in [0, 1]."""
    known: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return tuple(known.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(known.get("std", IMAGENET_DEFAULT_STD))


def batchnorm_layers(model: nn.Module) -> list[BatchNorm]:
    """Return the BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def _from_file(config: ModelConfig, origin: Origin) -> dict[str, Any]:
    """Return the options with which timm loads a file strictly: with the file's number of classes, 0 for none."""
    classifier = (origin.known or describe_weights(origin.architecture)).get("classifier") or ""
    head = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    file = origin.weights
    assert file is not None
    try:
        with safe_open(file, "pt") as tensors:
            n_classes = tensors.get_slice(head).get_shape()[0] if head in tensors.keys() else 0  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{weights_setting(config)}: {file} cannot be read as safetensors ({error}); save the weights again"
        ) from error
    # The label offset and the loader of the original release do not apply to weights under timm's names.
    overlay = {"file": str(file), "num_classes": n_classes, "label_offset": 0, "custom_load": False}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": n_classes}
