"""A study on the full FER+ at 96 px: tf_efficientnet_lite0 from ImageNet weights and from scratch.

`python -m benchmarks ferplus DATA --weights-dir FOLDER` runs 64 trials of at most 8 epochs, as far as they get in ten
minutes, and then the best configuration with three fresh seeds. It reports JS, KL and accuracy on
PublicTest: the validation set of DATA, as `raytune_emotion.data.ferplus` writes it. Settings and epochs are chosen on
PublicTest, too. PrivateTest is not touched.
"""

import csv
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import Table
from benchmarks.__main__ import measure_in_folder, parser_of, run_timed

SPACE = Path(__file__).with_name("ferplus.yaml")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    data: str
    weights: str | None
    space: Path
    trials: int
    epochs: int
    seconds: float
    seeds: int


def study(plan: Plan, results: Path) -> Table:
    """Run the study and its confirmation, and sum up what their tables say."""
    command = [sys.executable, "-m", "raytune_emotion.search", "--data", plan.data, "--space", str(plan.space)]
    command += ["--weights-dir", plan.weights] if plan.weights is not None else []
    command += ["--trials", str(plan.trials), "--epochs", str(plan.epochs), "--time-budget", f"{plan.seconds:.0f}s"]
    command += ["--results", str(results), "--name", "ferplus"]
    command += ["--gpus-per-worker", "auto"] if torch.cuda.is_available() else []
    used: list[tuple[float, float]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(used, ended))
    watcher.start()
    try:
        code, took = run_timed(command)
    finally:
        ended.set()
        watcher.join()
    if not (results / "ferplus" / "trials.csv").exists():
        return Table(("what", "value"), [("exit code", code), ("seconds", took)], ["No trial has begun."])
    trials = _rows(results / "ferplus" / "trials.csv")
    ended_ones = [trial for trial in trials if trial["status"] in ("complete", "pruned")]
    rows: list[tuple[object, ...]] = [("exit code", code), ("seconds", took)]
    rows += [
        (f"trials {status}", sum(trial["status"] == status for trial in trials))
        for status in ("complete", "pruned", "failed", "paused", "running")
    ]
    rows.append(("trials per hour", 3600 * len(ended_ones) / took))
    for start, reported in _by_start(trials):
        rows.append((f"best JS from {start}, bits", float(reported[0]["best_val_js"])))
        rows += [(f"… its {name}", reported[0][name]) for name in ("epochs", "seconds", "val_kl", "val_accuracy")]
    rows += confirmed(plan, results / "ferplus")
    if used:
        rows.append(("GPU utilisation, mean %", sum(busy for busy, _ in used) / len(used)))
        rows.append(("GPU memory, most MiB", max(memory for _, memory in used)))
    return Table(("what", "value"), rows)


def confirmed(plan: Plan, folder: Path) -> list[tuple[object, ...]]:
    """Run the best configuration of the study with fresh seeds; return JS, KL and accuracy, mean and standard error."""
    command = [sys.executable, "-m", "raytune_emotion.confirm", str(folder), "--top", "1", "--seeds", str(plan.seeds)]
    code, took = run_timed(command)
    rows: list[tuple[object, ...]] = [("exit code of the confirmation", code), ("its seconds", took)]
    if code:
        return rows
    runs = [run for run in _rows(folder / "confirmed" / "trials.csv") if run["status"] == "complete"]
    for column, name in (("val_js", "JS, bits"), ("val_kl", "KL, nats"), ("val_accuracy", "accuracy")):
        values = [float(run[column]) for run in runs]
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        rows.append((f"{name} on PublicTest, {len(values)} fresh seeds", f"{statistics.fmean(values):.4f}{error}"))
    return rows


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _by_start(trials: list[dict[str, str]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the trials that have reported, best first, by what they started from."""
    reported = [trial for trial in trials if trial["best_val_js"]]
    if not reported or "model.pretrained" not in reported[0]:
        return [("the start of the space", reported)] if reported else []
    starts = {"True": "ImageNet weights", "False": "scratch"}
    found = [(name, [t for t in reported if t["model.pretrained"] == value]) for value, name in starts.items()]
    return [(name, those) for name, those in found if those]


def _watch(used: list[tuple[float, float]], ended: threading.Event) -> None:
    """Ask the driver every second how busy the GPU is."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    while not ended.wait(1):
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError):
            return
        percent, memory = first.split(",")
        used.append((float(percent), float(memory)))


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("ferplus", __doc__)
    add = parser.add_argument
    add("data", help="folder of FER+ in AffectNetFused's layout")
    add("--weights-dir", help="folder with tf_efficientnet_lite0.safetensors (default: the hub)")
    add("--space", type=Path, default=SPACE, help="another space, for a short run")
    add("--trials", type=int, default=64)
    add("--epochs", type=int, default=8)
    add("--seconds", type=float, default=600, help="of the search; the confirmation comes on top")
    add("--seeds", type=int, default=3)
    args = parser.parse_args(arguments)
    plan = Plan(args.data, args.weights_dir, args.space, args.trials, args.epochs, args.seconds, args.seeds)
    measure_in_folder("ferplus", arguments, lambda results: study(plan, results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
