"""Train one configuration, also the best configuration of a study: the command."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml.error import YAMLError

from raytune_emotion.cli import (
    add_training_data_options,
    command_main,
    folder_name,
    gpu_share,
    local_path,
    location,
    positive_integer,
)
from raytune_emotion.config import SETTINGS, DataConfig, RunConfig, unknown_setting
from raytune_emotion.data.prepare import Data, find_data, prepare
from raytune_emotion.data.store import is_store
from raytune_emotion.data.synthetic import sample_folder
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.learn.backbones import check_architecture, short_name
from raytune_emotion.learn.run_folder import LAST
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.storage.nearest import RESULTS
from raytune_emotion.storage.yaml_text import invalid_yaml, load_yaml, read_text
from raytune_emotion.terminal import warn
from raytune_emotion.tuning.execution.gpu_presence import refuse_absent_gpu, refuse_broken_gpu
from raytune_emotion.tuning.space.words import read_value
from raytune_emotion.tuning.study.spec import SPEC, spec_of, subfolders_with
from raytune_emotion.tuning.study.trials import (
    ALL,
    DATA,
    PARAMS,
    data_of,
    find_trial,
    is_taken,
    refuse_taken,
    trial_file,
    trials_with,
)

if TYPE_CHECKING:
    from raytune_emotion.learn.checkpoint import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"settings: {', '.join(SETTINGS)}"
    add = parser.add_argument
    add(
        "--data",
        type=location,
        metavar="DIR",
        help="folder, table of faces or packed store, as a path or URI "
        "(default: the data of --study or of the resumed run, else the built-in sample)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one of the settings below, such as optim.lr=1e-3; may be repeated",
    )
    add("--config", type=local_path, metavar="FILE", help="file of settings: YAML, or the params.json of a trial")
    add("--study", type=location, metavar="DIR", help="study whose best trial (or --trial) gives the settings")
    add("--trial", metavar="ID", help="id of a trial of --study")
    add("--epochs", type=int, metavar="N", help="the same as --set train.epochs=N")
    add("--seed", type=int, metavar="N", help="the same as --set train.seed=N")
    add(
        "--workers",
        type=positive_integer,
        metavar="N",
        help="processes that train the model together (default: 1, or those of the resumed run)",
    )
    add(
        "--gpus-per-worker",
        type=gpu_share,
        metavar="X",
        help="GPUs per worker: 0, a fraction or 1 (default: 1 if there are GPUs)",
    )
    add(
        "--results",
        type=location,
        default=Folder(RESULTS),
        metavar="DIR",
        help="folder of the run's folder, or a URI such as s3://bucket/prefix (default: ray_results)",
    )
    add("--name", type=folder_name, metavar="NAME", help="name of the run (default: {backbone}_{loss})")
    add("--resume", action="store_true", help="continue the run of this name, also with more --epochs")
    add_training_data_options(parser)
    add(
        "--address",
        metavar="ADDRESS",
        help="address of a running Ray cluster, or auto (default: train on this machine)",
    )


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is known of the request before its data are read."""

    settings: dict[str, Any]
    place: Location | None = None  # None: its name depends on settings that are wrong
    config: RunConfig | None = None  # None: the settings are wrong, or a source of them cannot be read
    progress: "Progress | None" = None


def settings_of(args: argparse.Namespace, faults: list[str]) -> dict[str, Any]:
    """Collect the settings. A later source wins: study, file, --set, the settings' own options.

    The settings themselves are not validated.

    Args:
        args: the arguments.
        faults: is extended by the errors of sources that cannot be read; their settings are missing.
    """
    settings: dict[str, Any] = {}
    if args.trial is not None and args.study is None:
        faults.append(f"--trial {args.trial}: requires --study; name the folder of the study")
    if args.study is not None:
        with collect_errors(faults):
            settings = _settings_in(args.study, args.trial)
    if args.config is not None:
        with collect_errors(faults):
            settings = _merge_settings(settings, _read(args.config))
    settings = _merge_settings(settings, _parse_assignments(args.set, faults))
    own = {"train.epochs": args.epochs, "train.seed": args.seed}
    own["model.weights_dir"] = str(args.weights_dir.absolute()) if args.weights_dir else None
    return settings | {key: value for key, value in own.items() if value is not None}


