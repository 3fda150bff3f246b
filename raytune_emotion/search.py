"""Search for the configuration that best predicts distributions over emotions: the main command."""

import argparse
import dataclasses
import json
import re
import sys
import types
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import optuna
import torch
from rich.console import Console

from raytune_emotion.cli import (
    collecting,
    command_main,
    gpu_share,
    local_path,
    location,
    natural,
    plain_name,
    positive,
)
from raytune_emotion.config import ModelConfig, RunConfig
from raytune_emotion.data.prepare import Data, find_data, prepare_sizes
from raytune_emotion.data.store import Store, is_store
from raytune_emotion.data.synthetic import sample_folder
from raytune_emotion.errors import UserError
from raytune_emotion.export import export_trial
from raytune_emotion.interruption import finishing
from raytune_emotion.learn.checkpoint import HISTORY
from raytune_emotion.learn.loop import baseline
from raytune_emotion.learn.model import WeightsUnavailableError, build_model, check_weights
from raytune_emotion.library import studies
from raytune_emotion.library.studies import Study
from raytune_emotion.storage.locations import Folder, Location, parse_location
from raytune_emotion.terminal import plain_console, plain_table, typed
from raytune_emotion.tuning.execution.cluster import check_cluster, ray_session
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
from raytune_emotion.tuning.execution.gpu_sharing import AUTO, fastest_share
from raytune_emotion.tuning.execution.placement import fit_to_cluster
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.policy.warm_start import EARLIER
from raytune_emotion.tuning.report.console import run_shown
from raytune_emotion.tuning.report.dry_run import costs
from raytune_emotion.tuning.report.page import FRONT, REPORT, front_rows, report_files, write_report
from raytune_emotion.tuning.space.library import DEFAULT, find_space, known_spaces
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space, draw
from raytune_emotion.tuning.study.earlier import gather_earlier
from raytune_emotion.tuning.study.endings import MAX_FAILURES
from raytune_emotion.tuning.study.open_study import OpenStudy, load, make_study, open_study, raise_epochs
from raytune_emotion.tuning.study.optuna_study import JOURNAL, Status, sole_driver
from raytune_emotion.tuning.study.records import winner
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, check_stores, created_at, read_spec

DEFAULT_SPACE = find_space(DEFAULT)
DEFAULT_TRIALS = 32
DEFAULT_EPOCHS = 20
_DRAWN = 10
_GENERATED = "generated faces"
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=location,
        metavar="DIR",
        help="AffectNetFused folder or packed store, as a path or URI (default: the built-in sample)",
    )
    add(
        "--space",
        type=_space_file,
        metavar="SPACE",
        help=f"search space: {', '.join(known_spaces())}, or a YAML file (default: {DEFAULT})",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        metavar="WHAT",
        help=f"objective: {', '.join(map(repr, OBJECTIVES))} (default: 'val_js')",
    )
    add("--trials", type=positive, metavar="N", help=f"total number of trials (default: {DEFAULT_TRIALS})")
    add(
        "--epochs",
        type=positive,
        metavar="N",
        help=f"epochs of a trial that is not stopped early (default: {DEFAULT_EPOCHS})",
    )
    add("--concurrency", type=positive, metavar="N", help="trials at the same time (default: as many as fit)")
    add("--workers-per-trial", type=positive, metavar="N", help="processes that train one trial together (default: 1)")
    add(
        "--gpus-per-worker",
        type=_gpu_share_or_auto,
        metavar="X",
        help=f"GPUs per worker: a fraction, 1, or {AUTO} for the fastest share (default: 1 if there are GPUs)",
    )
    add(
        "--results",
        type=location,
        default=Folder(Path("ray_results")),
        metavar="DIR",
        help="folder of the studies, or a URI such as s3://bucket/prefix (default: ray_results)",
    )
    add(
        "--warm-start",
        type=location,
        nargs="+",
        metavar="STUDY",
        help="earlier studies, of the same or other data, that guide the first trials",
    )
    add("--name", type=plain_name, metavar="NAME", help="name of the study (default: the space and the time)")
    add("--resume", action="store_true", help="continue the study --name; without a name, the newest study")
    add("--seed", type=natural, metavar="N", help="seed of proposals and trials (default: that of the space, else 0)")
    add(
        "--time-budget",
        type=_duration,
        metavar="T",
        help="stop after this time, such as 90m, 2h or 1d; --resume continues the study",
    )
    add(
        "--max-failures",
        type=natural,
        metavar="N",
        help=f"restarts of a trial whose process died (default: {MAX_FAILURES})",
    )
    add(
        "--weights-dir",
        type=local_path,
        metavar="DIR",
        help="folder of pretrained weights, for machines without access to the hub",
    )
    add("--skip-bad", action="store_true", help="leave bad rows out instead of refusing the data")
    add(
        "--address",
        metavar="ADDRESS",
        help="address of a running Ray cluster, or auto (default: start Ray on this machine)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="show the space, ten configurations and the training speed; start nothing",
    )


