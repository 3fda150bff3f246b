"""The names of timm's models, read from its source: to import timm takes seconds."""

import difflib
import functools
import importlib.util
import re
from pathlib import Path

from raytune_emotion.errors import UserError

_MODEL = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_OLD_NAMES = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
_OLD_NAME = re.compile(r"^\s*['\"](\w+)['\"]\s*:", re.MULTILINE)


@functools.cache
def architectures() -> frozenset[str]:
    """Return the names of timm's architectures, with the old names that it still takes."""
    found = importlib.util.find_spec("timm")
    names: set[str] = set()
    for folder in (found.submodule_search_locations if found else None) or ():
        for file in (Path(folder) / "models").glob("*.py"):
            text = file.read_text(encoding="utf-8")
            names.update(_MODEL.findall(text))
            for old in _OLD_NAMES.findall(text):
                names.update(_OLD_NAME.findall(old))
    return frozenset(names)


def check_architecture(backbone: str) -> None:
    """Check that timm has the architecture of a backbone. Whether it has weights of its tag is not asked.

    Raises:
        UserError: it has not; the sentence names the nearest.
    """
    if backbone.partition(".")[0] in architectures():
        return
    near = difflib.get_close_matches(backbone, sorted(architectures()), n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"model.backbone: {backbone}: there is no such timm model{meant}")
