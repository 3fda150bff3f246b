"""Write and load an export folder: a trained model or an ensemble, with its description, metrics and model card.

model.safetensors    the weights; for an ensemble, those of all members
config.json          timm's own format, so that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the model
                     (for an ensemble: a list of such descriptions, `members`)
metrics.json         metrics on the validation set
README.md            the model card
model.onnx, model.pt2    optional: the model as one graph, see `learn/graphs.py`
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raytune_emotion import __version__
from raytune_emotion.config import RunConfig
from raytune_emotion.data.augment import normalise
from raytune_emotion.data.decode import UndecodableImage
from raytune_emotion.data.pictures import Picture, PredictedBatch
from raytune_emotion.data.store import Store
from raytune_emotion.data.synthetic import draw_face, draw_point, is_of_sample
from raytune_emotion.emotions import check_class_names
from raytune_emotion.errors import UserError
from raytune_emotion.known_errors import in_one_line, is_disk_full
from raytune_emotion.learn.calibration import at_temperature, calibrate, divide_logits
from raytune_emotion.learn.checkpoint import Best, weights_to_save
from raytune_emotion.learn.combine import images_per_second
from raytune_emotion.learn.device import exact_fp32, halve_until_it_fits
from raytune_emotion.learn.evaluation import rows_of_side
from raytune_emotion.learn.export_files import CARD, CONFIG, FORMATS, METRICS, WEIGHTS, check_export
from raytune_emotion.learn.graphs import Ensemble, PixelsToProbabilities, Predictor, predict_graph, write_graph
from raytune_emotion.learn.model import load_model, mean_std
from raytune_emotion.learn.model_card import Evidence, render_card, render_ensemble_card
from raytune_emotion.learn.origin import check_arguments, check_normalisation, find_origin, licence
from raytune_emotion.learn.predictions import is_cut_short, predict_split
from raytune_emotion.storage.atomic import atomic_write, destination_error, replace_folder, write_text
from raytune_emotion.storage.json_text import load_json
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.terminal import count

TIMM = "timm"
#: Largest difference between a probability of a format and that of the model in memory.
TOLERANCE = 1e-4
#: Number of validation images on which formats are compared.
_COMPARED = 64
#: Number of drawn faces that replace them.
_DRAWN = 8

#: Files that macOS and Windows leave in a folder that was viewed.
_OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini"}

#: timm's argument for the image size, for models whose parameters depend on it.
_IMAGE_SIZE = "img_size"


@dataclass(frozen=True)
class Package:
    """An export, ready to predict: the model is on the CPU, in evaluation mode."""

    model: Predictor
    classes: tuple[str, ...]
    image_size: int  # px

    def predict(self, images_NHWC: npt.NDArray[np.uint8], *, mirror: bool = False) -> npt.NDArray[np.float64]:
        """Predict the distribution over the classes of each image, [N, K], on the model's device.

        They are predicted in parts, which are smaller if the device has too little memory.

        Args:
            images_NHWC: RGB, 0 to 255, of the model's size; N may be 0.
            mirror: whether to predict the mean of each image and its mirror image.

        Raises:
            UserError: the images have another type or another shape.
        """
        if not len(images_NHWC):
            return np.empty((0, len(self.classes)))
        side = self.image_size
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[1:] != (side, side, 3):
            raise UserError(
                f"images: expected uint8 [N, {side}, {side}, 3], got {images_NHWC.dtype} {[*images_NHWC.shape]}"
            )

        def predict(rows: int) -> npt.NDArray[np.float64]:
            starts = range(0, len(images_NHWC), rows)
            return np.concatenate([self._predict(images_NHWC[at : at + rows], mirror=mirror) for at in starts])

        return halve_until_it_fits(predict, min(len(images_NHWC), rows_of_side(self.image_size)))

    def _predict(self, images_BHWC: npt.NDArray[np.uint8], *, mirror: bool) -> npt.NDArray[np.float64]:
        device = next(self.model.parameters()).device
        with torch.inference_mode(), exact_fp32():
            x_BHWC = torch.from_numpy(images_BHWC).to(device)
            views = [x_BHWC, x_BHWC.flip(2)] if mirror else [x_BHWC]
            prob_BK: npt.NDArray[np.float64] = (
                # Convert on the CPU, because MPS has no float64.
                torch.stack([self.model(view).cpu().double() for view in views]).mean(0).numpy()
            )
            return prob_BK


def predict_batch(package: Package, batch: Sequence[Picture], *, mirror: bool) -> PredictedBatch:
    """Predict the readable pictures of a batch, which may be none; `mirror` as for `Package.predict`."""
    good = [(name, pixels) for name, pixels in batch if not isinstance(pixels, UndecodableImage)]
    images_NHWC = [pixels for _, pixels in good]
    return PredictedBatch(
        [name for name, _ in good],
        package.predict(np.array(images_NHWC), mirror=mirror),
        [f"{name}: {why}" for name, why in batch if isinstance(why, UndecodableImage)],
    )


#: What holds for a model of drawn faces.
NOT_FOR_PHOTOS = "predictions of this model for photos are meaningless"


class FormatError(UserError):
    """A model cannot be written in a format, but perhaps in others. `reason` says why, without the folder."""

    def __init__(self, dest: Path, name: str, reason: str) -> None:
        super().__init__(f"{dest}: {reason}; leave this format out")
        self.format, self.reason = name, reason


def write_package(
    dest: Path,
    best: Best,
    notes: Iterable[str] = (),
    *,
    metrics: Mapping[str, Any] | None = None,
    formats: Sequence[str] = (TIMM,),
    store: Store | None = None,
) -> None:
    """Write an export folder. Readers find the old folder or the new one, or for a moment between two renames none.

    Args:
        dest: the folder; an earlier export there is replaced.
        best: the weights of a run, with their description.
        notes: sentences on the origin of the model, for the model card.
        metrics: the content of `metrics.json`; None: the report of the run.
        formats: names in FORMATS. Each file is read again and compared with the model before the folder appears.
        store: the data of the run, if they are on this machine: formats are compared on its validation images.

    Raises:
        FormatError: a format cannot be written, or predicts different probabilities.
        UserError: the weights do not fit the model of the settings, or the folder cannot be written or contains other
            files than an export.
    """
    dest = dest.absolute()
    metrics = best.report if metrics is None else metrics
    config, model = RunConfig.from_flat(best.settings), load_model(best)
    evidence = _examine(model, store)
    notes = [*notes, *_notes_on(store)]
    described = _describe_model(model, config, best) | _describe_run(best, evidence.temperature)
    whole = PixelsToProbabilities(model, *mean_std(model)).eval()
    _write_model(
        dest,
        whole,
        [config],
        described,
        lambda checks: render_card(dest.name, described, config, metrics, formats, evidence, [*notes, checks]),
        metrics=metrics,
        formats=formats,
        store=store,
    )


def write_ensemble_package(
    dest: Path,
    members: Sequence[tuple[str, Best]],
    notes: Iterable[str] = (),
    *,
    gain: str,
    metrics: Mapping[str, Any],
    formats: Sequence[str],
    store: Store,
) -> None:
    """Write an export folder of an ensemble, as `write_package` does for one model.

    Args:
        dest: the folder.
        members: the trial and the weights of each member, the best first.
        notes: sentences on the origin of the ensemble, for the model card.
        gain: a sentence on what the ensemble brings.
        metrics: of the ensemble; `metrics.json` also has its size and its speed.
        formats: names in FORMATS, beside the weights of the members, which `predict` loads.
        store: the training data of all members.

    Raises:
        FormatError: a format cannot be written, or predicts different probabilities.
        UserError: the folder cannot be written or contains other files than an export.
    """
    dest = dest.absolute()
    bests, notes = [best for _, best in members], [*notes, *_notes_on(store)]
    configs = [RunConfig.from_flat(best.settings) for best in bests]
    models = [load_model(best) for best in bests]
    wholes = [PixelsToProbabilities(model, *mean_std(model)).eval() for model in models]
    whole = Ensemble(wholes).eval()
    described = {
        "members": [
            {"trial": trial_id, **_describe_model(model, config, best)}
            for (trial_id, best), model, config in zip(members, models, configs, strict=True)
        ],
        "label_names": list(store.classes),
        "num_classes": len(store.classes),
        "input_size": [3, store.image_size, store.image_size],
        **_describe_run(bests[0]),
    }
    values = {
        **metrics,
        "params_millions": sum(best.report["params_millions"] for best in bests),
        "images_per_second_cpu": images_per_second(whole, store.image_size),
        "images_per_second_cpu_single": images_per_second(wholes[0], store.image_size),
    }
    _write_model(
        dest,
        whole,
        configs,
        described,
        lambda checks: render_ensemble_card(dest.name, described, configs, values, formats, gain, [*notes, checks]),
        metrics=values,
        formats=[TIMM, *formats],
        store=store,
    )


def _notes_on(store: Store | None) -> list[str]:
    """Return sentences for the model card on the data of a run."""
    is_drawn = store is not None and is_of_sample(store.path)
    return [f"The faces of the built-in sample are drawn: {NOT_FOR_PHOTOS}."] if is_drawn else []


def _describe_run(best: Best, temperature: float = 1.0) -> dict[str, Any]:
    """Return the run's part of `config.json`: this project's version, the data, the temperature and the settings."""
    # The folder of the pretrained weights is of no use to others.
    settings = {key: value for key, value in best.settings.items() if key != "model.weights_dir"}
    own = {"version": __version__, "data_fingerprint": best.fingerprint, "temperature": temperature}
    return {"raytune_emotion": {**own, "settings": settings}}


def _write_model(
    dest: Path,
    whole: Predictor,
    configs: Sequence[RunConfig],
    described: Mapping[str, Any],
    card: Callable[[str], str],
    *,
    metrics: Mapping[str, Any],
    formats: Sequence[str],
    store: Store | None,
) -> None:
    """Write an export folder of any model from pixels to probabilities; see `write_package`.

    Args:
        dest: the folder.
        whole: the model, on the CPU.
        configs: configuration of the model, or of each member.
        described: the content of `config.json`.
        card: makes the model card from a sentence on the comparison of the formats.
        metrics: the content of `metrics.json`.
        formats: names in FORMATS; for an ensemble, `timm` means the weights of its members.
        store: the data of the run, if they are on this machine: see `write_package`.

    Raises:
        FormatError: a format cannot be written, or predicts different probabilities.
        UserError: the folder cannot be written.
    """
    config = configs[0]
    sample = _sample_of(store, config.data.image_size)
    prob_NK = Package(whole, config.data.classes, config.data.image_size).predict(sample.images_NHWC)

    check_replaceable(Folder(dest))
    with replace_folder(dest) as new:
        write_text(new / CONFIG, _json(described))
        write_text(new / METRICS, _json(metrics))
        checks = []
        for name in formats:
            difference = _write_format(name, new, dest, whole, configs, sample.images_NHWC, prob_NK)
            checks.append(f"{FORMATS[name]} differs from the model by {difference:.1g} at most.")
        checks.append(f"These are differences of probabilities on {sample.name}; up to {TOLERANCE:g} is accepted.")
        write_text(new / CARD, card(" ".join(checks)))


def _examine(model: nn.Module, store: Store | None) -> Evidence:
    """Predict the validation set, and calibrate the model with it if that helps. It changes the model's last layer."""
    if store is None:
        return Evidence(None, 0, None, 1.0)
    predictions = predict_split(model, store.val, store.classes)
    # A few images are too few for a temperature, and their number depends on what else the machine does.
    calibration, temperature = None if is_cut_short(predictions) else calibrate(predictions), 1.0
    if calibration is not None and calibration.helps:
        images_NHWC = store.val.gather(np.arange(min(_DRAWN, len(store.val))))
        if divide_logits(model, calibration.temperature, normalise(torch.from_numpy(images_NHWC), *mean_std(model))):
            temperature = calibration.temperature
            predictions = at_temperature(predictions, temperature)
    return Evidence(predictions, len(store.val), calibration, temperature)


