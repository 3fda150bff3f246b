"""One configuration, without a search: also the final fit of a study's winner over many workers."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from raytune_emotion.__main__ import command_main
from raytune_emotion.config import RunConfig
from raytune_emotion.data.sample import sample_folder
from raytune_emotion.data.store import prepare
from raytune_emotion.errors import UserError
from raytune_emotion.learn.checkpoint import BEST, read_history
from raytune_emotion.learn.loop import baseline
from raytune_emotion.learn.model import check_backbone
from raytune_emotion.learn.package import export_checkpoint
from raytune_emotion.tuning.engine import fit_to_cluster, ray_session
from raytune_emotion.tuning.study import best_trial_id, trial_folder
from raytune_emotion.tuning.trial import PARAMS, Job, Resources, TrialFailed, train_here
from raytune_emotion.tuning.workers import MAX_FAILURES, train_together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="AffectNetFused folder or packed store (default: generated faces)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as optim.lr=1e-3; may be repeated")
    add("--config", type=Path, metavar="FILE", help="settings by dotted path, YAML or a trial's params.json")
    add("--study", type=Path, metavar="DIR", help="take the settings of a study's best trial, or of --trial")
    add("--trial", metavar="ID", help="a trial of --study")
    add("--epochs", type=int, metavar="N", help="the same as --set train.epochs=N")
    add("--seed", type=int, metavar="N", help="the same as --set train.seed=N")
    add("--workers", type=int, default=1, metavar="N", help="processes that train together (default: 1)")
    add("--gpus-per-worker", type=float, metavar="X", help="default: 1 where there are GPUs")
    add("--results", type=Path, default=Path("ray_results"), metavar="DIR", help="default: ray_results")
    add("--name", metavar="NAME", help="of the run (default: {backbone}_{loss})")
    add("--resume", action="store_true", help="go on with the run of that name")
    add("--weights-dir", type=Path, metavar="DIR", help="pretrained weights, for machines without a hub")
    add("--skip-bad", action="store_true", help="set faulty rows aside instead of refusing the data")
    add("--address", metavar="ADDRESS", help="of a running Ray cluster, for several workers (default: start Ray here)")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings asked for; what is said later in this order wins: study, file, --set, the options of their own."""
    settings: dict[str, Any] = {}
    if args.study is not None:
        settings |= _read(trial_folder(args.study, args.trial or best_trial_id(args.study)) / PARAMS)
    if args.config is not None:
        settings |= _read(args.config)
    for assignment in args.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: KEY=VALUE is wanted, such as optim.lr=1e-3")
        # A loss that is named weighs what is said, and those of the file no more.
        if key.startswith("loss.") and not any(a.startswith("loss.") for a in args.set[: args.set.index(assignment)]):
            settings = {k: v for k, v in settings.items() if not k.startswith("loss.")}
        settings[key] = YAML(typ="safe", pure=True).load(io.StringIO(value))
    own = {"train.epochs": args.epochs, "train.seed": args.seed}
    own["model.weights_dir"] = str(args.weights_dir.absolute()) if args.weights_dir else None
    return settings | {key: value for key, value in own.items() if value is not None}


def run(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    if args.workers < 1:
        raise UserError(f"--workers: at least 1, got {args.workers}")
    checked = RunConfig.from_flat(settings)
    check_backbone(checked.model.backbone)
    folder: Path = args.results.absolute() / (args.name or f"{checked.model.backbone}_{checked.loss.label}")
    if args.resume and not folder.exists():
        raise UserError(f"{folder}: there is no run of this name to resume")
    if folder.exists() and not args.resume:
        raise UserError(f"{folder}: there is a run of this name already; go on with it by --resume, or choose --name")
    store = prepare(
        args.data or sample_folder(),
        image_size=settings.get("data.image_size"),
        classes=checked.data.classes,
        skip_bad=args.skip_bad,
    )
    config = RunConfig.from_flat({**settings, "data.image_size": store.image_size})
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"run {folder}: {len(store.train)} training and {len(store.val)} validation images")
    if args.workers == 1:
        gpus = args.gpus_per_worker if args.gpus_per_worker is not None else float(torch.cuda.is_available())
        _train(console, folder, config, str(store.path), Resources(1, float(torch.get_num_threads()), gpus))
    else:
        with ray_session(args.address):
            place = fit_to_cluster(workers=args.workers, gpus_per_worker=args.gpus_per_worker, concurrency=1)
            _train(console, folder, config, str(store.path), place.resources)
    export_checkpoint(folder / BEST, folder / "best")
    mean = baseline(store)
    best = min(read_history(folder), key=lambda report: report["val_js"])
    console.print(
        f"""
best JS     {best["val_js"]:.4f} bits (KL {best["val_kl"]:.4f} nats, accuracy {best["val_accuracy"]:.3f})
baseline    {mean["js"]:.4f} bits, predicting the training mean
exported    {folder / "best"}

next: python -m raytune_emotion.predict {folder / "best"} FACE.jpg"""
    )


def _train(console: Console, folder: Path, config: RunConfig, store: str, resources: Resources) -> None:
    job = Job(folder.name, str(folder), store, config.flat(), resources)
    try:
        for report in train_here(job) if resources.workers == 1 else train_together(job, MAX_FAILURES):
            console.print(
                f"epoch {report['epoch']:5.2f}  train {report['train_loss']:.4f}  JS {report['val_js']:.4f}  "
                f"best {report['best_val_js']:.4f}  lr {report['lr']:.2g}  {report['images_per_second']:.0f} images/s"
            )
    except TrialFailed as error:
        raise UserError(f"{folder}: the training failed: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = YAML(typ="safe", pure=True).load(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except YAMLError as error:
        raise UserError(f"{file}: no valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: settings by dotted path are wanted, such as `optim.lr: 1e-3`")
    return values


if __name__ == "__main__":
    sys.exit(command_main("train"))
