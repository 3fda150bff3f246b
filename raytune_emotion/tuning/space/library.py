"""Find the search spaces of the package by name, from any folder."""

from pathlib import Path

import raytune_emotion
from raytune_emotion.errors import UserError, suggest

#: Name of the default space.
DEFAULT = "quick"


def find_space(text: str) -> Path:
    """Return the file of a search space.

    Args:
        text: the path of a YAML file, or the name of a space of the package, such as `gpu`.

    Raises:
        UserError: there is no such file or space.
    """
    path = Path(text)
    known = packaged_spaces()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file():
        if not path.exists() and path.stem in known:
            raise UserError(f"--space {path}: no such file; did you mean {path.stem}, a space of the package?")
        return path
    if text not in known:
        near = suggest(text, known)
        others = f"choose one of {', '.join(known)}, or name a file of your own, which ends with .yaml"
        raise UserError(f"--space {text}: no such search space{near or f'; {others}'}")
    return known[text]


def packaged_spaces() -> dict[str, Path]:
    """Return the files of the search spaces of the package, by name."""
    package = Path(raytune_emotion.__file__).parent
    # In the repository they are beside the package, in an installation inside it.
    folders = (package / "search_spaces", package.parent / "search_spaces")
    found = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {file.stem: file for file in sorted(found.glob("*.yaml"))}
