"""Make the spec of a new or a resumed study, after all possible checks."""

import dataclasses
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from raytune_emotion.config import FlatConfig, ModelConfig, RunConfig
from raytune_emotion.data.prepare import Data, find_data, prepare_sizes
from raytune_emotion.data.store import Store, is_store
from raytune_emotion.data.synthetic import sample_folder
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.learn.evaluation import baseline
from raytune_emotion.learn.loop import batch_faults, evaluation_faults
from raytune_emotion.learn.model import build_model, check_weights
from raytune_emotion.learn.origin import WeightsUnavailableError
from raytune_emotion.storage.locations import Folder, Location, parse_location
from raytune_emotion.tuning.policy.decisions import FORECAST, default_scheduler
from raytune_emotion.tuning.policy.objective import DEFAULT_OBJECTIVE
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.database import join_address
from raytune_emotion.tuning.study.endings import MAX_FAILURES
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.request import DEFAULT_TRIALS, SearchRequest, absolute_path
from raytune_emotion.tuning.study.resume_check import refused_changes
from raytune_emotion.tuning.study.spec import StudySpec, open_stores

#: Value of `StudySpec.data` for the built-in sample.
GENERATED = "generated faces"


def new_spec(request: SearchRequest, name: str, space: Space, data: Data) -> StudySpec:
    """Make the spec of a new study, with its data packed.

    Raises:
        UserError: a backbone cannot be built, or the data cannot be packed.
    """
    check_trainable(space, data, workers=request.workers_per_trial or 1)
    stores = _stores(data, space, skip_bad=request.skip_bad)
    first = next(iter(stores.values()))
    sampler = request.sampler or FORECAST
    return StudySpec(
        name=name,
        seed=space.fixed_settings.get("train.seed", 0),
        objective=request.objective or DEFAULT_OBJECTIVE,
        sampler=sampler,
        scheduler=request.scheduler or default_scheduler(sampler),
        trials=request.trials or DEFAULT_TRIALS,
        epochs=space.fixed_settings["train.epochs"],
        concurrency=request.concurrency,
        workers_per_trial=request.workers_per_trial or 1,
        gpus_per_worker=request.gpu_share,
        max_failures=MAX_FAILURES if request.max_failures is None else request.max_failures,
        data=request.data.address if request.data else GENERATED,
        stores={size: store.address for size, store in stores.items()},
        fingerprints={size: store.fingerprint for size, store in stores.items()},
        classes=first.classes,
        weights_dir=space.fixed_settings.get("model.weights_dir"),
        space=space.to_dict(),
        baseline=baseline(first),
        # The name in the database is unique, because a folder may be deleted and made again.
        storage=request.storage and join_address(request.storage, f"{name}-{uuid.uuid4().hex[:8]}"),
    )


