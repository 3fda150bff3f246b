"""Write the model card of an export: the model, its use, its metrics and its limits.

A test checks that the code in the card gives the same probabilities as `predict`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch

from raytune_emotion import __version__
from raytune_emotion.config import ModelConfig, RunConfig
from raytune_emotion.learn.backbones import short_name
from raytune_emotion.learn.calibration import Calibration
from raytune_emotion.learn.origin import licence
from raytune_emotion.learn.predictions import Predictions, bootstrap_intervals, class_errors, is_cut_short
from raytune_emotion.terminal import count, shell_word

_MEANINGS = {
    "js": "Jensen-Shannon divergence, bits",
    "kl": "Kullback-Leibler divergence of the prediction from the target, nats",
    "ce": "cross-entropy, nats",
    "tvd": "total variation distance",
    "mse": "mean squared error",
    "l1": "mean absolute error",
    "emd": "earth mover's distance over the order of the classes",
    "emd_va": "earth mover's distance in the plane of valence and arousal",
    "chebyshev": "Chebyshev distance",
    "clark": "Clark distance",
    "canberra": "Canberra distance",
    "cosine": "cosine similarity (higher is better)",
    "intersection": "intersection (higher is better)",
    "accuracy": "accuracy of the most probable class (higher is better)",
}

_CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags: [timm, facial-expression, label-distribution-learning]
---

# Distributions of emotion from faces: {architecture}

The model predicts a distribution over the {n_classes} emotions that people see in the picture of a face:
{classes}.

## How to use it

{code}
The picture is the box around one face, squeezed to {size} x {size} px. The classes are in the order above, as in
`label_names` of `config.json`. Pictures with transparent pixels, or with 16 bits per pixel, need
`raytune-emotion predict`.

## How good it is

{metrics}

The epoch and, in a search, the settings were chosen by the Jensen-Shannon divergence on this same set. Expect slightly
worse values on new faces.
{per_class}
## Calibration

{calibration}

{limits}
## Where it comes from

{origin}

| setting | value |
|---|---|
{settings}
"""

_ENSEMBLE_CARD = """\
---
pipeline_tag: image-classification
tags: [facial-expression, label-distribution-learning]
---

# Distributions of emotion from faces: an ensemble of {members}

For the picture of a face, the probabilities of {n_classes} emotions that people see in it, as a distribution:
{classes}. The model is the mean of the predictions of several networks.

## How to use it

`raytune-emotion predict {folder} face.jpg` prints the probabilities. `model.safetensors` has the weights of
all members, and `config.json` says how timm builds each of them. {files}

{code}
The picture is the box around one face, squeezed to {size} x {size} px. The classes are in the order above.

## How good it is

{gain} It predicts {rate:.0f} images a second on the CPU where it was exported; its first member alone {rate_one:.0f}.

Means over the validation set, on which the members and their epochs were chosen: on new faces, expect somewhat worse.

{metrics}

{limits}
## Where it comes from

{origin}
"""

#: A part of every card.
_LIMITS = """\
## Limits and ethics

- It predicts the emotion that annotators *perceived* in a face, not what the person feels. Faces are poor evidence of
  feelings. People of different cultures show and read them differently.
- Do not use it to decide anything about a person: not at work, at school, at a border, in insurance or in court. Some
  laws forbid this. The European Union's AI Act, for one, forbids it at work and in education.
- Use it on pictures of people who agreed to it.
- It was trained on faces such as those of its training data. Other ages, skin tones, poses, light or croppings can
  make it worse. This was not measured.
- The licences of its training data may restrict its use.
"""

_READ = """\
```python
import numpy as np
from PIL import Image, ImageOps


def read_picture(file, side={size}):
    \"\"\"Decode a picture as in training: upright, RGB, squeezed to a square.\"\"\"
    picture = Image.open(file)
    draft = picture.draft(None, (side, side))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    square = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, draft and draft[1])
    return np.array(ImageOps.exif_transpose(square))


images = np.stack([read_picture("face.jpg")])  # [N, {size}, {size}, 3]
```
"""

