"""What a study finds, and what finishing it brings, on faces that the study has not seen.

`python -m benchmarks finishing DATA --seeds 0 1 2` splits the validation set of DATA once, by a hash of the ids: one
half takes the place of the validation set, and the models of each study predict the other half, the test.
With `--ensemble K` the study is not finished; its best trial stands beside an ensemble of K trials.
With `--work FOLDER` the same command goes on where it was interrupted.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import Table
from benchmarks.__main__ import measure_in_folder, parser_of, run_timed
from raytune_emotion import MetricsCalculator
from raytune_emotion.data.affectnet import SPLITS, check_layout, list_faces
from raytune_emotion.data.decode import decode_image
from raytune_emotion.data.faces import Row, sentences
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import atomic_folder, write_text
from raytune_emotion.storage.locations import Folder
from raytune_emotion.tuning.study.spec import SPEC

_ANNOTATION = "_prob_rank.txt"
#: An image is decoded at this size, px, to find out whether it can be.
_TRIED_AT = 32
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


@dataclass(frozen=True)
class Faces:
    """A dataset whose validation set is split in two. Targets are distributions by the id of the face, [K]."""

    searched: Path  # folder in AffectNetFused's layout, with one half as its validation set
    searched_targets: Mapping[str, Floats]  # of that half
    test: Path  # folder of the images of the other half
    targets: Mapping[str, Floats]  # of the other half


def faces_folder(text: str) -> Path:
    """Take the path of a folder in AffectNetFused's layout, for argparse."""
    try:
        check_layout(Folder(Path(text)))
    except UserError as error:
        raise argparse.ArgumentTypeError("; ".join(error.faults)) from None
    return Path(text)


def is_test(face_id: str) -> bool:
    """Say whether a face of the validation set belongs to the test; the halves differ from those of `half_of`."""
    return hashlib.sha256(f"test {face_id}".encode()).digest()[0] < 128


def split_validation(data: Path, dest: Path) -> Faces:
    """Link the good rows of a dataset into `dest`, its validation set in two.

    Rows at fault are named and left out, also validation images that cannot be decoded. Those of the training set are
    left to whoever trains. What was linked before is kept.
    """
    faces = list_faces(Folder(data))
    scan = faces.scan(EMOTIONS, map)
    for sentence in sentences(faces, scan.faults, EMOTIONS):
        print(sentence, file=sys.stderr)
    split = dest / f"faces-{faces.quick_fingerprint()[:12]}"
    if not split.exists():
        with atomic_folder(split) as folder:
            for row in scan.rows["train"]:
                _link_row(data, row, folder / "searched")
            for row in scan.rows["val"]:
                if _can_be_decoded(data / row.image.name):
                    _link_row(data, row, folder / _part_of(row))
    linked = [row for row in scan.rows["val"] if (split / _part_of(row) / row.image.name).exists()]
    seen, unseen = (
        {row.id: np.array(row.probs) for row in linked if _part_of(row) == part} for part in ("searched", "test")
    )
    return Faces(split / "searched", seen, split / "test" / SPLITS["val"] / "images", unseen)


def _part_of(row: Row) -> str:
    return "test" if is_test(row.id) else "searched"


def _can_be_decoded(image: Path) -> bool:
    try:
        decode_image(image, _TRIED_AT)
    except UserError as error:
        print(error, file=sys.stderr)
        return False
    return True


def _link_row(data: Path, row: Row, folder: Path) -> None:
    """Link the files of a row into a folder of the same layout."""
    image = Path(row.image.name)
    for file in (image, image.parents[1] / "annotations" / f"{row.id}{_ANNOTATION}"):
        _link(data / file, folder / file)


def _link(source: Path, dest: Path) -> None:
    dest.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), dest)
    except OSError:  # another file system
        shutil.copyfile(source, dest)


def predict(export: Path, *arguments: Path | str) -> dict[str, Floats]:
    """Return what an export predicts of the images in folders: the probabilities of each face, [K], by its id."""
    command = [sys.executable, "-m", "raytune_emotion.predict", str(export), *map(str, arguments)]
    table = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    _, *rows = csv.reader(table.splitlines())
    return {Path(image).stem: np.array(values, float) for image, *values in rows}