def resumed_spec(request: SearchRequest, study: OpenStudy, faults: list[str]) -> StudySpec:
    """Return the spec of a resumed study. The search itself stays the same; its length and its resources may change.

    Args:
        request: the request.
        study: the study to resume.
        faults: errors that are already known.

    Raises:
        UserError: there are such errors; the request does not fit the study; its data or weights are missing; batches
            are too small for the number of workers.
    """
    spec, space = study.spec, study.space
    faults = refused_changes(request, spec, study.folder) + faults
    stores, opened = spec.stores, dict[int, Store]()
    data = request.data or _find_data_again(spec)
    if data is not None:
        with collect_errors(faults):
            opened = _stores(find_data(data), space, skip_bad=request.skip_bad)
            stores = {size: store.address for size, store in opened.items()}
            if {size: store.fingerprint for size, store in opened.items()} != spec.fingerprints:
                faults.append(f"{data}: not the data with which the study began; its trials could not be compared")
    else:
        with collect_errors(faults):
            opened = open_stores(spec, "name the data with --data")
    weights_dir = absolute_path(request.weights_dir) or spec.weights_dir
    if opened:
        store = next(iter(opened.values()))  # all stores have the same rows
        outside = {"data.image_size": store.image_size, "model.weights_dir": weights_dir}
        workers = request.workers_per_trial or spec.workers_per_trial
        with collect_errors(faults):
            faults += _batch_faults(space, outside, len(store.train), workers)
    for model in _models(space, weights_dir):
        with collect_errors(faults):
            check_weights(model)
    if faults:
        raise UserError(faults)
    given: dict[str, Any] = {
        "trials": request.trials,
        "epochs": request.epochs,
        "concurrency": request.concurrency,
        "workers_per_trial": request.workers_per_trial,
        "gpus_per_worker": request.gpu_share,
        "max_failures": request.max_failures,
        "weights_dir": absolute_path(request.weights_dir),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(spec, stores=stores, **given)


def _find_data_again(spec: StudySpec) -> Location | None:
    """Return the location of a study's data if its packed stores are not on this machine; None if they are."""
    if all(is_store(path) for path in spec.stores.values()):
        return None
    data = Folder(sample_folder()) if spec.data == GENERATED else parse_location(spec.data)
    with suppress(UserError):
        find_data(data)
        return data
    return None


def _stores(data: Data, space: Space, *, skip_bad: bool) -> dict[int, Store]:
    """Open or make the packed store of each image size of a space."""
    classes = space.values_of("data.classes")
    named = tuple(classes[0]) if classes else None
    return prepare_sizes(data, image_sizes(data, space), classes=named, skip_bad=skip_bad)


def image_sizes(data: Data, space: Space) -> tuple[int, ...]:
    """Return the image sizes of a space; the size of the data if the space names none."""
    return space.values_of("data.image_size") or (data.own_size(),)


def check_trainable(space: Space, data: Data, *, workers: int) -> None:
    """Check, before data are packed, that trials of a space can be trained on them with this number of workers.

    Raises:
        UserError: an error for each backbone that cannot be built, for batches that are too small for the workers, and
            for evaluations without a step.
    """
    faults: list[str] = []
    sizes, default, rows = image_sizes(data, space), RunConfig().train, data.count_rows()
    with collect_errors(faults):
        _check_backbones(space, sizes)
    with collect_errors(faults):
        outside = {"data.image_size": sizes[0], "model.weights_dir": space.fixed_settings.get("model.weights_dir")}
        faults += _batch_faults(space, outside, rows, workers)
    faults += evaluation_faults(
        space.fixed_settings.get("train.evals_per_epoch", default.evals_per_epoch),
        rows=rows,
        batch_size=int(space.largest_value("train.batch_size") or default.batch_size),
    )
    if faults:
        raise UserError(dict.fromkeys(faults))


def _batch_faults(space: Space, outside: FlatConfig, rows: int, workers: int) -> list[str]:
    """List the batches of a space that are too small for the workers of a trial.

    Args:
        space: search space of the study.
        outside: settings that do not come from the space, by dotted path.
        rows: number of training rows.
        workers: number of workers of a trial.
    """
    default, found = RunConfig(), dict[tuple[str, int, int], None]()
    for ends in map(space.ends, space.decisions()):
        batch_size, *_ = ends.get("train.batch_size", (default.train.batch_size,))
        *_, accumulate = ends.get("train.accumulate", (default.train.accumulate,))
        for name in ends.get("model.backbone", (default.model.backbone,)):
            found[name, batch_size, accumulate] = None
    faults: list[str] = []
    for name, batch_size, accumulate in found:
        own = {"model.backbone": name, "train.batch_size": batch_size, "train.accumulate": accumulate}
        faults += batch_faults(RunConfig.from_flat({**outside, **own}), rows, workers)
    return list(dict.fromkeys(faults))


def _check_backbones(space: Space, sizes: Sequence[int]) -> None:
    """Build every backbone at every size once, so that no trial fails because of a missing backbone.

    Raises:
        UserError: an error for each backbone that cannot be built.
    """
    faults: list[str] = []
    for model in _models(space, space.fixed_settings.get("model.weights_dir")):
        for size in sizes:
            data = dataclasses.replace(RunConfig().data, image_size=size)
            try:
                build_model(dataclasses.replace(RunConfig(), model=model, data=data))
            except UserError as error:
                faults += error.faults
                if isinstance(error, WeightsUnavailableError):
                    # Each further attempt could take a minute.
                    raise UserError(dict.fromkeys(faults)) from None
    if faults:
        raise UserError(dict.fromkeys(faults))


def _models(space: Space, weights_dir: str | None) -> list[ModelConfig]:
    """List each backbone of a space, with pretrained weights and drop path if a trial may use them."""
    drop_paths: dict[str, float] = {}
    for ends in map(space.ends, space.decisions()):
        *_, drop_path = ends.get("model.drop_path", (0.0,))
        for name in ends.get("model.backbone", (ModelConfig().backbone,)):
            drop_paths[name] = max(drop_paths.get(name, 0.0), drop_path)
    pretrained = any(space.values_of("model.pretrained") or (weights_dir is not None,))
    return [
        ModelConfig(backbone=name, pretrained=pretrained, weights_dir=weights_dir, drop_path=drop_path)
        for name, drop_path in drop_paths.items()
    ]
