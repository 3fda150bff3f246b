"""A study on the full FER+ at 96 px: tf_efficientnet_lite0 from ImageNet weights and from scratch.

`python -m benchmarks ferplus DATA --weights-dir FOLDER --seconds N` takes about N seconds. In the first half, or
another share, it runs 64 trials of at most 8 epochs, as far as they get. In the rest it trains the best configuration
with three fresh seeds. A run whose time is over ends with the epochs that it has.

It reports JS, KL and accuracy on PublicTest: the validation set of DATA, as `raytune_emotion.data.ferplus` writes it.
PublicTest is split once, by a hash of the ids. Settings and epochs are chosen on one half, and the numbers of the other
half, which has chosen nothing, stand beside those of all. PrivateTest is not touched.
"""

import contextlib
import csv
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import Table
from benchmarks.__main__ import measure_in_folder, parser_of, run_timed
from benchmarks.finishing import Faces, faces_folder, predict, score, split_validation
from raytune_emotion.data.affectnet import SPLITS
from raytune_emotion.learn.run_folder import HISTORY, read_history
from raytune_emotion.storage.yaml_text import load_yaml
from raytune_emotion.tuning.study.spec import SPEC

SPACE = Path(__file__).with_name("ferplus.yaml")
_NAME = "ferplus"
_COLUMNS = ("what", "value")
#: Of the whole time, that of the search by default; and of the time of a final run, that of its training. The rest
#: predicts.
_SEARCH, _TRAINING = 0.5, 0.8
#: Of the whole time, what a search may take beyond its own before it is asked to end.
_BEYOND = 0.3
#: What is reported of the final runs, by metric.
_METRICS = {"js": "JS, bits", "kl": "KL, nats", "accuracy": "accuracy"}
#: On which faces.
_ALL, _UNSEEN = "PublicTest", "the half of PublicTest that chose nothing"

Row = tuple[object, ...]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    data: Path
    weights: str | None
    space: Path
    trials: int
    epochs: int
    seconds: float
    seeds: int
    gpus: str
    search: float = _SEARCH  # share of the seconds


def study(plan: Plan, work: Path) -> Iterator[Table]:
    """Run the study and the final runs, and yield a table after each of them."""
    until = time.monotonic() + plan.seconds
    faces = split_validation(plan.data, work)
    rows = _search(plan, faces, work)
    n_all = len(faces.searched_targets) + len(faces.targets)
    notes = [f"{n_all} faces in {_ALL}, {len(faces.targets)} in {_UNSEEN}."]
    if not _reported(work):
        yield Table(_COLUMNS, rows, [*notes, "No trial has reported."])
        return
    yield Table(_COLUMNS, [*rows], [*notes])
    found: list[Mapping[str, Mapping[str, float]]] = []
    for number in range(plan.seeds):
        run, seconds = work / f"seed{number + 1}", (until - time.monotonic()) / (plan.seeds - number)
        ending = _train(plan, work, run, seconds * _TRAINING)
        if (run / "best").is_dir():
            rows.append((f"epochs of {run.name}", read_history(run)[-1]["epoch"]))
            found.append(_measure(run / "best", faces))
        else:
            notes.append(f"{run.name} has nothing to show: {ending}.")
        yield Table(_COLUMNS, [*rows, *_summary(found)], [*notes])


def _search(plan: Plan, faces: Faces, work: Path) -> list[Row]:
    """Run the search, and sum up what its table says."""
    command = [sys.executable, "-m", "raytune_emotion.search", "--data", str(faces.searched), "--skip-bad"]
    command += ["--space", str(plan.space), "--trials", str(plan.trials), "--epochs", str(plan.epochs)]
    command += ["--weights-dir", plan.weights] if plan.weights is not None else []
    command += ["--time-budget", f"{plan.seconds * plan.search:.0f}s", "--results", str(work), "--name", _NAME]
    # The portfolio may have been recorded on the same faces.
    command += ["--warm-start", "none"]
    command += ["--gpus-per-worker", plan.gpus] if torch.cuda.is_available() else []
    used: list[tuple[float, float]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(work, used, ended))
    watcher.start()
    try:
        code, took = run_timed(command, plan.seconds * (plan.search + _BEYOND))
    finally:
        ended.set()
        watcher.join()
    trials = _trials(work)
    rows: list[Row] = [("exit code", code), ("seconds", took)]
    rows += [
        (f"trials {status}", sum(trial["status"] == status for trial in trials))
        for status in ("complete", "pruned", "failed", "paused", "running")
    ]
    n_ended = sum(trial["status"] in ("complete", "pruned") for trial in trials)
    rows.append(("trials per hour", 3600 * n_ended / took))
    rows += [("GPUs per trial", share) for share in _share(work)]
    for start, reported in _by_start(_reported(work)):
        rows.append((f"best JS from {start}, bits", float(reported[0]["best_val_js"])))
        rows += [(f"… its {name}", reported[0][name]) for name in ("epochs", "seconds", "val_kl", "val_accuracy")]
    if used:
        rows.append(("GPU utilisation from the first report on, mean %", sum(busy for busy, _ in used) / len(used)))
        rows.append(("GPU memory, most MiB", max(memory for _, memory in used)))
    return rows