def _write_format(
    name: str,
    new: Path,
    dest: Path,
    whole: Predictor,
    configs: Sequence[RunConfig],
    images_NHWC: npt.NDArray[np.uint8],
    prob_NK: npt.NDArray[np.float64],
) -> float:
    """Write a model in one format, read it again, and return the largest difference of its probabilities."""
    file, config, what = new / FORMATS[name], configs[0], _name_model(configs)
    try:
        with atomic_write(file) as temporary:
            if name == TIMM:
                save_file(weights_to_save(whole.model), temporary, {"format": "pt"})
            else:
                write_graph(name, temporary, whole, config.data.image_size, config.data.classes)
        found_NK = load_package(new).predict(images_NHWC) if name == TIMM else predict_graph(name, file, images_NHWC)
    except (OSError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # tracing or a runtime may raise anything for an arbitrary model
        if is_disk_full(error):
            raise destination_error(dest, error) from error
        reason = f"{what} cannot be exported as {name} ({in_one_line(error)})"
        raise FormatError(dest, name, reason) from error
    difference = float(np.abs(found_NK - prob_NK).max())
    if not difference <= TOLERANCE:
        reason = f"{what} as {name} gives probabilities that differ by {difference:.2g}, more than {TOLERANCE:g}"
        raise FormatError(dest, name, reason)
    return difference


def _name_model(configs: Sequence[RunConfig]) -> str:
    """Return the backbone of a model, or the backbones of the members of an ensemble."""
    names = ", ".join(dict.fromkeys(config.model.backbone for config in configs))
    return names if len(configs) == 1 else f"an ensemble of {names}"


@dataclass(frozen=True)
class _Sample:
    """Images on which the formats of an export are compared."""

    images_NHWC: npt.NDArray[np.uint8]
    name: str


def _sample_of(store: Store | None, size: int) -> _Sample:
    """Return images of the validation set or, if the data of the run are not on this machine, drawn faces."""
    if store is None:
        rng = np.random.default_rng(0)
        faces = [draw_face(*draw_point(rng), rng, size) for _ in range(_DRAWN)]
        return _Sample(np.stack(faces), f"{_DRAWN} drawn faces, because the data of the run are not on this machine")
    rows_N = np.linspace(0, len(store.val) - 1, min(_COMPARED, len(store.val))).astype(np.int64)
    return _Sample(store.val.gather(rows_N), count(len(rows_N), "validation image"))


def load_package(folder: Path) -> Package:
    """Load an export of one model or of an ensemble from `config.json` and `model.safetensors`.

    A `model.pt2` is not loaded, because torch would load pickles and evaluate text in it.

    Raises:
        UserError: the folder is not an export, or is damaged.
    """
    check_export(folder)
    try:
        config = load_json((folder / CONFIG).read_bytes())
        classes, members = tuple(config["label_names"]), config.get("members")
        check_class_names(classes)
        size = _read_image_size([config] if members is None else members)
        model: Predictor = (
            _make_model(config, len(classes))
            if members is None
            else Ensemble([_make_model(member, len(classes)) for member in members])
        )
        model.model.load_state_dict(load_file(folder / WEIGHTS))
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            raise ValueError("weights that are not finite")
        return Package(model.eval(), classes, size)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder}: a damaged export ({in_one_line(error)}); export the model again") from error


