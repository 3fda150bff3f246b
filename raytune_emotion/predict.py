"""Predict the distribution over emotions of images, and write a table on standard output: the command."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raytune_emotion.cli import command_main, location
from raytune_emotion.data.decode import UndecodableImage
from raytune_emotion.data.pictures import PictureFiles, StoredPictures, in_batches, list_pictures
from raytune_emotion.data.progress import progress
from raytune_emotion.errors import Incomplete, UserError, collect_errors
from raytune_emotion.learn.export_files import check_export
from raytune_emotion.terminal import count, warn

if TYPE_CHECKING:
    import torch

    from raytune_emotion.learn.export_folder import Package
    from raytune_emotion.learn.prediction_table import Table

_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("export", type=location, metavar="EXPORT", help="folder or URI that search, train or export wrote")
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
        default="csv",
        metavar="NAME",
        help="csv, jsonl or parquet (default: csv)",
    )
    add(
        "--mirror", action="store_true", help="predict the mean over each image and its mirror image, in twice the time"
    )
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")


def run(args: argparse.Namespace) -> None:
    with args.export.copy_here("*") as folder:
        errors: list[str] = []
        with collect_errors(errors):
            check_export(folder)
        with collect_errors(errors):
            sources = list_pictures(args.images)
        if args.format == "parquet" and sys.stdout.isatty():
            errors.append("--format parquet: is not for a terminal; write it to a file, by > predictions.parquet")
        if errors:
            raise UserError(errors)
        # Imported only now: it takes seconds.
        from raytune_emotion.learn.export_folder import load_package

        device = _device(args.device)
        package = load_package(folder)
    for source in sources:
        if isinstance(source, StoredPictures):
            with collect_errors(errors):
                source.check(package.image_size)
    if errors:
        raise UserError(errors)
    package.model.to(device)
    table = _open_table(args.format, package.classes)
    bad = predict(package, sources, table, mirror=args.mirror)
    if bad:
        raise Incomplete(f"{count(bad, 'image')} could not be read; all others are predicted")


def predict(
    package: "Package", sources: Sequence[PictureFiles | StoredPictures], table: "Table", *, mirror: bool = False
) -> int:
    """Decode images as for training, predict a batch at a time, and write it; name those that cannot be decoded.

    With `mirror`, a prediction is the mean over an image and its mirror image.

    Returns:
        How many could not be decoded.
    """
    bad = 0
    with progress(shown=not sys.stdout.isatty()) as bars:
        bar = bars.add_task("predicting images", total=sum(map(len, sources)))
        for source in sources:
            for batch in in_batches(source.decode(package.image_size, _BATCH), _BATCH):
                good = [(name, pixels) for name, pixels in batch if not isinstance(pixels, UndecodableImage)]
                for name, why in batch:
                    if isinstance(why, UndecodableImage):
                        warn(f"error: {name}: {why}")
                if good:
                    images_NHWC = np.stack([pixels for _, pixels in good])
                    table.write([name for name, _ in good], package.predict(images_NHWC, mirror=mirror))
                bad += len(batch) - len(good)
                bars.advance(bar, len(batch))
    table.close()
    return bad


def _open_table(name: str, classes: Sequence[str]) -> "Table":
    from raytune_emotion.learn.prediction_table import TEXT_TABLES, ParquetTable

    return ParquetTable(sys.stdout.buffer, classes) if name == "parquet" else TEXT_TABLES[name](sys.stdout, classes)


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: is not here ({str(error).splitlines()[0]}); leave it out, or say cpu"
        ) from error
    return device


if __name__ == "__main__":
    sys.exit(command_main("predict"))
