"""Predict the distribution over emotions of images, and write a table on standard output: the command."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_emotion.cli import command_main, location
from raytune_emotion.data.pictures import PictureFiles, PredictedBatch, StoredPictures, in_batches, list_pictures
from raytune_emotion.data.progress import progress
from raytune_emotion.errors import Incomplete, UserError, collect_errors
from raytune_emotion.known_errors import first_line
from raytune_emotion.learn.export_files import LOADED, check_export
from raytune_emotion.terminal import count, warn_error

if TYPE_CHECKING:
    import torch

    from raytune_emotion.learn.export_folder import Package
    from raytune_emotion.learn.prediction_table import Table

_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "export",
        type=location,
        metavar="EXPORT",
        help="an export: best/ of a study or of a run of train, or the output of export; a folder or a URI",
    )
    add(
        "images",
        type=location,
        nargs="+",
        metavar="IMAGE",
        help="image of a face, a folder of images, or a packed store; as a path or URI",
    )
    add(
        "--format",
        choices=("csv", "jsonl", "parquet"),
        metavar="NAME",
        help="csv, jsonl or parquet (default: csv; for one image in a terminal: a list, most probable class first)",
    )
    add("--mirror", action="store_true", help="predict the mean of each image and its mirror image, in twice the time")
    add(
        "--address",
        metavar="ADDRESS",
        help="address of a running Ray cluster, or auto: predict images, but no store, on all its nodes (default: this "
        "machine)",
    )
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")


def run(args: argparse.Namespace) -> None:
    with args.export.copy_here(*LOADED) as folder:
        errors: list[str] = []
        with collect_errors(errors):
            check_export(folder)
        with collect_errors(errors):
            sources, missing = list_pictures(args.images)
        if args.format == "parquet" and sys.stdout.isatty():
            errors.append("--format parquet: cannot be shown in a terminal; write it to a file: > predictions.parquet")
        if args.address is not None and args.device is not None:
            errors.append("--device: names a device of this machine, --address a cluster; leave one of them out")
        if errors:
            raise UserError(errors)
        # Imported only now: it takes seconds.
        from raytune_emotion.learn.export_folder import load_package

        package = load_package(folder)
        total = sum(map(len, sources))
        # For one face in a terminal, the most probable classes are of interest.
        name = args.format or ("list" if total == 1 and sys.stdout.isatty() else "csv")
        for fault in missing:
            warn_error(fault)
        if args.address is None:
            package.model.to(_device(args.device))
            _check_sizes(sources, package.image_size)
            bad = _write(predict(package, sources, mirror=args.mirror), name, package.classes, total)
        else:
            with _on_cluster(args.address, folder, sources, mirror=args.mirror) as batches:
                bad = _write(batches, name, package.classes, total)
    if missing or bad:
        others = "all others were predicted" if bad < total else "nothing was predicted"
        raise Incomplete(f"{count(len(missing) + bad, 'image')} could not be read; {others}")


def predict(
    package: "Package", sources: Sequence[PictureFiles | StoredPictures], *, mirror: bool = False
) -> Iterator[PredictedBatch]:
    """Decode images as for training, and predict them in batches.

    With `mirror`, a prediction is the mean over an image and its mirror image.
    """
    # Imported only now: it takes seconds.
    from raytune_emotion.learn.export_folder import predict_batch

    for source in sources:
        for batch in in_batches(source.decode(package.image_size, _BATCH), _BATCH):
            yield predict_batch(package, batch, mirror=mirror)


def _write(batches: Iterable[PredictedBatch], name: str, classes: Sequence[str], total: int) -> int:
    """Write predictions as they come, report images that cannot be decoded, and return the number of these."""
    bad, table = 0, _open_table(name, classes)
    with progress(shown=not sys.stdout.isatty()) as bars:
        bar = bars.add_task("predicting images", total=total)
        for batch in batches:
            for fault in batch.faults:
                warn_error(fault)
            if batch.names:
                table.write(batch.names, batch.prob_NK)
            bad += len(batch.faults)
            bars.advance(bar, len(batch.names) + len(batch.faults))
    table.close()
    return bad


def _check_sizes(sources: Sequence[PictureFiles | StoredPictures], image_size: int) -> None:
    errors: list[str] = []
    for source in sources:
        if isinstance(source, StoredPictures):
            with collect_errors(errors):
                source.check(image_size)
    if errors:
        raise UserError(errors)


@contextlib.contextmanager
def _on_cluster(
    address: str, export: Path, sources: Sequence[PictureFiles | StoredPictures], *, mirror: bool
) -> Iterator[Iterator[PredictedBatch]]:
    """Provide the predictions of a Ray cluster.

    Raises:
        UserError: there is no cluster at the address, it has no core, or a source is a store.
        ClusterLost: the cluster has died.
    """
    from raytune_emotion.tuning.execution.cluster import check_cluster, ray_session
    from raytune_emotion.tuning.execution.cluster_watch import iterate_watched

    errors = [
        f"{source.location}: a packed store is predicted only on this machine; leave --address out"
        for source in sources
        if isinstance(source, StoredPictures)
    ]
    with collect_errors(errors):
        check_cluster(address)
    if errors:
        raise UserError(errors)
    # Ray warns about the way in which Ray Data creates actors (ray 53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with ray_session(address) as watch:
        from raytune_emotion.tuning.execution.capacity import tell_shortage
        from raytune_emotion.tuning.execution.cluster_nodes import check_cluster_cores
        from raytune_emotion.tuning.execution.cluster_predict import predict_on_cluster

        check_cluster_cores()
        files = [source for source in sources if isinstance(source, PictureFiles)]
        found = predict_on_cluster(export, files, mirror=mirror)
        look = tell_shortage(watch, "CPU", "GPU")
        with contextlib.closing(iterate_watched(found, watch, look=look)) as batches:
            yield batches


def _open_table(name: str, classes: Sequence[str]) -> "Table":
    from raytune_emotion.learn.prediction_table import TEXT_TABLES, ParquetTable

    return ParquetTable(sys.stdout.buffer, classes) if name == "parquet" else TEXT_TABLES[name](sys.stdout, classes)


def _device(name: str | None) -> "torch.device":
    import torch

    from raytune_emotion.learn.device import find_device

    if name is None:
        return find_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        said = first_line(error).partition(". ")[0]  # a list of all backends may follow
        raise UserError(f"--device {name}: not available here ({said}); leave it out, or use cpu") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not a device for models; use cpu or cuda")
    return device


if __name__ == "__main__":
    sys.exit(command_main("predict"))
