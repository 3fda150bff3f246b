"""Write and read the files of a run's folder: its newest state, its best weights and its reports, without pickles.

last.safetensors    weights, buffers, the averages of both, if any, and the optimizer's state; in the header, as JSON,
                    the settings and all reports
best.safetensors    the weights of the report with the lowest val_js, under timm's names; in the header, as JSON, that
                    report and the settings that rebuild the model; if timm does not have the backbone, also
                    its description to build it from
history.jsonl       one report per line
predictions.safetensors
                    the predictions of the best weights for the validation split; in the header, the number
                    of their report, which detects outdated predictions of a killed run

Each tensor file is written atomically. `last` is written first and is authoritative: after a crash, the other files are
repaired from it. Missing predictions are computed again where they are needed. The headers contain checksums, so that
readers detect bits that a disk has changed.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import first_line
from raytune_emotion.learn.report import Report
from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST, PREDICTIONS
from raytune_emotion.storage.atomic import atomic_write, write_text
from raytune_emotion.storage.json_text import load_json

#: Keys of the checksums in a header: of its other texts, and of the tensors.
_OF_TEXTS, _OF_TENSORS = "crc32", "tensors_crc32"

#: Errors of reading a file that is incomplete or not a checkpoint.
_DAMAGE = (SafetensorError, ValueError)


class DamagedCheckpointError(UserError):
    """Report a checkpoint that is damaged, or does not belong to its run."""


@dataclass(frozen=True)
class Progress:
    """The state of a run apart from its tensors."""

    settings: dict[str, Any]  # by dotted path: RunConfig.to_flat
    fingerprint: str  # of the store
    history: tuple[Report, ...]  # at least one report
    scaler: dict[str, Any]  # state of the gradient scaler; empty except for fp16
    origin: dict[str, Any] | None = None  # origin of the backbone: `Origin.description`


@dataclass(frozen=True)
class Best:
    """The best weights of a run, with their settings, data and report."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    fingerprint: str  # of the store
    report: Report
    origin: dict[str, Any] | None = None  # origin of the backbone: `Origin.description`


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    average: nn.Module | None = None,
    prob_NK: Tensor | None = None,
) -> None:
    """Write the state at the newest report, the weights (or their average) if they are the best, and the report.

    Args:
        folder: folder of the run.
        model: model in training.
        optimizer: optimizer of the model.
        progress: state that includes the newest report.
        average: average of the model's weights, if there is one.
        prob_NK: predictions of the weights, or of their average, for the validation split.
    """
    tensors = _all_tensors(model, optimizer, average)
    header = {
        "settings": progress.settings,
        "fingerprint": progress.fingerprint,
        "history": progress.history,
        "scaler": progress.scaler,
        **_named_origin(progress),
    }
    _write(folder / LAST, tensors, header)
    report = progress.history[-1]
    if report["best_report"] == report["report"]:
        if prob_NK is not None:
            _write(folder / PREDICTIONS, {"prob_NK": _cpu_copy(prob_NK.float())}, {"report": report["report"]})
        _write_best(folder, _best_weights(tensors), progress)
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(_line(report))
        file.flush()
        # A trial ends for good by its last report, so a power failure must not take this line back.
        os.fsync(file.fileno())


def read_progress(folder: Path) -> Progress | None:
    """Read the state of the run in a folder, without its tensors; return None before the first report.

    Raises:
        UserError: the checkpoint is damaged.
        OSError: it cannot be read now.
    """
    if not (folder / LAST).exists():
        return None
    try:
        with safe_open(folder / LAST, "pt") as file:
            settings, fingerprint, history, scaler = _header(file, "settings", "fingerprint", "history", "scaler")
            return Progress(settings, fingerprint, tuple(history), scaler, _read_origin(file))
    except _DAMAGE as error:
        raise _damage_error(folder / LAST, error) from error


