"""Train random configurations of a space to their end, and keep their curves.

    python -m benchmarks.curves.record --data ferplus_small --work WORK benchmarks/curves/ferplus_small.parquet

Each configuration trains on one core at a low priority, and its time is the processor time of its process, so that
other work on the machine does not falsify it. An interrupted recording can be continued, and a complete one can be
extended: configurations in the file are not trained again.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import track

from raytune_emotion.config import RunConfig
from raytune_emotion.data.packing.pack import pack
from raytune_emotion.data.prepare import prepare
from raytune_emotion.data.store import open_store
from raytune_emotion.data.synthetic import write_sample
from raytune_emotion.learn.loop import Divergence, fit
from raytune_emotion.storage.atomic import atomic_write, write_text
from raytune_emotion.tuning.space.parser import load_space
from raytune_emotion.tuning.space.space import Space, draw

#: Columns with wall-clock times, which are meaningless on a shared machine.
_LEFT_OUT = ("seconds", "time", "images_per_second")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves.record", description=__doc__)
    parser.add_argument("curves", type=Path, help="Parquet file to write")
    parser.add_argument("--data", type=Path, help="folder or store (default: drawn faces)")
    parser.add_argument("--image-size", type=int, help="px (default: that of the data; drawn faces: 32)")
    parser.add_argument("--space", type=Path, default=Path("search_spaces/quick.yaml"))
    parser.add_argument("--configurations", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--evals-per-epoch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing and of the training")
    parser.add_argument("--train-seed", type=int, help="of the training, where it is another")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is done so far")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    store = _store(args)
    train_seed = args.seed if args.train_seed is None else args.train_seed
    length = {"train.epochs": args.epochs, "train.evals_per_epoch": args.evals_per_epoch, "train.seed": train_seed}
    # The first curves were recorded with these values.
    length |= {"train.ema_decay": 0.0}
    space = load_space(args.space, overrides={**length, "data.image_size": open_store(store).image_size})
    drawn = dict(enumerate(draw(space, args.configurations, args.seed)))
    known = pd.read_parquet(args.curves) if args.curves.exists() else pd.DataFrame({"configuration": []})
    done = {*known["configuration"], *(number for number in drawn if _file(args.work, number).exists())}
    left = {number: settings for number, settings in drawn.items() if number not in done}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_prepare_process) as pool:
        jobs = [pool.submit(record, settings, store, _file(args.work, number)) for number, settings in left.items()]
        for job in track(as_completed(jobs), "recording", total=len(jobs)):
            job.result()
    write_curves(args.work, args.curves, known, drawn, space)
    return 0


def record(settings: dict[str, Any], store: Path, file: Path) -> None:
    """Write the reports of a configuration; if it diverges, those until then."""
    reports: list[dict[str, Any]] = []
    began = time.process_time()
    try:
        for report in fit(RunConfig.from_flat(settings), open_store(store), device=torch.device("cpu")):
            kept = {name: value for name, value in report.items() if name not in _LEFT_OUT}
            reports.append({**kept, "core_seconds": time.process_time() - began})
    except Divergence:
        pass
    write_text(file, json.dumps(reports))


def write_curves(work: Path, dest: Path, known: pd.DataFrame, drawn: dict[int, dict[str, Any]], space: Space) -> None:
    """Write one row per configuration and report: number, settings that the space chose, and the report if any."""
    rows = [
        {"configuration": number, **{k: v for k, v in settings.items() if k not in space.fixed_settings}, **report}
        for number, settings in drawn.items()
        if _file(work, number).exists() and number not in {*known["configuration"]}
        for report in json.loads(_file(work, number).read_text()) or [{}]
    ]
    with atomic_write(dest) as temporary:
        pd.concat([table for table in (known, pd.DataFrame(rows)) if len(table)]).to_parquet(
            temporary, index=False, compression="zstd"
        )


def _store(args: argparse.Namespace) -> Path:
    if args.data is not None:
        return Path(prepare(args.data, image_size=args.image_size).path)
    size = args.image_size or 32
    dest: Path = args.work / "store"
    if not dest.exists():
        write_sample(args.work / "faces", train=2000, val=500, image_size=size)
        pack(args.work / "faces", dest, image_size=size)
    return dest


def _file(work: Path, number: int) -> Path:
    return work / f"{number:04d}.json"


def _prepare_process() -> None:
    os.nice(5)
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
