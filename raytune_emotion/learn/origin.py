"""Find the origin of a backbone: timm's architecture, arguments of its shape, and the file of its weights.

A folder or a repository of the hub holds timm's `config.json` and weights. Neither is trusted: from the configuration
only known, plain values are used, and weights must be safetensors, which run no code when loaded.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_deprecated_models

from raytune_emotion.config import ModelConfig
from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import in_one_line
from raytune_emotion.learn.backbones import FOLDER, HUB, short_name, split_source
from raytune_emotion.learn.timm_patches import architectures
from raytune_emotion.storage.json_text import load_json

#: Arguments of a model's shape that a `config.json` may contain. Other arguments could make timm load a file.
_SHAPE = {
    "img_size", "patch_size", "class_token", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    "qk_norm", "init_values", "pos_embed", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm",
    "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "depths", "dims", "kernel_sizes", "ls_init_value",
    "stem_type", "stem_width", "head_norm_first", "head_hidden_size", "conv_mlp", "conv_bias", "use_grn", "norm_eps",
    "norm_layer", "act_layer", "cardinality", "base_width", "avg_down", "output_stride", "window_size",
}  # fmt: skip
#: Arguments of the original training, or that the configuration here determines. They are ignored.
_IGNORED = {
    "num_classes", "in_chans", "drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "weight_init", "fix_init", "head_init_scale", "zero_init_last",
}  # fmt: skip
#: Licence of weights whose own card names none, by a part of their name.
_LICENCES = {
    "ms1mv3": "their card names none; InsightFace, which published their training data MS1MV3, allows models trained "
    "with its data only for non-commercial research"
}
#: Used keys of timm's description of weights: the preprocessing of images, and the names of the first and last layer.
_KNOWN = ("input_size", "fixed_input_size", "mean", "std", "pool_size", "first_conv", "classifier", "license")

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"

Colour = tuple[float, float, float]


class AbsentWeightsError(UserError):
    """Report pretrained weights that are missing on this machine; another machine may have them."""


class WeightsUnavailableError(AbsentWeightsError):
    """Report pretrained weights that could not be fetched from the hub or read from its cache."""


@dataclass(frozen=True)
class Origin:
    """The parts from which a backbone is built."""

    architecture: str  # name in timm's registry; with the tag of its weights, if any
    arguments: Mapping[str, Any]  # arguments of its shape
    known: Mapping[str, Any] | None  # timm's description of the weights; None: the one in timm's registry
    weights: Path | None  # file of the weights; None: timm fetches them, or none are wanted

    @property
    def fixed_input_size(self) -> bool:
        """Return whether the parameters depend on the image size."""
        return bool((self.known or describe_weights(self.architecture)).get("fixed_input_size"))

    @property
    def description(self) -> dict[str, Any] | None:
        """Return the content of a `config.json` for it; None if the name of a timm model is enough."""
        if self.known is None:
            return None
        return {"architecture": self.architecture, "model_args": self.arguments, "pretrained_cfg": self.known}


def find_origin(config: ModelConfig, *, weights: bool, description: Mapping[str, Any] | None = None) -> Origin:
    """Find the origin of a backbone. Files of the hub are fetched once, and then read from its cache.

    Args:
        config: names the backbone, and a folder of weights if there is one.
        weights: whether its pretrained weights are also wanted.
        description: the `Origin.description` of a checkpoint. Without weights, nothing else is then read.

    Raises:
        UserError: there is no such folder or repository, its configuration is damaged, or it has no safetensors.
    """
    source, name = split_source(config.backbone)
    if not source:
        from_folder = weights and config.weights_dir is not None
        return Origin(successor(name), {}, None, weights_file(config) if from_folder else None)
    if description is not None and not weights:
        return Origin(*_read_config(config.backbone, "its checkpoint", lambda: description), None)
    folder = weights_folder(config)
    if folder is None:
        file, found = _fetch(name, _CONFIG), _fetch(name, _WEIGHTS) if weights else None
    else:
        file, found = folder / _CONFIG, weights_file(config) if weights else None
    return Origin(*_read_config(config.backbone, file, lambda: load_json(file.read_bytes())), found)


def successor(name: str) -> str:
    """Return the present name of a model that timm has renamed; return other names unchanged."""
    return str(get_deprecated_models().get(name) or name)


def licence(config: ModelConfig, known: Mapping[str, Any]) -> str:
    """Return the licence of pretrained weights, as far as it is known.

    Args:
        config: names the backbone.
        known: timm's description of the weights.
    """
    noted = next((text for part, text in _LICENCES.items() if part in config.backbone), None)
    return noted or known.get("license") or "not known here; ask the publisher of the weights"


def weights_folder(config: ModelConfig) -> Path | None:
    """Return the local folder with a backbone's configuration and weights; None if there is none."""
    source, name = split_source(config.backbone)
    if source == FOLDER:
        return Path(name)
    if source == HUB and config.weights_dir is not None:
        return Path(config.weights_dir).expanduser() / short_name(config.backbone)
    return None