def run(args: argparse.Namespace) -> None:
    console = plain_console()
    if args.dry_run:
        _preview(console, args)
        return
    # Until all is written, the study's folder is this process's alone.
    with ExitStack() as held:
        place = _location(args)
        folder = place.working_folder()
        auto = args.gpus_per_worker == AUTO
        if auto:
            args.gpus_per_worker = None  # until it is known
        study = _open_existing(args, place, held) if args.resume else None
        spec, earlier = (_resumed(args, study), None) if study else _new(args, place)
        begun, ended = False, None
        try:
            with ray_session(args.address) as cluster:
                if auto:
                    gpus_per_worker, seen = fastest_share(spec)
                    console.print(seen)
                    spec = dataclasses.replace(spec, gpus_per_worker=gpus_per_worker)
                placement = fit_to_cluster(
                    workers=spec.workers_per_trial, gpus_per_worker=spec.gpus_per_worker, concurrency=spec.concurrency
                )
                if study is None:
                    place.free_working_folder()
                    make_study(folder, spec, earlier)
                    study = held.enter_context(open_study(folder, place))
                else:
                    study = (raise_epochs if spec.epochs > study.spec.epochs else OpenStudy.with_spec)(study, spec)
                trials = f"{study.spec.trials} trials of {spec.epochs} epochs"
                console.print(f"study {place}: {trials}, {placement}")
                begun = True
                run_shown(console, study, placement, time_budget=args.time_budget, failure=cluster.failure)
        except (KeyboardInterrupt, ClusterLost) as why:
            if not begun:
                raise
            ended = why
        assert study is not None
        with finishing():
            _conclude(console, study, args.results)
        if ended is not None:
            raise ended


