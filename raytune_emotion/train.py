"""One configuration, without a search: also the final fit of a study's winner over many workers."""

import argparse
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from raytune_emotion.cli import command_main, gpu_share, local_path, location, plain_name, positive
from raytune_emotion.config import DataConfig, RunConfig
from raytune_emotion.data.cores import usable_cores
from raytune_emotion.data.prepare import Data, find_data, prepare
from raytune_emotion.data.store import Store, is_store
from raytune_emotion.data.synthetic import sample_folder
from raytune_emotion.errors import Breakdown, UserError, collecting
from raytune_emotion.interruption import finishing
from raytune_emotion.learn.checkpoint import BEST, HISTORY, LAST, read_history, read_progress
from raytune_emotion.learn.export_folder import export_checkpoint
from raytune_emotion.learn.loop import baseline
from raytune_emotion.learn.model import build_model, check_backbone, check_weights
from raytune_emotion.learn.report import Report
from raytune_emotion.storage.atomic import LOCK, exclusive_lock
from raytune_emotion.storage.locations import Folder
from raytune_emotion.terminal import plain_console, typed
from raytune_emotion.tuning.execution.cluster import check_cluster, ray_session
from raytune_emotion.tuning.execution.cluster_watch import ClusterLost, watched
from raytune_emotion.tuning.execution.job import (
    DATA,
    PARAMS,
    Job,
    Resources,
    TrialFailed,
    Unfit,
    train_here,
    with_retry,
)
from raytune_emotion.tuning.execution.placement import fit_to_cluster
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.records import opened, trial_folder
from raytune_emotion.tuning.study.spec import read_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=location,
        metavar="DIR",
        help="folder or packed store, as a path or URI (default: the study's data, or the built-in sample)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting, such as optim.lr=1e-3; may be repeated",
    )
    add("--config", type=local_path, metavar="FILE", help="file of settings: YAML, or the params.json of a trial")
    add("--study", type=location, metavar="DIR", help="study whose best trial (or --trial) gives the settings")
    add("--trial", metavar="ID", help="id of a trial of --study")
    add("--epochs", type=int, metavar="N", help="the same as --set train.epochs=N")
    add("--seed", type=int, metavar="N", help="the same as --set train.seed=N")
    add("--workers", type=positive, default=1, metavar="N", help="processes that train the model together (default: 1)")
    add(
        "--gpus-per-worker",
        type=gpu_share,
        metavar="X",
        help="GPUs per worker, 1 or a fraction (default: 1 if there are GPUs)",
    )
    add(
        "--results",
        type=local_path,
        default=Path("ray_results"),
        metavar="DIR",
        help="folder of the run's folder (default: ray_results)",
    )
    add("--name", type=plain_name, metavar="NAME", help="name of the run (default: {backbone}_{loss})")
    add("--resume", action="store_true", help="continue the run --name")
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
        help="address of a Ray cluster for several workers, or auto (default: start Ray on this machine)",
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the settings; a later source wins: study, file, --set, an option of its own.

    Raises:
        UserError: something cannot be read. Whether the settings are valid is not asked.
    """
    faults: list[str] = []
    settings: dict[str, Any] = {}
    if args.trial is not None and args.study is None:
        faults.append(f"--trial {args.trial}: of which study? name its folder with --study")
    if args.study is not None:
        files = (JOURNAL, f"trials/*/{HISTORY}", f"trials/{args.trial or '*'}/{PARAMS}")
        with collecting(faults), opened(args.study, *files) as study:
            settings = _read(trial_folder(study, args.trial or load(study).best_trial().trial_id) / PARAMS)
    if args.config is not None:
        with collecting(faults):
            settings = _over(settings, _read(args.config))
    with collecting(faults):
        settings = _over(settings, _assigned(args.set))
    if faults:
        raise UserError(faults)
    own = {"train.epochs": args.epochs, "train.seed": args.seed}
    own["model.weights_dir"] = str(args.weights_dir.absolute()) if args.weights_dir else None
    return settings | {key: value for key, value in own.items() if value is not None}


def run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    folder: Path = args.results.absolute() / (args.name or _default_name(settings))
    if args.resume:
        if not (folder / PARAMS).is_file():
            raise UserError(f"{folder}: there is no run of this name to resume")
        settings = _over(_kept(folder), settings)
    checked = RunConfig.from_flat(settings)
    faults: list[str] = []
    with collecting(faults):
        check_backbone(checked.model.backbone)
        if not args.resume:  # which has its weights from the run itself
            check_weights(checked.model)
    if not args.resume:
        with collecting(faults):
            if _is_taken(folder):
                raise UserError(
                    f"{folder}: there is a run of this name already; go on with it by --resume, or choose --name"
                )
            Folder(folder).check(write=True)
    if args.workers > 1:
        with collecting(faults):
            check_cluster(args.address)
    elif args.gpus_per_worker and not torch.cuda.is_available():
        faults.append(f"--gpus-per-worker {args.gpus_per_worker:g}: this machine has no GPU; leave it out")
    with collecting(faults):
        data = _data(args, settings, folder)
    if faults:
        raise UserError(faults)

    store = prepare(
        data, image_size=settings.get("data.image_size"), classes=checked.data.classes, skip_bad=args.skip_bad
    )
    config = RunConfig.from_flat({**settings, "data.image_size": store.image_size})
    if not args.resume:
        build_model(config)  # that it can be had shows here, and not where Ray and a folder wait for it
    console = plain_console()
    console.print(f"run {folder}: {len(store.train)} training and {len(store.val)} validation images")
    ended = None
    try:
        if args.workers == 1:
            gpus = args.gpus_per_worker if args.gpus_per_worker is not None else float(torch.cuda.is_available())
            resources = Resources(1, float(min(usable_cores(), torch.get_num_threads())), gpus)
            _train(console, folder, config, store.address, resources, train_here)
        else:
            _train_on_cluster(console, args, folder, config, store.address)
    except (KeyboardInterrupt, ClusterLost) as why:
        ended = why
    with finishing():
        _conclude(console, folder, store, ended, f" --workers {args.workers}" if args.workers > 1 else "")
    if ended is not None:
        raise ended


def _conclude(console: Console, folder: Path, store: Store, ended: BaseException | None, more: str) -> None:
    """Export the best until now, and say what to type next."""
    if ended is not None and not (folder / BEST).exists():
        console.print("the run ended before its first evaluation; nothing is kept of it")
        return
    export_checkpoint(folder / BEST, folder / "best")
    mean = baseline(store)
    best = min(read_history(folder), key=lambda report: report["val_js"])
    resume = f"python -m raytune_emotion.train --resume --results {typed(folder.parent)} --name {folder.name}{more}"
    console.print(
        f"""