def _read_image_size(described: Sequence[Mapping[str, Any]]) -> int:
    """Return the side of the images, px, that the models of an export take.

    Raises:
        ValueError: their descriptions have no common size, or one that no model of this project has.
    """
    first, *others = [each["pretrained_cfg"]["input_size"] for each in described]
    if not isinstance(first, list) or len(first) != 3 or first != [3, first[1], first[1]]:
        raise ValueError(f"input_size is not [3, N, N] but {first}")
    RunConfig.from_flat({"data.image_size": first[1]})
    if any(other != first for other in others):
        raise ValueError(f"the members have different input sizes: {[first, *others]}")
    size: int = first[1]
    return size


def _make_model(described: Mapping[str, Any], n_classes: int) -> PixelsToProbabilities:
    """Make the model that `config.json`, or a member's part of it, describes, without its weights."""
    known, architecture = described["pretrained_cfg"], described["architecture"]
    # Other names could make timm load a pickle, or connect to a hub. Export folders come from other people.
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no architecture {architecture}")
    mean, std = check_normalisation(known)
    network = timm.create_model(architecture, num_classes=n_classes, **check_arguments(described.get("model_args", {})))
    return PixelsToProbabilities(network, mean, std)


def _describe_model(model: nn.Module, config: RunConfig, best: Best) -> dict[str, Any]:
    """Return the description from which timm rebuilds the model, with the store's preprocessing of pictures."""
    origin = find_origin(config.model, weights=False, description=best.origin)
    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    size, classes = config.data.image_size, list(config.data.classes)
    mean, std = mean_std(model)
    kept = {key: known[key] for key in ("fixed_input_size", "first_conv", "classifier") if known.get(key)}
    if config.model.pretrained:
        # A training that starts from this export finds it here.
        kept["license"] = licence(config.model, known)
    arguments = {**origin.arguments, **({_IMAGE_SIZE: size} if origin.fixed_input_size else {})}
    return {
        "architecture": origin.architecture.partition(".")[0],
        "num_classes": len(classes),
        "num_features": model.num_features,
        "label_names": classes,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **kept,
            "input_size": [3, size, size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(mean),
            "std": list(std),
            "num_classes": len(classes),
        },
    }