def _settings_in(study: Location, trial: str | None) -> dict[str, Any]:
    """Read the settings of a study's trial, by default the best."""
    spec_of(study)
    with study.copy_here(SPEC, trial_file(ALL, PARAMS)) as folder:
        begun = trials_with(Folder(folder), PARAMS)
        trial_id = _best_trial(study) if trial is None else find_trial(trial, begun, study)
        return _read(folder / trial_file(trial_id, PARAMS))


def _best_trial(place: Location) -> str:
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.study.open_study import read_study

    with read_study(place) as study:
        return study.best_trial().trial_id


def run(args: argparse.Namespace) -> None:
    faults: list[str] = []
    request = _read_request(args, faults)
    settings, place, checked, progress = request.settings, request.place, request.config, request.progress
    _check_model(args, request, faults)
    before = progress.history[-1]["workers"] if progress is not None else 1
    count = args.workers or before
    if not args.resume:
        with collect_errors(faults):
            if place is None:
                args.results.check(write=True)
            else:
                place.check(write=True)
                refuse_taken(place)
    with collect_errors(faults):
        _check_machine(args, count)
    if args.data is not None or (place is not None and checked is not None):
        with collect_errors(faults):
            data = _data(args, settings, place)
    if faults:
        raise UserError(faults)
    assert place is not None
    assert checked is not None

    # Imported only now: it takes seconds.
    if args.address is None:
        refuse_broken_gpu(args.gpus_per_worker)
    elif not data.stores:
        from raytune_emotion.tuning.execution.cluster_nodes import check_fit
        from raytune_emotion.tuning.execution.placement import Demand

        check_fit(args.address, Demand(count, args.gpus_per_worker, concurrency=1))
    from raytune_emotion.learn.loop import batch_faults, check_same_run
    from raytune_emotion.learn.model import build_model
    from raytune_emotion.tuning.session.single_run import Workers, train_single

    store = prepare(
        data,
        image_size=settings.get("data.image_size"),
        classes=checked.data.classes if "data.classes" in settings else None,
        skip_bad=args.skip_bad,
    )
    of_store = {"data.image_size": store.image_size, "data.classes": store.classes}
    config = RunConfig.from_flat({**settings, **of_store})
    # Errors are raised before Ray is started, the folder is made, or a process at work there is ended.
    if not args.resume:
        build_model(config)
    elif progress is not None:
        with collect_errors(faults):
            check_same_run(config, store, place, progress)
        with collect_errors(faults):
            faults += batch_faults(config, len(store.train), count)
        if faults:
            raise UserError(faults)
    workers = Workers(count, args.gpus_per_worker, args.address)
    train_single(place, config, store, workers, fresh=not is_taken(place))


def _read_request(args: argparse.Namespace, faults: list[str]) -> _Request:
    """Read the settings of the run and find its place, as far as they are right.

    Args:
        args: the arguments.
        faults: is extended by the errors.
    """
    settings = settings_of(args, faults)
    place = None if args.name is None else args.results / args.name
    if faults:
        faults += _faults_alone(settings)
        return _Request(settings, place)
    if place is None:
        with collect_errors(faults):
            place = args.results / _default_name(settings)
        if place is None:
            return _Request(settings)
    progress: Progress | None = None
    if args.resume:
        own: dict[str, Any] | None = None
        with collect_errors(faults):
            own, progress = _read_run(place, args.results)
        if own is None:
            faults += _faults_alone(settings)
            return _Request(settings, place)
        settings = _merge_settings(own, settings)
    config: RunConfig | None = None
    with collect_errors(faults):
        config = RunConfig.from_flat(settings)
    return _Request(settings, place, config, progress)


def _faults_alone(settings: dict[str, Any]) -> list[str]:
    """List the errors of settings that are wrong whatever the others are, for the others cannot be read."""
    faults: list[str] = []
    for key, value in settings.items():
        if key not in SETTINGS:
            faults.append(unknown_setting(key))
        elif key != "model.backbone" or not isinstance(value, str):
            faults += [f"{key}: {sentence}" for sentence in read_value(key, value)[1].values()]
    return faults


