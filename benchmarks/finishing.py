"""What a study finds, and what finishing it brings, on faces that no choice has seen.

`python -m benchmarks finishing DATA --seeds 0 1 2` splits the validation set of DATA once, by a hash of the ids: one
half takes the place of the validation set, and the models of each study predict the other half, the test.
With `--ensemble K` the study is not finished; its best trial stands beside an ensemble of K trials.
"""

import csv
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import Table
from benchmarks.__main__ import measure_in_folder, parser_of, run_timed
from raytune_emotion import MetricsCalculator
from raytune_emotion.data.affectnet import parse_annotation

_ANNOTATION = "_prob_rank.txt"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    data: Path
    weights: Path | None
    space: str
    trials: int
    epochs: int
    seconds: float
    seeds: Sequence[int]
    ensemble: int | None


def is_test(face_id: str) -> bool:
    """Say whether a face of the validation set belongs to the test; the halves differ from those of `half_of`."""
    return hashlib.sha256(f"test {face_id}".encode()).digest()[0] < 128


def split_validation(data: Path, dest: Path) -> tuple[Path, Path]:
    """Link a dataset into `dest`, its validation set in two; return the folder to search on and that of the test."""
    searched, test = dest / "faces", dest / "test"
    shutil.copytree(data / "train_set", searched / "train_set", copy_function=_link)
    for kind in ("images", "annotations"):
        for file in sorted((data / "val_set" / kind).iterdir()):
            root = test if is_test(file.name.removesuffix(_ANNOTATION).split(".")[0]) else searched / "val_set"
            (root / kind).mkdir(parents=True, exist_ok=True)
            _link(file, root / kind / file.name)
    return searched, test


def _link(source: str | Path, dest: str | Path) -> None:
    try:
        os.link(source, dest)
    except OSError:  # another file system
        shutil.copyfile(source, dest)


def predict(export: Path, test: Path, *options: str) -> dict[str, Floats]:
    """Return what an export predicts of the test: the probabilities of each face, [K], by its id."""
    command = [sys.executable, "-m", "raytune_emotion.predict", str(export), str(test / "images"), *options]
    table = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    _, *rows = csv.reader(table.splitlines())
    return {Path(image).stem: np.array(values, float) for image, *values in rows}


def score(predicted: Mapping[str, Floats], annotations: Path) -> float:
    """Return the mean JS, in bits, of the probabilities that are predicted of each face, [K], by its id.

    Raises:
        ValueError: there is no prediction of an annotated face, or the reverse.
    """
    targets = {file.name.removesuffix(_ANNOTATION): file.read_bytes() for file in annotations.iterdir()}
    if targets.keys() != predicted.keys():
        raise ValueError(f"{annotations}: not the faces that were predicted")
    ids = sorted(targets)
    prob_NK = np.array([predicted[face_id] for face_id in ids])
    target_NK = np.array([parse_annotation(targets[face_id]) for face_id in ids])
    return MetricsCalculator(["js"]).compute_all(prob_NK, target_NK)["js"]


def study(plan: Plan, work: Path) -> Table:
    """Run a study per seed, and measure its best trial and what was made of it."""
    searched, test = split_validation(plan.data, work)
    rows: list[tuple[object, ...]] = []
    for seed in plan.seeds:
        name = f"seed{seed}"
        command = ["raytune_emotion.search", "--data", str(searched), "--space", plan.space, "--seed", str(seed)]
        command += ["--trials", str(plan.trials), "--epochs", str(plan.epochs)]
        command += ["--time-budget", f"{plan.seconds:.0f}s", "--results", str(work), "--name", name]
        # The portfolio may have been recorded on the same faces.
        command += ["--warm-start", "none"]
        command += ["--weights-dir", str(plan.weights)] if plan.weights is not None else []
        folder = work / name
        if plan.ensemble is None:
            seconds, better = _run([*command, "--finish"]), folder / "finished"
        else:
            better = work / f"ensemble{seed}"
            combine = ["raytune_emotion.export", str(folder), str(better), "--ensemble", str(plan.ensemble)]
            seconds = _run(command) + _run([*combine, "--format", "pt2"])
        rows.append((seed, _measure_js(folder / "best", test), _measure_js(better, test), seconds / 60))
        print(rows[-1], flush=True)
    made = "finished" if plan.ensemble is None else f"ensemble of {plan.ensemble}"
    columns = ("seed", "best trial of the search, JS", f"{made}, JS", "minutes in all")
    means = [statistics.fmean(float(str(row[column])) for row in rows) for column in range(1, 4)]
    faces = sum(1 for _ in (test / "images").iterdir())
    return Table(columns, [*rows, ("mean", *means)], [f"JS in bits on {faces} faces of the test."])


def _measure_js(export: Path, test: Path) -> float:
    return score(predict(export, test), test / "annotations")


def _run(module: Sequence[str]) -> float:
    """Run a command; return the seconds it took.

    Raises:
        SystemExit: it failed.
    """
    code, seconds = run_timed([sys.executable, "-m", *module])
    if code:
        raise SystemExit(code)
    return seconds


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("finishing", __doc__)
    add = parser.add_argument
    add("data", type=Path, help="folder of faces in AffectNetFused's layout")
    add("--weights-dir", type=Path, help="folder of starting weights (default: the hub)")
    add("--space", default=str(Path(__file__).with_name("finishing.yaml")))
    add("--trials", type=int, default=200, help="at most")
    add("--epochs", type=int, default=6)
    add("--seconds", type=float, default=2700, help="of each search; finishing comes on top")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--ensemble", type=int, metavar="K", help="of K trials, in place of finishing")
    args = parser.parse_args(arguments)
    plan = Plan(
        args.data, args.weights_dir, args.space, args.trials, args.epochs, args.seconds, args.seeds, args.ensemble
    )
    measure_in_folder("finishing", arguments, lambda work: study(plan, work))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
