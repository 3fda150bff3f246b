"""Contain all uses of what timm does not document, each with its reason.

`tests/learn/test_torch_contract.py` names each of them.
"""

import functools
import importlib.util
import re
from pathlib import Path

_MODEL = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_OLD_NAMES = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
_OLD_NAME = re.compile(r"^\s*['\"](\w+)['\"]\s*:", re.MULTILINE)


@functools.cache
def architectures() -> frozenset[str]:
    """Return the names of timm's architectures, including old names that timm still accepts.

    They are read from timm's source, because the import of timm, which `timm.list_models` needs, takes seconds.
    """
    found = importlib.util.find_spec("timm")
    names: set[str] = set()
    for folder in (found.submodule_search_locations if found else None) or ():
        for file in (Path(folder) / "models").glob("*.py"):
            text = file.read_text(encoding="utf-8")
            names.update(_MODEL.findall(text))
            for old in _OLD_NAMES.findall(text):
                names.update(_OLD_NAME.findall(old))
    return frozenset(names)