def weights_file(config: ModelConfig) -> Path:
    """Return the local file with a backbone's weights.

    Raises:
        AbsentWeightsError: there is none.
        UserError: there are only files that would be unpickled.
    """
    folder = weights_folder(config)
    if folder is None:
        assert config.weights_dir is not None
        file = Path(config.weights_dir).expanduser() / f"{config.backbone}.safetensors"
        if not file.is_file():
            raise AbsentWeightsError(
                f"model.weights_dir: no file {file}; on a machine with a network, save "
                f"timm.create_model('{config.backbone}', pretrained=True).state_dict() there with safetensors, or "
                f"leave model.weights_dir out"
            )
        return file
    if (folder / _WEIGHTS).is_file():
        return folder / _WEIGHTS
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"model.backbone: {folder / pickles[0]} would be unpickled, which can run any code; save the weights as "
            f"{_WEIGHTS} there, with safetensors"
        )
    raise AbsentWeightsError(
        f"model.backbone: no file {folder / _WEIGHTS}; a backbone consists of it and {_CONFIG}, as timm saves them"
    )


def safe_file(architecture: str) -> str | None:
    """Return the name of the safetensors file in timm's repository of the hub for a model; None for other sources.

    If this file is missing, timm itself would unpickle another one.
    """
    known = describe_weights(architecture)
    name = known.get("hf_hub_filename") or _WEIGHTS
    return name if known.get("hf_hub_id") and name.endswith(".safetensors") else None


def is_absent(error: Exception) -> bool:
    """Tell whether the hub has answered that a repository does not have the requested file."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def weights_setting(config: ModelConfig) -> str:
    """Return the name of the setting that names the folder of the weights."""
    return "model.backbone" if config.weights_dir is None else "model.weights_dir"


def describe_weights(architecture: str) -> dict[str, Any]:
    """Return timm's own description of an architecture's weights; an empty dict if it has none."""
    found = timm.get_pretrained_cfg(architecture)
    return vars(found) if found is not None else {}


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's shape among those of a `config.json`.

    Raises:
        ValueError: there are unknown arguments, or values that are not plain.
    """
    wrong = sorted(arguments.keys() - _SHAPE - _IGNORED)
    shape = {key: value for key, value in arguments.items() if key in _SHAPE}
    wrong += [key for key, value in shape.items() if not _is_plain(value)]
    if wrong or arguments.get("in_chans") not in (None, 3):
        raise ValueError(f"{', '.join(wrong) or 'in_chans'}: not supported as arguments of a model here")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}


def check_normalisation(known: Mapping[str, Any]) -> tuple[Colour, Colour]:
    """Return mean and standard deviation of the pixels from timm's description of weights.

    Raises:
        ValueError: they are not three finite numbers each, or a standard deviation is not positive.
    """
    mean, std = _three_numbers(known, "mean"), _three_numbers(known, "std")
    if min(std) <= 0:
        raise ValueError("std must be positive")
    return mean, std


def _three_numbers(known: Mapping[str, Any], name: str) -> Colour:
    red, green, blue = map(float, known[name])
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(f"{name} is not finite")
    return red, green, blue


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(each is None or isinstance(each, str | int | float) for each in values)


def _read_config(
    backbone: str, where: Path | str, read: Callable[[], Any]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read timm's `config.json`: the architecture, the arguments of its shape, and the description of its weights."""
    try:
        content = read()
        architecture, given = content["architecture"], content.get("pretrained_cfg", content)
        if architecture not in architectures():
            raise ValueError(f"timm has no architecture {architecture}")
        arguments = check_arguments(content.get("model_args", {}))
        own = describe_weights(architecture)
        layers = {key: own.get(key) for key in ("first_conv", "classifier", "fixed_input_size")}
        known = {key: value for key in _KNOWN if (value := given.get(key) or layers.get(key)) is not None}
        check_normalisation({"mean": (0, 0, 0), "std": (1, 1, 1), **known})
        return architecture, arguments, known
    except FileNotFoundError:
        raise AbsentWeightsError(
            f"model.backbone: {backbone}: no file {where}; timm saves it beside {_WEIGHTS}"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.backbone: {backbone}: {where} does not describe a model of timm ({in_one_line(error)}); save the "
            f"model again with timm, or choose another"
        ) from error


def _fetch(name: str, filename: str) -> Path:
    """Return a file of a repository: from the hub's cache or, if it is not there, from the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from raytune_emotion.learn.hub import hub_client

    repository, _, revision = name.partition("@")
    cached = try_to_load_from_cache(repository, filename, revision=revision or None)
    if isinstance(cached, str):
        return Path(cached)
    try:
        with hub_client(repository, revision or None):
            return Path(hf_hub_download(repository, filename, revision=revision or None))
    except Exception as error:
        if is_absent(error):
            raise UserError(
                f"model.backbone: {HUB}:{name} has no {filename}; other files would be unpickled, which can run any "
                f"code; choose another backbone"
            ) from error
        # The hub's client and its network library have different error classes.
        raise WeightsUnavailableError(
            f"model.backbone: {filename} of {HUB}:{name} could not be fetched ({in_one_line(error)}); connect this "
            f"machine to the Hugging Face hub (through a proxy: HTTPS_PROXY), or copy the repository's {_CONFIG} and "
            f"{_WEIGHTS} to a folder {short_name(repository)} elsewhere and name the folder around it with "
            f"--weights-dir"
        ) from error
