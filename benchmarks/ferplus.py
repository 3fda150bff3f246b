"""A study on the full FER+ at 96 px: tf_efficientnet_lite0 from ImageNet weights and from scratch.

`python -m benchmarks.ferplus DATA --weights-dir FOLDER --seconds N` runs 64 trials of at most 8 epochs, as far as they
get in that time, and sums up the study's tables.
"""

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks import Table
from benchmarks.__main__ import measure

SPACE = Path(__file__).with_name("ferplus.yaml")


def study(data: str, weights: str, seconds: float, results: Path) -> Table:
    """Run the study, and sum up what its tables say."""
    command = [sys.executable, "-m", "raytune_emotion.search", "--data", data, "--space", str(SPACE)]
    command += ["--weights-dir", weights, "--trials", "64", "--epochs", "8", "--time-budget", f"{seconds:.0f}s"]
    command += ["--results", str(results), "--name", "ferplus"]
    command += ["--gpus-per-worker", "auto"] if torch.cuda.is_available() else []
    print(shlex.join(command), flush=True)
    used: list[tuple[float, float]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(used, ended))
    watcher.start()
    began = time.monotonic()
    try:
        code = subprocess.run(command).returncode
    finally:
        ended.set()
        watcher.join()
    took = time.monotonic() - began
    with (results / "ferplus" / "trials.csv").open(encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    ended_ones = [trial for trial in trials if trial["status"] in ("complete", "pruned")]
    rows: list[tuple[object, ...]] = [("exit code", code), ("seconds", took)]
    rows += [
        (f"trials {status}", sum(trial["status"] == status for trial in trials))
        for status in ("complete", "pruned", "failed", "running")
    ]
    rows.append(("trials per hour", 3600 * len(ended_ones) / took))
    for pretrained, start in (("True", "ImageNet weights"), ("False", "scratch")):
        reported = [t for t in trials if t["model.pretrained"] == pretrained and t["best_val_js"]]
        if reported:
            best = reported[0]
            rows.append((f"best JS from {start}, bits", float(best["best_val_js"])))
            rows += [(f"… its {name}", best[name]) for name in ("epochs", "seconds", "val_kl", "val_accuracy")]
    if used:
        rows.append(("GPU utilisation, mean %", sum(busy for busy, _ in used) / len(used)))
        rows.append(("GPU memory, most MiB", max(memory for _, memory in used)))
    return Table(("what", "value"), rows)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder of FER+ in AffectNetFused's layout")
    parser.add_argument("--weights-dir", required=True, help="folder with tf_efficientnet_lite0.safetensors")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    command = f"python -m benchmarks.ferplus DATA --weights-dir FOLDER --seconds {args.seconds:g}"
    with tempfile.TemporaryDirectory(prefix="raytune_emotion-") as results:
        measure("ferplus", lambda: study(args.data, args.weights_dir, args.seconds, Path(results)), command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