def save_with_header(file: Path, model: nn.Module, optimizer: Optimizer, header: Mapping[str, Any]) -> None:
    """Write a model and its optimizer, with any header of JSON values, for a training loop other than `fit`."""
    _write(file, _all_tensors(model, optimizer), header)


def read_header(file: Path, *keys: str) -> list[Any]:
    """Return the values of keys in the header of a file of `save_with_header`.

    Raises:
        UserError: there is no such file, or it is not one of these.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; name one that a training has written")
    try:
        with safe_open(file, "pt") as tensors:
            return _header(tensors, *keys)
    except _DAMAGE as error:
        raise UserError(
            f"{file}: not a checkpoint in safetensors ({first_line(error)}); name one that a training has written"
        ) from error


def weights_to_save(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers of a model, on the CPU, in the form that safetensors accepts.

    A parameter that several layers share has a name in each of them. The file gets a copy for each name.
    """
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        copied = _cpu_copy(tensor)
        memory = copied.untyped_storage().data_ptr()
        weights[name] = copied.clone() if memory in seen else copied
        seen.add(memory)
    return weights


def _all_tensors(model: nn.Module, optimizer: Optimizer, average: nn.Module | None = None) -> dict[str, Tensor]:
    tensors = _state("model", model) | (_state("average", average) if average is not None else {})
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": _cpu_copy(torch.as_tensor(value))
            for name, value in state.items()
            if value is not None
        }
    return tensors


def load_state(file: Path, model: nn.Module, optimizer: Optimizer | None, average: nn.Module | None = None) -> None:
    """Load the state in a file into a model and, as far as there are any, its optimizer and the average of its weights.

    Raises:
        UserError: the file is damaged, or belongs to another model.
        OSError: it cannot be read now.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    parameters = [parameter for group in groups for parameter in group["params"]]
    modules = {"model.": model} | ({"average.": average} if average is not None else {})
    moments: list[tuple[int, str, Tensor]] = []
    # First check everything. Afterwards, only a lack of device memory can fail.
    try:
        with safe_open(file, "pt") as opened:
            tensors = _tensors(opened)
    except _DAMAGE as error:
        raise _damage_error(file, error) from error
    for prefix, module in modules.items():
        _check_fits(file, _strip_prefix(prefix, tensors), module)
    try:
        for key, value in _strip_prefix("optimizer.", tensors).items() if optimizer is not None else ():
            index, name = key.split(".")
            if not 0 <= int(index) < len(parameters):
                raise ValueError(f"its optimizer has a parameter {index}, the model has {len(parameters)}")
            moments.append((int(index), name, value))
    except _DAMAGE as error:
        raise _damage_error(file, error) from error
    for prefix, module in modules.items():
        module.load_state_dict(_strip_prefix(prefix, tensors))
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for place, name, value in moments:
        parameter = parameters[place]
        # A fused step needs the state in the memory layout of the parameter, which the file does not contain.
        like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        state.setdefault(place, {})[name] = like.detach().copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def repair_from_last(folder: Path, progress: Progress | None) -> None:
    """Repair the files of a folder from `last` before the run continues; empty the history if there is no `last`.

    Raises:
        UserError: `last` is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LAST, BEST, HISTORY, PREDICTIONS):
        for abandoned in folder.glob(f".{name}.*.tmp"):
            abandoned.unlink()
    history = progress.history if progress is not None else ()
    lines = "".join(map(_line, history))
    found = (folder / HISTORY).read_bytes() if (folder / HISTORY).exists() else b""
    if found != lines.encode():
        write_text(folder / HISTORY, lines)
    if progress is not None and history[-1]["best_report"] == history[-1]["report"] and not _has_best(folder, progress):
        try:
            with safe_open(folder / LAST, "pt") as file:
                _write_best(folder, _best_weights(_tensors(file)), progress)
        except _DAMAGE as error:
            raise _damage_error(folder / LAST, error) from error