def _check_model(args: argparse.Namespace, request: _Request, faults: list[str]) -> None:
    """Check the architecture, also beside other wrong settings, and that its pretrained weights are at hand."""
    named = request.settings.get("model.backbone") if request.config is None else request.config.model.backbone
    with collect_errors(faults):
        if isinstance(named, str):
            check_architecture(named)
        if request.config is None:
            return
        if args.weights_dir is not None and not request.config.model.pretrained:
            warn(f"--weights-dir {args.weights_dir}: model.pretrained is false, so training begins with random weights")
        if request.config.model.pretrained and not args.resume:
            # A resumed run has its weights in its folder.
            from raytune_emotion.learn.model import check_weights

            check_weights(request.config.model)


def _check_machine(args: argparse.Namespace, workers: int) -> None:
    """Check that the cluster or the GPU to train on exists.

    Raises:
        UserError: it does not.
    """
    refuse_absent_gpu(args.gpus_per_worker, args.address)
    if args.address is not None:
        from raytune_emotion.tuning.execution.cluster import check_cluster

        check_cluster(args.address)
    elif workers > 1 or args.gpus_per_worker:
        from raytune_emotion.tuning.execution.placement import Demand, fit_here

        fit_here(Demand(workers, args.gpus_per_worker, concurrency=1))


def _other_runs(results: Location) -> str:
    runs = subfolders_with(PARAMS, results)
    return f"; choose one of {', '.join(runs)}" if runs else "; name its folder with --results"


def _read_run(place: Location, results: Location) -> "tuple[dict[str, Any], Progress | None]":
    """Read the settings of a run to resume, and its state.

    The settings are those of its checkpoint or, before the first one, of its parameters.

    Raises:
        UserError: there is no such run, or it is damaged.
    """
    place.check(write=True)
    if place.read(PARAMS) is None:
        raise UserError(f"{place}: no run of this name to resume{_other_runs(results)}")
    from raytune_emotion.learn.checkpoint import read_progress

    with place.copy_here(LAST, PARAMS) as folder:
        progress = read_progress(folder)
        return progress.settings if progress is not None else _read(folder / PARAMS), progress


def _default_name(settings: dict[str, Any]) -> str:
    config = RunConfig.from_flat(settings)
    return f"{short_name(config.model.backbone)}_{config.loss.label}"


def _data(args: argparse.Namespace, settings: dict[str, Any], place: Location | None) -> Data:
    """Find the data to train on: the named data, else those of the run or the study, else the built-in sample."""
    if args.data is not None:
        return find_data(args.data)
    if args.resume:
        assert place is not None
        with place.work_here(DATA) as folder:
            before = data_of(folder)
        if before is None or not is_store(before):
            raise UserError(f"{before or place}: the packed data of the run are missing; name the data with --data")
        return find_data(before)
    if args.study is None:
        return find_data(sample_folder())
    size = settings.get("data.image_size", DataConfig().image_size)
    packed = spec_of(args.study).stores.get(size)
    if packed is None or not is_store(packed):
        raise UserError(f"{args.study}: the packed images of {size} px are missing; name the data with --data")
    return find_data(packed)


def _merge_settings(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Merge settings; the second ones win.

    If the second ones name a loss, all losses of the first are dropped. If they name a recipe, all augmentation of the
    first is dropped, because a file of all settings also contains the settings of its own recipe.
    """
    replaced: tuple[str, ...] = ("loss.",) if any(key.startswith("loss.") for key in more) else ()
    replaced += ("augment.",) if "augment.recipe" in more else ()
    return {key: value for key, value in settings.items() if not key.startswith(replaced)} | more


def _parse_assignments(assignments: list[str], faults: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not key or not equals:
            faults.append(f"--set {assignment}: expected KEY=VALUE, such as optim.lr=1e-3")
            continue
        try:
            settings[key] = load_yaml(text)
        except (YAMLError, ValueError) as error:
            faults.append(f"--set {assignment}: {text!r} is not a plain value ({str(error).splitlines()[0]})")
    return settings


def _read(file: Path) -> dict[str, Any]:
    try:
        values = load_yaml(read_text(file, "the file of settings"))
    except UserError:
        raise
    except (YAMLError, ValueError) as error:
        raise invalid_yaml(file, error) from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{file}: expected settings by dotted path, such as `optim.lr: 1e-3`")
    return values


if __name__ == "__main__":
    sys.exit(command_main("train"))
