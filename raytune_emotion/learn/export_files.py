"""Name the files of an export folder, and tell such a folder from others."""

from pathlib import Path

from raytune_emotion.errors import UserError

WEIGHTS, CONFIG, METRICS, CARD = "model.safetensors", "config.json", "metrics.json", "README.md"


def check_export(folder: Path) -> None:
    """Check that a folder is an export, by its files.

    Raises:
        UserError: it is not.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        inner = folder / "best"
        hint = f"did you mean {inner}?" if (inner / CONFIG).is_file() else "name one that export, search or train wrote"
        raise UserError(f"{folder}: is no export folder, which has a {CONFIG} and a {WEIGHTS}; {hint}")