def score(predicted: Mapping[str, Floats], targets: Mapping[str, Floats], metric: str = "js") -> float:
    """Return the mean of a metric, by its name, of what is predicted of each face, [K], by its id.

    Raises:
        ValueError: there is no prediction of a face with a target, or the reverse.
    """
    if targets.keys() != predicted.keys():
        odd = sorted(targets.keys() ^ predicted.keys())
        raise ValueError(f"not the faces that were predicted: {len(odd)} others, such as {odd[0]}")
    ids = sorted(targets)
    prob_NK, target_NK = (np.array([those[face_id] for face_id in ids]) for those in (predicted, targets))
    return MetricsCalculator([metric]).compute_all(prob_NK, target_NK)[metric]


def study(plan: Plan, work: Path) -> Iterator[Table]:
    """Run a study per seed, and measure its best trial and what was made of it; yield a table after each seed."""
    faces = split_validation(plan.data, work)
    made = "finished" if plan.ensemble is None else f"ensemble of {plan.ensemble}"
    columns = ("seed", "best trial of the search, JS", f"{made}, JS", "minutes in all")
    notes = [f"JS in bits on {len(faces.targets)} faces of the test."]
    rows: list[tuple[object, ...]] = []
    for seed in plan.seeds:
        folder = work / f"seed{seed}"
        minutes = _search(plan, faces.searched, folder, seed)
        better = folder / "finished"
        if plan.ensemble is not None:
            better = work / f"ensemble{seed}"
            combine = ["raytune_emotion.export", str(folder), str(better), "--ensemble", str(plan.ensemble)]
            combining = _run([*combine, "--format", "pt2"]) / 60
            minutes = None if minutes is None else minutes + combining
        if minutes is None:
            notes.append(f"Seed {seed} was interrupted, and its search may have had more than its time.")
        rows.append((seed, _measure_js(folder / "best", faces), _measure_js(better, faces), minutes))
        means = [_mean([row[column] for row in rows]) for column in (1, 2, 3)]
        yield Table(columns, [*rows, ("mean", *means)], [*notes])


def _search(plan: Plan, data: Path, folder: Path, seed: int) -> float | None:
    """Run the study of a seed, or go on with it; return the minutes it took, None where it was interrupted."""
    ended = folder.with_suffix(".json")
    if ended.exists():
        minutes: float | None = json.loads(ended.read_text(encoding="utf-8"))
        return minutes
    command = ["raytune_emotion.search", "--data", str(data), "--space", plan.space, "--seed", str(seed), "--skip-bad"]
    command += ["--trials", str(plan.trials), "--epochs", str(plan.epochs)]
    command += ["--time-budget", f"{plan.seconds:.0f}s", "--results", str(folder.parent), "--name", folder.name]
    # The portfolio may have been recorded on the same faces.
    command += ["--warm-start", "none"]
    command += ["--weights-dir", str(plan.weights)] if plan.weights is not None else []
    command += ["--finish"] if plan.ensemble is None else []
    interrupted = (folder / SPEC).exists()
    seconds = _run([*command, "--resume"] if interrupted else command)
    minutes = None if interrupted else seconds / 60
    write_text(ended, json.dumps(minutes))
    return minutes


def _measure_js(export: Path, faces: Faces) -> float:
    return score(predict(export, faces.test), faces.targets)


def _mean(values: Sequence[object]) -> float | None:
    known = [value for value in values if isinstance(value, float)]
    return statistics.fmean(known) if known else None


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
    add("data", type=faces_folder, help="folder of faces in AffectNetFused's layout")
    add("--weights-dir", type=Path, help="folder of starting weights (default: the hub)")
    add("--space", default=str(Path(__file__).with_name("finishing.yaml")))
    add("--trials", type=int, default=200, help="at most")
    add("--epochs", type=int, default=6)
    add("--seconds", type=float, default=2700, help="of each search; finishing comes on top")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--ensemble", type=int, metavar="K", help="of K trials, in place of finishing")
    add("--work", type=Path, metavar="FOLDER", help="of the studies, which stay there (default: a temporary one)")
    args = parser.parse_args(arguments)
    plan = Plan(
        args.data, args.weights_dir, args.space, args.trials, args.epochs, args.seconds, args.seeds, args.ensemble
    )
    measure_in_folder("finishing", arguments, lambda work: study(plan, work), args.work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