def _train(plan: Plan, work: Path, run: Path, seconds: float) -> str:
    """Train the best configuration of the study with the seed of a run; return how that ended."""
    if seconds <= 0:
        return "no time was left"
    command = [sys.executable, "-m", "raytune_emotion.train", "--study", str(work / _NAME)]
    command += ["--seed", run.name.removeprefix("seed"), "--results", str(work), "--name", run.name]
    command += ["--weights-dir", plan.weights] if plan.weights is not None else []
    code, took = run_timed(command, seconds)
    return f"it ended with exit code {code} after {took:.0f} s"


def _measure(export: Path, faces: Faces) -> dict[str, dict[str, float]]:
    """Return the metrics of an export by the faces that they are of, and by name."""
    targets = {**faces.searched_targets, **faces.targets}
    predicted = predict(export, faces.searched / SPLITS["val"] / "images", faces.test)
    unseen = {face_id: predicted[face_id] for face_id in faces.targets}
    return {
        _ALL: {name: score(predicted, targets, name) for name in _METRICS},
        _UNSEEN: {name: score(unseen, faces.targets, name) for name in _METRICS},
    }


def _summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Row]:
    """Sum up the metrics of final runs: mean and standard error."""
    rows: list[Row] = []
    for faces in (_ALL, _UNSEEN) if found else ():
        for metric, name in _METRICS.items():
            values = [metrics[faces][metric] for metrics in found]
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
            rows.append((f"{name} on {faces}, {len(values)} fresh seeds", f"{statistics.fmean(values):.4f}{error}"))
    return rows


def _trials(work: Path) -> list[dict[str, str]]:
    """Read the table of the study's trials, the best first; none where it has not come so far."""
    file = work / _NAME / "trials.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _share(work: Path) -> list[float]:
    """Return the share of a GPU that each trial had, which `auto` may have chosen; empty without a GPU."""
    file = work / _NAME / SPEC
    share = load_yaml(file.read_text(encoding="utf-8")).get("gpus_per_worker") if file.exists() else None
    return [share] if share else []


def _reported(work: Path) -> list[dict[str, str]]:
    return [trial for trial in _trials(work) if trial["best_val_js"]]


def _by_start(reported: list[dict[str, str]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the trials that have reported, best first, by what they started from."""
    if not reported or "model.pretrained" not in reported[0]:
        return [("the start of the space", reported)] if reported else []
    starts = {"True": "ImageNet weights", "False": "scratch"}
    found = [(name, [t for t in reported if t["model.pretrained"] == value]) for value, name in starts.items()]
    return [(name, those) for name, those in found if those]


def _watch(work: Path, used: list[tuple[float, float]], ended: threading.Event) -> None:
    """Ask the driver every second how busy the GPU is, from the study's first report on."""
    # The first GPU that this process sees.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    reported = False
    while not ended.wait(1):
        reported = reported or any((work / _NAME).glob(f"**/{HISTORY}"))
        if not reported:
            continue
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return
        with contextlib.suppress(ValueError):  # "[N/A]"
            percent, memory = map(float, answer.split(","))
            used.append((percent, memory))


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("ferplus", __doc__)
    add = parser.add_argument
    add("data", type=faces_folder, help="folder of FER+ in AffectNetFused's layout")
    add("--weights-dir", help="folder with tf_efficientnet_lite0.safetensors (default: the hub)")
    add("--space", type=Path, default=SPACE, help="another space, for a short run")
    add("--trials", type=int, default=64)
    add("--epochs", type=int, default=8)
    add("--seconds", type=float, default=600, help="of the whole")
    add("--search-share", type=float, default=_SEARCH, help="of the seconds, for the search (default: %(default)s)")
    add("--seeds", type=int, default=3, help="of the final runs")
    add("--gpus-per-worker", default="auto", help="of a trial of the search, if there is a GPU (default: %(default)s)")
    args = parser.parse_args(arguments)
    plan = Plan(
        args.data,
        args.weights_dir,
        args.space,
        args.trials,
        args.epochs,
        args.seconds,
        args.seeds,
        args.gpus_per_worker,
        args.search_share,
    )
    measure_in_folder("ferplus", arguments, lambda work: study(plan, work))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
