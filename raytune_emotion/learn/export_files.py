"""Name the formats and files of an export folder, and tell such a folder from others."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from raytune_emotion.errors import UserError, did_you_mean, suggest_or_list
from raytune_emotion.storage.locations import Folder
from raytune_emotion.storage.nearest import BEST_EXPORT, suggest_folder

WEIGHTS, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.json", "README.md"
#: The formats of an export, and the file of each.
FORMATS = {"timm": WEIGHTS, "onnx": "model.onnx", "pt2": "model.pt2"}
#: What a format needs beside this project's own packages.
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def check_formats(formats: Sequence[str]) -> None:
    """Check that formats are known, and that what they need is installed.

    Raises:
        UserError: one sentence for each format that cannot be written here.
    """
    faults = []
    for name in formats:
        missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if name not in FORMATS:
            faults.append(f"--format {name}: there is no such format{suggest_or_list(name, FORMATS)}")
        elif missing:
            extra = f"pip install 'raytune_emotion[{name}]'"
            faults.append(f"--format {name}: needs {', '.join(missing)}, not installed here; install them by {extra}")
    if faults:
        raise UserError(faults)


def check_export(folder: Path) -> None:
    """Check that a folder is an export, by its files.

    Raises:
        UserError: it is not, and the sentence names the nearest; or it has no weights that timm and `predict` load.
    """
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if not missing:
        return
    held = [name for name, file in FORMATS.items() if (folder / file).is_file()]
    if held and CONFIG not in missing:
        raise UserError(f"{folder}: is an export as {', '.join(held)} alone; export it again as timm, too")
    lacks = f"is no export, as it has no {' and no '.join(missing)}"
    what = lacks if folder.exists() else "there is no such folder"
    inner = folder / BEST_EXPORT
    near = did_you_mean([str(inner)]) if (inner / CONFIG).is_file() else ""
    near = near or suggest_folder(Folder(folder), CONFIG, (BEST_EXPORT, ""))
    raise UserError(f"{folder}: {what}{near or '; name a folder that export, search or train wrote'}")