def read_best(file: Path) -> Best:
    """Read the best weights of a run, from its `best.safetensors`.

    Raises:
        UserError: there is no such file, or it is damaged.
        OSError: it cannot be read now.
    """
    if not file.exists():
        raise UserError(f"{file}: no such checkpoint; a run writes it with its first report")
    try:
        with safe_open(file, "pt") as tensors:
            # Copy the tensors: those of the file are memory-mapped and become invalid with it.
            weights = {name: tensor.clone() for name, tensor in _tensors(tensors).items()}
            settings, fingerprint, report = _header(tensors, "settings", "fingerprint", "report")
            return Best(weights, settings, fingerprint, report, _read_origin(tensors))
    except _DAMAGE as error:
        raise _damage_error(file, error) from error


def read_predictions(folder: Path, best: Best) -> Tensor | None:
    """Read the predictions of a run's best weights for the validation split, [N, K]; None if they are not kept."""
    number, prob_NK = read_kept_predictions(folder) or (None, None)
    return prob_NK if number == best.report["report"] else None


def read_kept_predictions(folder: Path) -> tuple[int, Tensor] | None:
    """Read the kept predictions for the validation split, [N, K], with the number of their report, if they exist."""
    if not (folder / PREDICTIONS).exists():
        return None
    try:
        with safe_open(folder / PREDICTIONS, "pt") as file:
            (number,) = _header(file, "report")
            return number, _tensors(file)["prob_NK"].double()
    except _DAMAGE:
        return None


def _has_best(folder: Path, progress: Progress) -> bool:
    try:
        return read_best(folder / BEST).report == progress.history[-1]
    except UserError:
        return False


def _write_best(folder: Path, weights: Mapping[str, Tensor], progress: Progress) -> None:
    header = {"settings": progress.settings, "fingerprint": progress.fingerprint, "report": progress.history[-1]}
    _write(folder / BEST, weights, header | _named_origin(progress))


def _named_origin(progress: Progress) -> dict[str, Any]:
    """Return the part of a header about the origin of the backbone: nothing if its name is enough."""
    return {} if progress.origin is None else {"origin": progress.origin}


def _read_origin(file: Any) -> dict[str, Any] | None:
    return _header(file, "origin")[0] if "origin" in file.metadata() else None


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    texts = {"format": "pt", _OF_TENSORS: _tensors_checksum(tensors)}
    texts |= {key: json.dumps(value) for key, value in header.items()}
    with atomic_write(path) as temporary:
        save_file(dict(tensors), temporary, {_OF_TEXTS: _texts_checksum(texts), **texts})


def _header(file: Any, *keys: str) -> list[Any]:
    texts = file.metadata() or {}
    if not texts.keys() >= {*keys, _OF_TEXTS}:
        raise ValueError("it does not have the header of a run")
    if texts.pop(_OF_TEXTS) != _texts_checksum(texts):
        raise ValueError("its header has changed since it was written")
    return [load_json(texts[key]) for key in keys]


def _tensors(file: Any) -> dict[str, Tensor]:
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (file.metadata() or {}).get(_OF_TENSORS) != _tensors_checksum(tensors):
        raise ValueError("its tensors have changed since they were written")
    return tensors


def _texts_checksum(texts: Mapping[str, str]) -> str:
    return f"{zlib.crc32(repr(sorted(texts.items())).encode()):08x}"


def _tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def _check_fits(file: Path, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in module.state_dict().items()}:
        raise UserError(
            f"{file}: its tensors do not match the model; make the model with which it was trained, with the same "
            f"classes and the same version of timm"
        )


def _state(name: str, model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in weights_to_save(model).items()}


def _best_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _strip_prefix("average.", tensors) or _strip_prefix("model.", tensors)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _line(report: Report) -> str:
    return json.dumps(report) + "\n"


def _damage_error(file: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{file}: a damaged checkpoint ({first_line(error)}); delete {LAST} and {BEST} there, and the run starts again "
        f"from the beginning when it is resumed"
    )
