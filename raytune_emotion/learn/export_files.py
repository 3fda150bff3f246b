"""Name the formats and files of an export folder, and check whether a folder is an export."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from raytune_emotion.errors import UserError, did_you_mean, suggest_or_list
from raytune_emotion.storage.locations import Folder
from raytune_emotion.storage.nearest import BEST_EXPORT, suggest_folder

WEIGHTS, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.json", "README.md"
#: File of each format of an export.
FORMATS = {"timm": WEIGHTS, "onnx": "model.onnx", "pt2": "model.pt2"}
#: Files from which an export is loaded, and one that shows that a study was named in its place.
LOADED = (CONFIG, WEIGHTS, f"{BEST_EXPORT}/{CONFIG}")
#: Packages that a format needs in addition to this project's dependencies.
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def check_formats(formats: Sequence[str]) -> None:
    """Check that formats are known, and that their packages are installed.

    Raises:
        UserError: one sentence for each format that cannot be written here.
    """
    faults = []
    for name in formats:
        missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if name not in FORMATS:
            faults.append(f"--format {name}: unknown format{suggest_or_list(name, FORMATS)}")
        elif missing:
            extra = f"pip install 'raytune_emotion[{name}]'"
            faults.append(f"--format {name}: needs {', '.join(missing)}, not installed here; install them with {extra}")
    if faults:
        raise UserError(faults)


def check_export(folder: Path) -> None:
    """Check by its files that a folder is an export.

    Raises:
        UserError: it is not, and the error suggests others; or it has no weights for timm and `predict`.
    """
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if not missing:
        return
    held = [name for name, file in FORMATS.items() if (folder / file).is_file()]
    if held and CONFIG not in missing:
        raise UserError(f"{folder}: contains only the format {', '.join(held)}; export it again also as timm")
    lacks = f"not an export, because it has no {' and no '.join(missing)}"
    what = lacks if folder.exists() else "no such folder"
    inner = folder / BEST_EXPORT
    near = did_you_mean([str(inner)]) if (inner / CONFIG).is_file() else ""
    near = near or suggest_folder(Folder(folder), CONFIG, (BEST_EXPORT, ""))
    raise UserError(f"{folder}: {what}{near or '; name a folder that export, search or train wrote'}")