_USES = {
    "timm": """\
As a timm model:

```python
import timm
import torch

model = timm.create_model({as_timm}, pretrained=True).eval()
mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
with torch.inference_mode():
    x = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    probabilities = model(x).softmax(-1)  # [N, {n_classes}]
```

The same from the command line, with more formats of pictures: `raytune-emotion predict {typed} face.jpg`.
""",
    "onnx": """\
With ONNX Runtime:

```python
import onnxruntime

session = onnxruntime.InferenceSession({onnx})
(probabilities,) = session.run(["probabilities"], {{"images": images}})  # [N, {n_classes}]
```
""",
    "pt2": """\
With torch alone:

```python
import torch

program = torch.export.load({pt2}).module()
with torch.inference_mode():
    probabilities = program(torch.from_numpy(images))  # [N, {n_classes}]
```
""",
}


@dataclass(frozen=True)
class Evidence:
    """Results of a model on its validation set; without the data, empty."""

    predictions: Predictions | None  # of the exported model, for validation images
    images: int  # number of images in the validation set
    calibration: Calibration | None
    temperature: float  # divisor of the logits


def render_card(
    folder: str,
    described: Mapping[str, Any],
    config: RunConfig,
    metrics: Mapping[str, Any],
    formats: Sequence[str],
    evidence: Evidence,
    notes: Iterable[str],
) -> str:
    """Return the text of a model card.

    Args:
        folder: the export's name.
        described: the content of `config.json`.
        config: configuration of the run.
        metrics: metrics of the whole validation set, as in `metrics.json`.
        formats: the exported formats.
        evidence: results on the validation set.
        notes: sentences on the origin of the model.
    """
    size, n_classes = config.data.image_size, len(config.data.classes)
    own = [
        *map(escape_markdown, notes),
        describe_start(config.model, described["pretrained_cfg"]),
        f"Exported by raytune_emotion {__version__}, with PyTorch {torch.__version__} and timm {timm.__version__}.",
        f"Data fingerprint: `{described['raytune_emotion']['data_fingerprint']}`.",
    ]
    shown = {k: v for k, v in config.to_flat().items() if k not in ("data.classes", "model.weights_dir")}
    return _CARD.format(
        size=size,
        n_classes=n_classes,
        architecture=described["architecture"],
        classes=", ".join(map(escape_markdown, config.data.classes)),
        code=_show_use(formats, folder=folder, size=size, n_classes=n_classes),
        metrics=_metrics(metrics, evidence),
        per_class=_per_class(evidence.predictions),
        calibration=_calibration(evidence),
        limits=_LIMITS,
        origin="\n".join(f"- {line}" for line in own),
        settings="\n".join(f"| {key} | {escape_markdown(str(value))} |" for key, value in shown.items()),
    )


def render_ensemble_card(
    folder: str,
    described: Mapping[str, Any],
    configs: Iterable[RunConfig],
    metrics: Mapping[str, Any],
    formats: Sequence[str],
    gain: str,
    notes: Iterable[str],
) -> str:
    """Return the text of the model card of an ensemble.

    Args:
        folder: the export's name.
        described: the content of `config.json`.
        configs: configuration of each member.
        metrics: the content of `metrics.json`.
        formats: the exported graphs.
        gain: a sentence on what the ensemble brings.
        notes: sentences on the origin of the ensemble.
    """
    members, classes = described["members"], described["label_names"]
    _, size, _ = described["input_size"]
    origin = [*map(escape_markdown, notes)]
    for member, config in zip(members, configs, strict=True):
        name = escape_markdown(f"Trial {member['trial']}, {config.model.backbone}")
        origin.append(f"{name}: {describe_start(config.model, member['pretrained_cfg'])}")
    return _ENSEMBLE_CARD.format(
        members=len(members),
        n_classes=len(classes),
        classes=", ".join(map(escape_markdown, classes)),
        folder=shell_word(folder),
        files=" ".join(f"`model.{name}` is the whole as one graph." for name in formats),
        code=_show_use(formats, folder=folder, size=size, n_classes=len(classes)),
        size=size,
        gain=gain,
        rate=metrics["images_per_second_cpu"],
        rate_one=metrics["images_per_second_cpu_single"],
        metrics=_table_of_metrics(metrics),
        limits=_LIMITS,
        origin="\n".join(f"- {line}" for line in origin),
    )


