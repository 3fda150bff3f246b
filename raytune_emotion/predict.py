"""Predict the distribution over emotions of images, as CSV on standard output: the command."""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raytune_emotion.cli import command_main, local_path, location
from raytune_emotion.data.cores import usable_cores
from raytune_emotion.data.decode import decode_image, ignore_decoder_warnings
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.learn.export_files import check_export

if TYPE_CHECKING:
    import torch

    from raytune_emotion.learn.export_folder import Package

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}
_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("export", type=location, metavar="EXPORT", help="folder or URI that search, train or export wrote")
    add("images", type=local_path, nargs="+", metavar="IMAGE", help="image of a face, or a folder of images")
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
            files = list_images(args.images)
        if errors:
            raise UserError(errors)
        # Imported only now: it takes seconds.
        from raytune_emotion.learn.export_folder import load_package

        device = _device(args.device)
        package = load_package(folder)
    # Predict everything before anything is printed: an unreadable image must not leave half a table.
    prob_NK = predict(package, files, device, mirror=args.mirror)
    print(table(files, prob_NK, package.classes), end="")


def list_images(paths: Iterable[Path]) -> list[Path]:
    """List images: each file as given, and the images of each folder, sorted by name.

    Raises:
        UserError: a path does not exist or cannot be read, or a folder has no image.
    """
    files: list[Path] = []
    faults: list[str] = []
    for path in paths:
        try:
            if path.is_dir():
                found = sorted(f for f in path.iterdir() if f.suffix.lower() in _SUFFIXES and f.name[0] != ".")
                files += found
                if not found:
                    faults.append(f"{path}: there is no image in this folder; name the images, or their folder")
            elif path.exists():
                files.append(path)
            else:
                faults.append(f"{path}: there is no such image")
        except OSError as error:
            faults.append(f"{path}: cannot be read: {error.strerror}; name readable images")
    if faults:
        raise UserError(faults)
    return files


def predict(
    package: "Package", files: Sequence[Path], device: "torch.device", *, mirror: bool = False
) -> npt.NDArray[np.float64]:
    """Decode images as for training, and predict; with `mirror`, the mean over each image and its mirror image.

    Returns:
        [N, K], each row with sum 1.

    Raises:
        UserError: one sentence for each image that cannot be read.
    """
    package.model.to(device)
    faults: list[str] = []
    parts: list[npt.NDArray[np.float64]] = []

    def decoded(file: Path) -> npt.NDArray[np.uint8] | None:
        try:
            return decode_image(file, package.image_size)
        except UserError as error:
            faults.extend(error.faults)
            return None

    with (
        ignore_decoder_warnings(),
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        for start in range(0, len(files), _BATCH):
            images = [image for image in pool.map(decoded, files[start : start + _BATCH]) if image is not None]
            # After an error, the remaining images are only checked.
            if not faults:
                parts.append(package.predict(np.stack(images), mirror=mirror))
    if faults:
        raise UserError(sorted(faults))
    return np.concatenate(parts)


def table(files: Sequence[Path], prob_NK: npt.NDArray[np.float64], classes: Sequence[str]) -> str:
    """Return CSV: a header, then one line per image with its probabilities, to six decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *classes])
    for file, prob_K in zip(files, prob_NK, strict=True):
        # A name that is not valid text is escaped.
        writer.writerow([os.fsencode(file).decode(errors="backslashreplace"), *(f"{p:.6f}" for p in prob_K)])
    return text.getvalue()


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
