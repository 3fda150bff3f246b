"""Imports run one way: vocabulary <- data <- learn <- tuning <- commands."""

import ast
from pathlib import Path

import pytest

import raytune_emotion

ROOT = Path(raytune_emotion.__file__).parent
VOCABULARY = {"emotions", "config", "errors", "files", "mirror", "__init__", "__version__"}
LAYERS = {"vocabulary": 0, "data": 1, "learn": 2, "tuning": 3, "commands": 4}
MODULES = sorted(ROOT.rglob("*.py"))


def layer_of(parts: tuple[str, ...]) -> str:
    if parts and parts[0] in ("data", "learn", "tuning"):
        return parts[0]
    return "vocabulary" if not parts or parts[0] in VOCABULARY else "commands"


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_nothing_from_above(module):
    parts = module.relative_to(ROOT).with_suffix("").parts
    layer = layer_of(parts)
    # The wrapper of all commands knows neither them nor what they use; `ferplus` is a command that lies with the data.
    allowed_main = layer == "commands" or parts == ("data", "ferplus")
    for name in imported(ast.parse(module.read_text())):
        package, *inner = name.split(".")
        if package == "raytune_emotion":
            if inner[:1] == ["__main__"]:
                assert allowed_main, f"{module} imports {name}"
            else:
                assert LAYERS[layer_of(tuple(inner))] <= LAYERS[layer], f"{module} imports {name}"
        if layer in ("vocabulary", "data", "learn"):
            assert package not in ("ray", "optuna"), f"{module} imports {name}"


def test_every_layer_was_seen():
    assert {layer_of(m.relative_to(ROOT).with_suffix("").parts) for m in MODULES} == set(LAYERS)