def _preview(console: Console, args: argparse.Namespace) -> None:
    """Shows what a study would choose from, and what its trials would cost with as many threads as this process has."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    faults: list[str] = []
    with collecting(faults):
        space = _space(args.space or DEFAULT_SPACE, args)
    with collecting(faults):
        data = find_data(args.data or sample_folder())
    if faults:
        raise UserError(faults)
    rows, sizes = data.count_rows(), _sizes(data, space)
    _check_backbones(space, sizes)

    settings = plain_table("setting", "is", title="the space")
    for key, value in space.to_dict().items():
        if key != "start":
            settings.add_row(key, json.dumps(value, ensure_ascii=False))
    console.print(settings)
    console.print("ten of its configurations\n")
    for configuration in draw(space, _DRAWN, space.fixed.get("train.seed", 0)):
        named = ((key.rpartition(".")[2], configuration[key]) for key in space.columns() if key in configuration)
        console.print("  ".join(f"{name} {_short(value)}" for name, value in named))
    console.print()
    epochs, trials = space.fixed["train.epochs"], args.trials or DEFAULT_TRIALS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    headings = ("backbone", "px", "parameters, millions", "images/s", "minutes a trial")
    cost = plain_table(*headings, title=f"training on this machine ({device})")
    minutes = []
    for each in costs(space, sizes, device):
        minutes.append(rows * epochs / each.images_per_second / 60)
        rate = f"{each.images_per_second:.0f}"
        cost.add_row(each.backbone, str(each.image_size), f"{each.params_millions:.2f}", rate, f"{minutes[-1]:.1f}")
    console.print(cost)
    mean = sum(minutes) / len(minutes)
    hours = trials * mean / 60
    console.print(
        f"{trials} trials of {epochs} epochs on {rows} images: {hours:.1f} hours of this device if none is stopped and "
        f"all backbones are drawn alike"
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _new(args: argparse.Namespace, place: Location) -> tuple[StudySpec, str | None]:
    """Make the spec of a new study, with its data packed, and gather what earlier studies have shown."""
    path = args.space or DEFAULT_SPACE
    faults: list[str] = []
    with collecting(faults):
        args.results.check(write=True)
        if place.exists():
            raise UserError(
                f"{place}: there is a study of this name already; go on with it by --resume, or choose another"
            )
    with collecting(faults):
        check_cluster(args.address)
    with collecting(faults):
        space = _space(path, args)
    if args.data:
        with collecting(faults):
            data = find_data(args.data)
    with collecting(faults):
        earlier = gather_earlier(args.warm_start) if args.warm_start else None
    if faults:
        raise UserError(faults)

    if not args.data:
        data = find_data(sample_folder())
    _check_backbones(space, _sizes(data, space))
    stores = _stores(data, space, skip_bad=args.skip_bad)
    first = next(iter(stores.values()))
    spec = StudySpec(
        name=place.name,
        seed=space.fixed.get("train.seed", 0),
        objective=args.objective or "val_js",
        trials=args.trials or DEFAULT_TRIALS,
        epochs=space.fixed["train.epochs"],
        concurrency=args.concurrency,
        workers_per_trial=args.workers_per_trial or 1,
        gpus_per_worker=args.gpus_per_worker,
        max_failures=MAX_FAILURES if args.max_failures is None else args.max_failures,
        data=args.data.address if args.data else _GENERATED,
        stores={size: store.address for size, store in stores.items()},
        fingerprints={size: store.fingerprint for size, store in stores.items()},
        classes=first.classes,
        weights_dir=space.fixed.get("model.weights_dir"),
        space=space.to_dict(),
        baseline=baseline(first),
    )
    return spec, earlier


def _space(path: Path, args: argparse.Namespace) -> Space:
    """The space of a new study, with what the command line says of it."""
    given = {
        "train.epochs": args.epochs,
        "train.seed": args.seed,
        "model.weights_dir": _absolute(args.weights_dir),
    }
    given = {key: value for key, value in given.items() if value is not None}
    fixed = load_space(path, overrides=given).fixed
    settled: dict[str, Any] = {"train.epochs": fixed.get("train.epochs", DEFAULT_EPOCHS)}
    if "train.seed" in fixed:
        settled["train.seed"] = fixed["train.seed"]
    if fixed.get("model.weights_dir") is not None:
        # Trials run in other folders than this one.
        settled["model.weights_dir"] = _absolute(Path(fixed["model.weights_dir"]))
    return load_space(path, overrides=settled)


def _absolute(path: Path | None) -> str | None:
    return str(path.expanduser().absolute()) if path is not None else None


def _location(args: argparse.Namespace) -> Location:
    """Return where the study lies: a new one's place, or that of one that goes on.

    Raises:
        UserError: there is no such study to go on with; the place cannot be read.
    """
    results: Location = args.results
    if not args.resume:
        path = args.space or DEFAULT_SPACE
        return results / (args.name or f"{path.stem}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    results.check(write=True)
    name = args.name or results.newest(SPEC)
    if name is None:
        raise UserError(f"{results}: there is no study in it to resume; name its folder with --results")
    study = results / name
    if study.read(SPEC) is None:
        what = f"no {SPEC} in it, so it is no study" if study.exists() else "there is no study of this name to resume"
        raise UserError(f"{study}: {what}; name its folder with --results")
    return study


def _open_existing(args: argparse.Namespace, place: Location, held: ExitStack) -> OpenStudy:
    """Load the study that goes on; its folder is this process's alone until `held` ends.

    The folder is brought up to date first: another machine may have gone on with the study. What it holds of another
    study of the same name is kept elsewhere.
    """
    folder = place.working_folder()
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(sole_driver(folder))
    if created_at(place.read(SPEC)) != created_at(Folder(folder).read(SPEC)):
        place.set_aside_copy()
    place.check_out(SPEC, JOURNAL, EARLIER, f"trials/*/{HISTORY}")
    spec = read_spec(folder)
    if spec.confirms is not None:
        raise UserError(
            f"{place}: is a confirmation; go on with it by `python -m raytune_emotion.confirm {folder.parent}`"
        )
    if args.data is None and not all(is_store(path) for path in spec.stores.values()):
        # They were packed on another machine; the data may be here too.
        data = Folder(sample_folder()) if spec.data == _GENERATED else parse_location(spec.data)
        with suppress(UserError):
            find_data(data)
            args.data = data
    return load(folder, place)


def _resumed(args: argparse.Namespace, study: OpenStudy) -> StudySpec:
    """Return the spec of a study that goes on: what it is stays; how much of it, and where it runs, may change.

    All of it is looked at before Ray is started.
    """
    spec, space = study.spec, study.space
    faults = [
        f"--{name}: a study keeps the {name} that it began with; leave it out, or begin a new study under another name"
        for name, value in (
            ("space", args.space),
            ("objective", args.objective),
            ("seed", args.seed),
            ("warm-start", args.warm_start),
        )
        if value is not None
    ]
    if args.epochs is not None and args.epochs < spec.epochs:
        faults.append(f"--epochs: may be raised when a study goes on, not lowered (it has {spec.epochs})")
    with collecting(faults):
        check_cluster(args.address)
    stores = spec.stores
    if args.data is not None:
        with collecting(faults):
            moved = _stores(find_data(args.data), space, skip_bad=args.skip_bad)
            stores = {size: store.address for size, store in moved.items()}
            if {size: store.fingerprint for size, store in moved.items()} != spec.fingerprints:
                faults.append(f"{args.data}: other data than the study began with; its trials could not be compared")
    else:
        with collecting(faults):
            check_stores(spec, "name the data with --data")
    for model in _models(space, _absolute(args.weights_dir) or spec.weights_dir):
        with collecting(faults):
            check_weights(model)
    if faults:
        raise UserError(faults)
    given = {
        "trials": args.trials,
        "epochs": args.epochs,
        "concurrency": args.concurrency,
        "workers_per_trial": args.workers_per_trial,
        "gpus_per_worker": args.gpus_per_worker,
        "max_failures": args.max_failures,
        "weights_dir": _absolute(args.weights_dir),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(spec, stores=stores, **given)


def _stores(data: Data, space: Space, *, skip_bad: bool) -> dict[int, Store]:
    """The packed store for each image size of a space; its own size where the space names none."""
    classes = space.possible("data.classes")
    options = {"classes": tuple(classes[0])} if classes else {}
    return prepare_sizes(data, _sizes(data, space), skip_bad=skip_bad, **options)


def _sizes(data: Data, space: Space) -> tuple[int, ...]:
    """The image sizes of a space; those of the data where it names none."""
    return space.possible("data.image_size") or (data.own_size(),)


def _check_backbones(space: Space, sizes: Sequence[int]) -> None:
    """Builds every backbone at every size once: a trial must not be where it shows that one cannot be had."""
    faults: list[str] = []
    for model in _models(space, space.fixed.get("model.weights_dir")):
        for size in sizes:
            data = dataclasses.replace(RunConfig().data, image_size=size)
            try:
                build_model(dataclasses.replace(RunConfig(), model=model, data=data))
            except UserError as error:
                faults += error.faults
                if isinstance(error, WeightsUnavailableError):
                    # To try others, too, could take a minute each.
                    raise UserError(dict.fromkeys(faults)) from None
    if faults:
        raise UserError(dict.fromkeys(faults))


def _models(space: Space, weights_dir: str | None) -> list[ModelConfig]:
    """One of each backbone of a space, with pretrained weights where a trial may have them."""
    backbones = space.possible("model.backbone") or (ModelConfig().backbone,)
    pretrained = any(space.possible("model.pretrained") or (weights_dir is not None,))
    return [ModelConfig(backbone=name, pretrained=pretrained, weights_dir=weights_dir) for name in backbones]


def _conclude(console: Console, study: OpenStudy, results: Location) -> None:
    """Export the best trial, and say what came out and what to type next."""
    folder, place, spec, records = study.folder, study.copy.location, study.spec, study.records()
    counts = {status: sum(r.status == status for r in records) for status in get_args(Status)}
    best = winner(records)
    write_report(folder, spec, records)
    if best is not None:
        export_trial(place, Folder(folder / "best"), best.trial_id)
    exported = [str(file.relative_to(folder)) for file in folder.glob("best/*")]
    place.push(folder, [*report_files(folder), *exported])
    console.print(", ".join(f"{n} {status}" for status, n in counts.items() if n))
    if best is None or best.best is None:
        console.print("no trial has reported yet, or those that have failed")
        return
    objective = OBJECTIVES[spec.objective]
    if objective.front:
        front = plain_table(*FRONT, title=f"no {objective.cheaper} model has bettered")
        for row in front_rows(records, objective):
            front.add_row(*row)
        console.print(front)
    resume = f"--resume --results {typed(str(results))} --name {place.name}"
    if len(records) >= spec.trials and not counts["running"]:
        resume += f" --trials {2 * spec.trials}"
    console.print(
        f"""
best JS     {best.best["val_js"]:.4f} bits, trial {best.trial_id} ({len(records)} trials)
baseline    {spec.baseline["js"]:.4f} bits, predicting the training mean
exported    {place / "best"}
page        {place / REPORT}

next:
  python -m raytune_emotion.predict {typed(str(place / "best"))} FACE.jpg
  tensorboard --logdir {typed(str(place / "trials"))}
  python -m raytune_emotion.search {resume}"""
    )


def _gpu_share_or_auto(text: str) -> float | str:
    return AUTO if text == AUTO else gpu_share(text)


def _space_file(text: str) -> Path:
    try:
        return find_space(str(local_path(text)))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--space ")) from None


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    try:
        length = timedelta(**{_UNITS[found[2]]: float(found[1])}) if found else timedelta()
    except OverflowError:
        length = timedelta()
    if not length:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 2h or 1d, got {text!r}")
    return length


class _CallableModule(types.ModuleType):
    """Let `from raytune_emotion import search` be a function: this module shares its name with that of the library."""

    def __call__(self, *args: Any, **options: Any) -> Study:
        return studies.search(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
sys.modules[__name__].__doc__ = studies.search.__doc__

if __name__ == "__main__":
    sys.exit(command_main("search"))
