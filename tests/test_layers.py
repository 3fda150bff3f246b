"""Imports run one way: vocabulary <- storage <- data <- learn <- tuning <- commands; in tuning, from wing to wing."""

import ast
from pathlib import Path

import pytest

import raytune_emotion

ROOT = Path(raytune_emotion.__file__).parent
LAYERS = ("vocabulary", "storage", "data", "learn", "tuning", "cli", "commands", "entry")
WINGS = ("space", "policy", "study", "execution", "report")
VOCABULARY = {"emotions", "config", "errors", "interruption", "known_errors", "terminal", "__version__"}
MODULES = sorted(ROOT.rglob("*.py"))
TESTS = Path(__file__).parent


def floor_of(parts: tuple[str, ...]) -> tuple[int, int]:
    """Where a module stands: its layer, and within `tuning` its wing."""
    if not parts or parts[0] in VOCABULARY:
        return 0, 0
    if parts[0] in ("__main__", "__init__"):  # the package itself names the library, for type checkers alone
        return LAYERS.index("entry"), 0
    if parts[:2] == ("data", "ferplus"):  # a command that lies with the data
        return LAYERS.index("commands"), 0
    if parts[0] not in LAYERS:
        return LAYERS.index("commands"), 0
    return LAYERS.index(parts[0]), WINGS.index(parts[1]) if parts[0] == "tuning" and parts[1] in WINGS else 0


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
    floor = floor_of(module.relative_to(ROOT).with_suffix("").parts)
    for name in imported(ast.parse(module.read_text())):
        package, *inner = name.split(".")
        if package == "raytune_emotion":
            assert floor_of(tuple(inner)) <= floor, f"{module} imports {name}"
        if floor < (LAYERS.index("tuning"), 0):
            assert package not in ("ray", "optuna"), f"{module} imports {name}"


def test_every_layer_and_wing_was_seen():
    parts = {module.relative_to(ROOT).with_suffix("").parts for module in MODULES}
    assert {floor_of(p)[0] for p in parts} == set(range(len(LAYERS)))
    assert {p[1] for p in parts if p[0] == "tuning"} == {*WINGS, "__init__"}


def lines_of(node: ast.AST) -> int:
    """Count the lines of a function or a class, but for its docstring."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if is_docstring else 0)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_and_no_class_is_too_long_to_read(module):
    most = {ast.FunctionDef: 75, ast.ClassDef: 200}
    nodes = [node for node in ast.walk(ast.parse(module.read_text())) if type(node) in most]
    assert [f"{node.name}: {lines_of(node)} lines" for node in nodes if lines_of(node) > most[type(node)]] == []


def test_no_modules_import_each_other_in_a_circle():
    def name_of(module: Path) -> str:
        parts = module.relative_to(ROOT.parent).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    graph: dict[str, set[str]] = {}
    names = {name_of(module) for module in MODULES}
    for module in MODULES:
        body = ast.Module([node for node in ast.parse(module.read_text()).body if not isinstance(node, ast.If)], [])
        top = ast.Module([node for node in body.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        found = {name if name in names else name.rpartition(".")[0] for name in imported(top)}
        graph[name_of(module)] = found & names - {name_of(module)}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert graph == {}


def test_no_test_module_imports_another_one():
    found = {
        f"{module.relative_to(TESTS)} imports {name}"
        for module in TESTS.rglob("*.py")
        for name in imported(ast.parse(module.read_text()))
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    }
    assert found == set(), "what several test modules need lies in tests/support/"