best JS     {best["val_js"]:.4f} bits (KL {best["val_kl"]:.4f} nats, accuracy {best["val_accuracy"]:.3f})
baseline    {mean["js"]:.4f} bits, predicting the training mean
exported    {folder / "best"}

next: python -m raytune_emotion.predict {typed(folder / "best")} FACE.jpg"""
        + (f"\nto go on: {resume}" if ended is not None else "")
    )


def _train_on_cluster(console: Console, args: argparse.Namespace, folder: Path, config: RunConfig, store: str) -> None:
    # Imported for several workers alone: Ray Train takes a second and 100 MB.
    from raytune_emotion.tuning.execution.worker_group import train_together

    with ray_session(args.address) as cluster:
        place = fit_to_cluster(workers=args.workers, gpus_per_worker=args.gpus_per_worker, concurrency=1)
        _train(console, folder, config, store, place.resources, lambda job: watched(train_together(job), cluster))


def _train(
    console: Console,
    folder: Path,
    config: RunConfig,
    store: str,
    resources: Resources,
    train: Callable[[Job], Iterator[Report]],
) -> None:
    job = Job(folder.name, str(folder), store, config.flat(), resources)
    fresh = not _is_taken(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(folder):
            for report in with_retry(job, train):
                console.print(
                    f"epoch {report['epoch']:5.2f}  train {report['train_loss']:.4f}  JS {report['val_js']:.4f}  best "
                    f"{report['best_val_js']:.4f}  lr {report['lr']:.2g}  {report['images_per_second']:.0f} images/s"
                )
    except Unfit as error:
        raise UserError(error.faults) from None
    except TrialFailed as error:
        raise Breakdown(f"{folder}: the training failed: {error}") from None
    except OSError as error:
        raise Breakdown(f"{folder}: the training broke off: {error}") from error
    finally:
        if fresh and not (folder / LAST).exists():
            shutil.rmtree(folder)  # the name is free for another attempt


def _is_taken(folder: Path) -> bool:
    """Tell whether a run has the name; one that was killed before it wrote anything has not."""
    return os.path.lexists(folder) and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= {LOCK})


def _kept(folder: Path) -> dict[str, Any]:
    """Read the settings of a run that goes on: those of its checkpoint or, before the first, of its parameters."""
    progress = read_progress(folder)
    return progress.settings if progress is not None else _read(folder / PARAMS)


def _default_name(settings: dict[str, Any]) -> str:
    config = RunConfig.from_flat(settings)
    return f"{config.model.backbone}_{config.loss.label}"


def _data(args: argparse.Namespace, settings: dict[str, Any], folder: Path) -> Data:
    """Find what to train on: what is named, or what the run or the study had, or the built-in sample."""
    if args.data is not None:
        return find_data(args.data)
    if args.resume:
        before = (folder / DATA).read_text(encoding="utf-8").strip()
        if not is_store(before):
            raise UserError(f"{before}: the packed data of the run are gone; name the data with --data")
        return find_data(before)
    if args.study is None:
        return find_data(sample_folder())
    size = settings.get("data.image_size", DataConfig().image_size)
    with opened(args.study) as study:
        packed = read_spec(study).stores.get(size)
        if packed is None or not is_store(packed):
            raise UserError(f"{study}: its packed images of {size} px are not to be found; name the data with --data")
        return find_data(packed)


def _over(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Settings with others in their place. Where these name a loss, the losses are theirs alone."""
    if any(key.startswith("loss.") for key in more):
        settings = {key: value for key, value in settings.items() if not key.startswith("loss.")}
    return settings | more


def _assigned(assignments: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    faults: list[str] = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not key or not equals:
            faults.append(f"--set {assignment}: KEY=VALUE is wanted, such as optim.lr=1e-3")
            continue
        try:
            settings[key] = YAML(typ="safe", pure=True).load(io.StringIO(text))
        except (YAMLError, ValueError) as error:
            faults.append(f"--set {assignment}: {text!r} is no plain value ({str(error).splitlines()[0]})")
    if faults:
        raise UserError(faults)
    return settings


def _read(file: Path) -> dict[str, Any]:
    try:
        values = YAML(typ="safe", pure=True).load(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{file}: no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{file}: settings by dotted path are wanted, such as `optim.lr: 1e-3`")
    return values


if __name__ == "__main__":
    sys.exit(command_main("train"))