@contextlib.contextmanager
def publish_export(dest: Location) -> Iterator[Path]:
    """Provide a folder to write an export into. When the block succeeds, it replaces an earlier export at `dest`.

    Raises:
        UserError: the location cannot be written, or holds other files.
    """
    check_replaceable(dest)
    with dest.publish(CONFIG) as folder:
        yield folder


def check_replaceable(dest: Location) -> None:
    """Check that a location may become an export: it is empty, or holds only an earlier export.

    Raises:
        UserError: it holds other files, or is the current folder.
    """
    if not dest.exists():
        return
    with contextlib.suppress(FileNotFoundError):  # the current folder is gone
        here = Path.cwd()
        if any(dest.is_here(folder) for folder in (here, *here.parents)):
            raise UserError(f"{dest}: is or holds the current folder, which cannot be replaced; name another place")
    if not dest.is_folder():
        raise UserError(f"{dest}: exists already and is not a folder; name another destination")
    there = {*dest.list_folders(), *(file.name for file in dest.list_files())}
    others = sorted(there - {*FORMATS.values(), CONFIG, METRICS, CARD} - _OF_SYSTEMS)
    formats = {*FORMATS.values()} & there
    if CONFIG in there and b'"raytune_emotion"' not in (dest.read(CONFIG) or b""):
        others = [CONFIG]  # of a model from elsewhere
    elif CARD in there and CONFIG not in there and not formats and dest.is_here(dest.working_folder()):
        others = [CARD]  # of a folder that somebody has prepared; at a URI, an interrupted export may have left it
    if others:
        raise UserError(
            f"{dest}: holds files that do not belong to an export ({', '.join(others[:5])}) and would be deleted or "
            f"mixed with it; name another destination, or move them away"
        )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
