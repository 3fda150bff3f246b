"""Export several trials of a study as one model: an ensemble with its model card, or the mean of their weights."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from raytune_emotion.config import RunConfig
from raytune_emotion.learn.checkpoint import Best
from raytune_emotion.learn.combine import images_per_second
from raytune_emotion.learn.device import find_device
from raytune_emotion.learn.export_files import CONFIG
from raytune_emotion.learn.export_folder import (
    TIMM,
    check_replaceable,
    describe_model,
    describe_run,
    write_model,
    write_package,
)
from raytune_emotion.learn.graphs import Ensemble, PixelsToProbabilities
from raytune_emotion.learn.model import load_model, mean_std
from raytune_emotion.learn.model_card import describe_start, escape_markdown, show_use, table_of_metrics
from raytune_emotion.learn.origin import find_origin
from raytune_emotion.learn.run_folder import BEST, PREDICTIONS
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import shell_word
from raytune_emotion.tuning.study.combination import (
    Candidates,
    Combination,
    combine_ensemble,
    combine_soup,
    list_kept,
    read_candidates,
)
from raytune_emotion.tuning.study.open_study import OpenStudy, read_study
from raytune_emotion.tuning.study.spec import find_store

#: Files of a study that are combined.
_WEIGHTS = (f"trials/*/{BEST}", f"trials/*/{PREDICTIONS}")
_CARD = """\
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

## Limits

- It predicts the emotion that is *perceived* in a face by those who annotated its training data, not what its owner
  feels. Faces are poor evidence of feelings: decide nothing about a person by it.
- It knows faces such as those of its training data. Other ages, skin tones, poses, lighting or croppings can make it
  worse; how much was not measured.
- What it was trained on, and the pretrained weights that it began with, have licences of their own, which may restrict
  its use.

## Where it comes from

{origin}
"""


def export_ensemble(study: Location, dest: Location, most: int, formats: Sequence[str]) -> Combination:
    """Export an ensemble of a study's trials as one model, and replace an earlier export at dest.

    The weights of its members, which `predict` loads, are always among the files.

    Raises:
        UserError: there is nothing to combine, dest cannot be written, or a format cannot be made.
    """
    check_replaceable(dest)
    with read_study(study, *_WEIGHTS) as read, dest.publish(CONFIG) as package:
        chosen = combine_ensemble(_candidates(read), most)
        write_ensemble(package, chosen, study.name, formats)
    return chosen


def export_soup(study: Location, dest: Location, formats: Sequence[str]) -> Combination:
    """Export the mean weights of a study's trials, and replace an earlier export at dest.

    Raises:
        UserError: there is nothing to combine, dest cannot be written, or a format cannot be made.
    """
    check_replaceable(dest)
    with read_study(study, *_WEIGHTS) as read, dest.publish(CONFIG) as package:
        chosen, best = combine_soup(_candidates(read), find_device())
        write_soup(package, chosen, best, study.name, formats)
    return chosen


def write_ensemble(
    dest: Path,
    chosen: Combination,
    study: str,
    formats: Sequence[str],
    notes: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the export folder of an ensemble; a lone member is exported as a single model.

    Args:
        dest: the folder.
        chosen: the members.
        study: name of their study.
        formats: beside the weights of the members, which `predict` loads.
        notes: sentences for the model card.
        metrics: further ones, for `metrics.json`.

    Raises:
        FormatError: a format cannot be written.
        UserError: the folder cannot be written.
    """
    if len(chosen.members) == 1:
        _write_alone(dest, chosen, study, [TIMM, *formats], notes, metrics)
        return
    candidates = chosen.candidates
    bests = [candidates.bests[number] for number in chosen.members]
    models = [load_model(best) for best in bests]
    wholes = [PixelsToProbabilities(model, *mean_std(model)).eval() for model in models]
    whole, store = Ensemble(wholes).eval(), candidates.store
    configs = [RunConfig.from_flat(best.settings) for best in bests]
    origins = [
        find_origin(config.model, weights=False, description=best.origin)
        for config, best in zip(configs, bests, strict=True)
    ]
    rates = [images_per_second(model, store.image_size) for model in (whole, wholes[0])]
    values = {
        **chosen.metrics,
        "params_millions": sum(best.report["params_millions"] for best in bests),
        "images_per_second_cpu": rates[0],
        "images_per_second_cpu_single": rates[1],
        **(metrics or {}),
    }
    first = bests[0]
    described = {
        "members": [
            {"trial": trial_id, **describe_model(model, config, origin)}
            for trial_id, model, config, origin in zip(chosen.trial_ids, models, configs, origins, strict=True)
        ],
        "label_names": list(store.classes),
        "num_classes": len(store.classes),
        "input_size": [3, store.image_size, store.image_size],
        **describe_run(first),
    }
    origin = [
        escape_markdown(f"Trials {', '.join(chosen.trial_ids)} of the study {study}."),
        *map(escape_markdown, notes),
        *_list_starts(chosen.trial_ids, configs, models),
    ]

    def card(checks: str) -> str:
        return _CARD.format(
            members=len(chosen.members),
            n_classes=len(store.classes),
            classes=", ".join(map(escape_markdown, store.classes)),
            folder=shell_word(dest.name),
            files=" ".join(f"`model.{name}` is the whole as one graph." for name in formats),
            code=show_use(formats, folder=dest.name, size=store.image_size, n_classes=len(store.classes)),
            size=store.image_size,
            gain=chosen.sentence("ensemble"),
            rate=rates[0],
            rate_one=rates[1],
            metrics=table_of_metrics(values),
            origin="\n".join(f"- {line}" for line in [*origin, escape_markdown(checks)]),
        )

    write_model(dest, whole, first, described, card, metrics=values, formats=[TIMM, *formats], store=store)


def _list_starts(trial_ids: Sequence[str], configs: Sequence[RunConfig], models: Sequence[nn.Module]) -> list[str]:
    """Describe the start of each member's training with its licence, as the card of one model does."""
    starts = []
    for trial_id, config, model in zip(trial_ids, configs, models, strict=True):
        known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        member = f"Trial {trial_id}, {config.model.backbone}"
        starts.append(f"{escape_markdown(member)}: {describe_start(config.model, known)}")
    return starts


def write_soup(
    dest: Path,
    chosen: Combination,
    best: Best,
    study: str,
    formats: Sequence[str],
    notes: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the export folder of a soup; see `write_ensemble`."""
    if len(chosen.members) == 1:
        _write_alone(dest, chosen, study, formats, notes, metrics)
        return
    origin = [
        f"The mean of the weights of the trials {', '.join(chosen.trial_ids)} of the study {study}. "
        f"{chosen.sentence('soup')}",
        *notes,
    ]
    values = {**chosen.metrics, **(metrics or {})}
    write_package(dest, best, origin, metrics=values, formats=formats, store=chosen.candidates.store)


def _write_alone(
    dest: Path,
    chosen: Combination,
    study: str,
    formats: Sequence[str],
    notes: Sequence[str],
    metrics: Mapping[str, Any] | None,
) -> None:
    origin = [f"Trial {chosen.trial_ids[0]} of the study {study}, alone, as no other trial helps it.", *notes]
    best, store = chosen.candidates.bests[chosen.members[0]], chosen.candidates.store
    values = {**best.report, **(metrics or {})}
    write_package(dest, best, origin, metrics=values, formats=formats, store=store)


def _candidates(study: OpenStudy) -> Candidates:
    find = functools.partial(find_store, study.spec, fetch=True)
    return read_candidates(list_kept(study.folder, study.records()), find, find_device())
