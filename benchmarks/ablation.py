"""Measure the effect of each training setting, and of each use of several models, on faces that no choice has seen.

`python -m benchmarks ablation DATA --weights-dir FOLDER` trains one model repeatedly with one setting changed. The best
epoch of a run is chosen on one half of the validation set. The table has the JS on the other half, and the difference
to the unchanged model with the same seeds.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import Table
from benchmarks.__main__ import measure_in_folder, parser_of
from benchmarks.finishing import Floats, faces_folder, predict, score, split_validation

#: Settings of the unchanged model.
BASE: Mapping[str, object] = {
    "model.backbone": "tf_efficientnet_lite0",
    "model.pretrained": True,
    "model.dropout": 0.2,
    "loss.kl": 1,
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.05,
    "optim.schedule": "cosine",
    "optim.warmup_epochs": 0.3,
    "train.batch_size": 32,
    "train.grad_clip": 5,
    "augment.recipe": "light",
}
#: Changed settings by the name of the change.
CHANGES: Mapping[str, Mapping[str, object]] = {
    "unchanged": {},
    "from scratch": {"model.pretrained": False},
    "layer decay 0.8": {"optim.layer_decay": 0.8},
    "head alone in the first epoch": {"model.freeze_epochs": 1},
    "drop path 0.1": {"model.drop_path": 0.1},
    "average of the weights 0.98": {"train.ema_decay": 0.98},
    "smoothing 0.1": {"train.smoothing": 0.1},
    "balance 0.5": {"train.balance": 0.5},
    "no augmentation": {"augment.recipe": "none"},
    "strong augmentation": {"augment.recipe": "strong"},
    "random operations": {"augment.recipe": "random"},
}
UNCHANGED = next(iter(CHANGES))


@dataclass(frozen=True)
class Plan:
    """The parameters of the benchmark."""

    data: Path
    weights: Path | None
    epochs: int
    image_size: int
    seeds: Sequence[int]
    changes: Sequence[str]  # of `CHANGES`, with `UNCHANGED`
    at_once: int


def study(plan: Plan, work: Path) -> Iterator[Table]:
    """Train and measure every change with every seed."""
    faces = split_validation(plan.data, work)
    runs = [(name, seed) for seed in plan.seeds for name in plan.changes]
    with ThreadPoolExecutor(plan.at_once) as pool:
        exports = dict(zip(runs, pool.map(lambda run: _train(plan, faces.searched, work, *run), runs), strict=True))
        predicted = dict(zip(runs, pool.map(lambda run: predict(exports[run], faces.test), runs), strict=True))
    js = {name: np.array([score(predicted[name, seed], faces.targets) for seed in plan.seeds]) for name in plan.changes}
    js["predicted with the mirror image"] = np.array(
        [score(predict(exports[UNCHANGED, seed], faces.test, "--mirror"), faces.targets) for seed in plan.seeds]
    )
    rows = [_row(name, js_S, js[UNCHANGED]) for name, js_S in js.items()]
    together = mean_of([predicted[UNCHANGED, seed] for seed in plan.seeds])
    rows.append((f"mean prediction of the {len(plan.seeds)} seeds", score(together, faces.targets), None, None))
    note = f"JS in bits on {len(faces.targets)} faces of the test; {len(plan.seeds)} seeds."
    yield Table(("change", "JS", "difference", "standard error of it"), rows, [note])


def mean_of(predictions: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """Return the mean of several predictions of the same faces, by their ids."""
    return {face_id: np.mean([each[face_id] for each in predictions], axis=0) for face_id in predictions[0]}


def _row(name: str, js_S: Floats, plain_S: Floats) -> tuple[object, ...]:
    off_S = js_S - plain_S
    if not off_S.any():
        return name, float(js_S.mean()), None, None
    error = float(off_S.std(ddof=1) / len(off_S) ** 0.5) if len(off_S) > 1 else None
    return name, float(js_S.mean()), float(off_S.mean()), error


def _train(plan: Plan, data: Path, work: Path, name: str, seed: int) -> Path:
    run = f"{name.replace(' ', '-')}-{seed}"
    settings = {**BASE, "data.image_size": plan.image_size, **CHANGES[name]}
    command = [sys.executable, "-m", "raytune_emotion.train", "--data", str(data), "--epochs", str(plan.epochs)]
    command += ["--skip-bad", "--seed", str(seed), "--results", str(work), "--name", run]
    command += ["--weights-dir", str(plan.weights)] if plan.weights is not None else []
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    print(shlex.join(command), flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // plan.at_once))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return work / run / "best"


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("ablation", __doc__)
    add = parser.add_argument
    add("data", type=faces_folder, help="folder of faces in AffectNetFused's layout")
    add("--weights-dir", type=Path, help="folder with tf_efficientnet_lite0.safetensors (default: the hub)")
    add("--epochs", type=int, default=4)
    add("--image-size", type=int, default=96)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--changes", nargs="+", choices=[*CHANGES][1:], default=[*CHANGES][1:], help="(default: all)")
    add("--at-once", type=int, default=os.cpu_count() or 1, help="runs at the same time (default: one a core)")
    args = parser.parse_args(arguments)
    plan = Plan(
        args.data, args.weights_dir, args.epochs, args.image_size, args.seeds, [UNCHANGED, *args.changes], args.at_once
    )
    measure_in_folder("ablation", arguments, lambda work: study(plan, work))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