def _show_use(formats: Sequence[str], *, folder: str, size: int, n_classes: int) -> str:
    """Return code that reads a picture and predicts it with each of these formats.

    Args:
        formats: names of formats.
        folder: the export's name.
        size: side of the model's images, px.
        n_classes: number of probabilities.
    """
    parts = (_READ, *(_USES[name] for name in formats)) if formats else ()
    files = {"as_timm": f"local-dir:{folder}", "onnx": f"{folder}/model.onnx", "pt2": f"{folder}/model.pt2"}
    # A JSON string is also a Python string.
    texts = {name: json.dumps(file, ensure_ascii=False) for name, file in files.items()}
    return "\n".join(part.format(typed=shell_word(folder), size=size, n_classes=n_classes, **texts) for part in parts)


def escape_markdown(text: str) -> str:
    """Escape a text of one line for Markdown, so that nothing in it is markup."""
    return re.sub(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _table_of_metrics(metrics: Mapping[str, Any]) -> str:
    """Return a Markdown table of the metrics of the whole validation set."""
    rows = [
        f"| {_MEANINGS[name]} | {value:.4f} |"
        for key, value in metrics.items()
        for prefix, _, name in [key.partition("_")]
        if prefix == "val" and name in _MEANINGS
    ]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _metrics(metrics: Mapping[str, Any], evidence: Evidence) -> str:
    # The mean of several models has no number of epochs.
    after = f" after {count(float(metrics['epoch']), 'epoch')}" if "epoch" in metrics else ""
    if evidence.predictions is None:
        return f"Means over the validation set{after}:\n\n{_table_of_metrics(metrics)}"
    values = evidence.predictions.metrics()
    spread = bootstrap_intervals(values)
    rows = [
        f"| {_MEANINGS[name]} | {value_N.mean():.4f} | {spread[name][0]:.4f} to {spread[name][1]:.4f} |"
        for name, value_N in values.items()
    ]
    used = len(evidence.predictions.ids)
    which = f"all {used}" if used == evidence.images else f"{used} of the {evidence.images}"
    heading = f"Means over {which} validation images{after}, with 95 % intervals (1,000 bootstrap resamples):"
    return "\n".join([heading, "", "| metric | value | 95 % interval |", "|---|---|---|", *rows])


def _per_class(predictions: Predictions | None) -> str:
    if predictions is None:
        return ""
    rows = [
        f"| {escape_markdown(row.name)} | {row.mean_target:.4f} | {row.mean_prediction:.4f} | "
        f"{row.mean_absolute_error:.4f} | {row.calibration_error:.4f} | {row.majority_images} | "
        f"{'' if row.majority_found is None else f'{row.majority_found:.2f}'} |"
        for row in class_errors(predictions)
    ]
    heading = (
        "| class | mean target | mean prediction | mean absolute error | calibration error | "
        "images where it is most probable | share of these predicted so |"
    )
    return "\n".join(["", heading, "|---|---|---|---|---|---|---|", *rows, ""])


def _calibration(evidence: Evidence) -> str:
    found = evidence.calibration
    if evidence.predictions is None:
        return "The model is not calibrated, because the data of the run are not on the machine that exported it."
    if is_cut_short(evidence.predictions):
        done = count(len(evidence.predictions.ids), "validation image")
        return f"The model is not calibrated: there was time to predict only {done}. Export it on a faster machine."
    if found is None:
        return "The model is not calibrated: the validation set is too small."
    tried = (
        f"A temperature of {found.temperature:.4f} was fitted on the soft labels of {found.fitted_on} validation "
        f"images. On the {found.judged_on} others (the halves are chosen by a hash of the id), it changes KL from "
        f"{found.kl[0]:.4f} to {found.kl[1]:.4f} nats and JS from {found.js[0]:.4f} to {found.js[1]:.4f} bits."
    )
    if evidence.temperature != 1:
        kept = (
            "It is applied: in all formats, the last layer of the weights is divided by it. The tables above include "
            "it, `metrics.json` does not."
        )
    elif found.helps:
        kept = "It is not applied, because this backbone's last layer cannot be scaled."
    else:
        kept = "It is not applied, because it does not help there."
    return f"{tried} {kept}"


def describe_start(config: ModelConfig, known: Mapping[str, Any]) -> str:
    """Say which weights a training began from, and under which licence they are.

    Args:
        config: names the backbone.
        known: timm's description of the weights.
    """
    if not config.pretrained:
        return "Training began with random weights, so no licence of other weights applies."
    terms = " ".join(str(licence(config, known)).split())
    return (
        f"Training began with the pretrained weights of {escape_markdown(short_name(config.backbone))}. "
        f"Their licence: {escape_markdown(terms)}."
    )
