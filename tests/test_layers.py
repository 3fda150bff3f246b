"""Imports run one way: vocabulary <- storage <- data <- learn <- tuning <- library <- commands; in tuning, from wing to
wing. Imports within functions, for type checkers alone and by `import_module` count, too.
"""

import ast
from pathlib import Path

import pytest

import raytune_emotion

ROOT = Path(raytune_emotion.__file__).parent
LAYERS = ("vocabulary", "storage", "data", "learn", "tuning", "library", "cli", "commands", "entry")
WINGS = ("space", "policy", "study", "execution", "report", "session")
VOCABULARY = {"__init__", "emotions", "config", "errors", "interruption", "known_errors", "terminal", "__version__"}
#: Imports that are no part of the order, and why.
EXCEPTIONS = {
    ("raytune_emotion", "raytune_emotion.library"): "for type checkers; a name is imported at its first use",
    ("raytune_emotion.library.command", "raytune_emotion.cli"): "its child process runs a command",
}
#: Modules that import what a variable names, and what that is.
IMPORT_BY_NAME = {
    "raytune_emotion": "the module of a name of the library, at its first use",
    "raytune_emotion.cli": "the command that the user typed",
    "raytune_emotion.interruption": "slow modules that a command will need",
}
MODULES = sorted(ROOT.rglob("*.py"))
TESTS = Path(__file__).parent
#: Modules without a test module of their own: where they are tested, and why there.
TESTED_ELSEWHERE = {
    "__main__": ("test_main", "both are the console script; the test module has its plain name"),
    "cli": ("test_main", "what commands share is tested as they use it"),
    "errors": ("test_main", "errors are seen as a command says them"),
    "ferplus": ("data/test_ferplus", "it is how the user runs the conversion"),
    "data/parallel": ("data/packing/test_pack", "packing is its only user"),
    "data/pictures": ("test_predict", "it lists and reads what `predict` is given"),
    "data/progress": ("test_predict", "it is the bar beside what `predict` and `pack` write"),
    "data/shard_format": ("data/test_store", "a store is the shards that it writes and reads"),
    "data/sources": ("data/test_table", "a source is a folder or a table; both are compared there"),
    "data/packing/blocks": ("data/packing/test_pack", "a part of packing"),
    "data/packing/validate": ("data/packing/test_pack", "a part of packing"),
    "learn/export_files": ("learn/test_graphs", "it names the formats that are written there"),
    "learn/prediction_table": ("test_predict", "it is what `predict` writes"),
    "learn/timm_patches": ("learn/test_torch_contract", "what timm does not document"),
    "learn/torch_patches": ("learn/test_torch_contract", "private interfaces of torch"),
    "learn/transport": ("learn/test_metrics", "optimal transport is one of the metrics"),
    "learn/predictions": ("learn/test_model_card", "the card shows all its numbers"),
    "tuning/space/joint_check": ("tuning/space/test_parser", "it checks a space that was parsed"),
    "tuning/space/json_schema": ("tuning/space/test_parser", "schema and parser must agree on the same files"),
    "tuning/space/words": ("tuning/space/test_parser", "words are read as those of a file"),
    "tuning/space/space": ("tuning/space/test_parser", "a space is what a file is parsed to"),
    "tuning/policy/acquisition": ("tuning/policy/test_objective", "each objective has its acquisition function"),
    "tuning/policy/decisions": ("tuning/policy/test_freeze_thaw", "names only; the policy that takes all decisions"),
    "tuning/policy/encoding": ("tuning/policy/test_forecast", "a forecast is of points of the encoding"),
    "tuning/policy/cmaes_patches": ("tuning/policy/test_cmaes_contract", "private interfaces of Optuna"),
    "tuning/policy/inputs": ("tuning/policy/test_freeze_thaw", "the policies that are tested there are made of it"),
    "tuning/policy/outlook": ("tuning/policy/test_sampler", "the sampler offers what the outlook weighs highest"),
    "tuning/policy/policies": ("tuning/policy/test_freeze_thaw", "it makes the policies that are tested there"),
    "tuning/policy/trial_attributes": ("tuning/policy/test_freeze_thaw", "its policy reads most of what a trial has"),
    "tuning/study/combined_export": ("tuning/study/test_combination", "what is chosen there is exported"),
    "tuning/study/confirmation": ("test_confirm", "it is what the command `confirm` begins and ranks"),
    "tuning/study/resume_check": ("test_search", "what a study may not change is refused at the door of `search`"),
    "tuning/study/creation": ("test_search", "what a new or resumed study may be is refused at the door of `search`"),
    "tuning/study/earlier": ("tuning/policy/test_warm_start", "what is gathered is what a warm start reads"),
    "tuning/study/endings": ("tuning/execution/test_recorder", "types only; the recorder decides each ending"),
    "tuning/study/optuna_patches": ("tuning/study/test_optuna_contract", "private interfaces of Optuna"),
    "tuning/study/request": ("test_search", "it is what the options of `search` become"),
    "tuning/study/tables": ("tuning/study/test_records", "tables are made of records"),
    "tuning/study/trial_export": ("test_export", "it is what the command `export` does"),
    "tuning/execution/ray_patches": ("tuning/execution/test_ray_contract", "private interfaces of Ray"),
    "tuning/execution/ray_train_patches": ("tuning/execution/test_ray_contract", "private interfaces of Ray Train"),
    "tuning/execution/ray_tune_patches": ("tuning/execution/test_ray_contract", "private interfaces of Ray Tune"),
    "tuning/execution/resources": ("tuning/execution/test_placement", "it is what is fitted to nodes"),
    "tuning/execution/worker_nodes": (
        "tuning/execution/test_cluster_nodes",
        "it tells which of these nodes a worker takes",
    ),
    "tuning/report/dry_run": ("test_search", "it is `search --dry-run`"),
    "tuning/report/live_state": ("tuning/report/test_live_view", "the view draws the state; events go through both"),
    "tuning/report/page_data": ("tuning/report/test_page", "the page holds the data"),
    "tuning/report/publication": ("test_report", "it is what the command `report` does"),
    "tuning/report/plots": ("tuning/report/test_page", "the page and the PNG files show the same"),
    "tuning/session/console_run": ("tuning/report/test_live_console", "what is shown there while a study runs"),
    "tuning/session/run_confirmation": ("test_confirm", "it is what the command `confirm` does"),
    "tuning/session/run_search": ("test_search", "it is what the command `search` does"),
    "tuning/session/search_inputs": ("test_search", "it is what `search` checks at its door"),
    "tuning/session/single_run": ("test_train", "it is what the command `train` does"),
    "tuning/report/summary": ("test_status", "it is what the command `status` shows"),
}
#: Test modules of what no single module does, with what that is.
ACROSS_MODULES = {
    "test_docs": "README, docs and notebooks", "test_doors": "bad input at every command",
    "test_fuzz": "damaged files of every kind", "test_imports": "what is imported with each part",
    "test_jobs": "files in jobs/", "test_layers": "the layout", "test_main": "the console script",
    "test_submit": "jobs/submit.sh", "test_surface": "names that others rely on", "test_wheel": "the installed package",
    "learn/test_distributed": "training in several processes",
    "tuning/policy/test_cmaes_contract": "private interfaces of Optuna",
    "learn/test_torch_contract": "private interfaces of torch and timm",
    "machines/test_chaos": "processes and networks that die", "machines/test_memory": "use of memory",
    "machines/test_commands_at_uri": "studies at a URI", "machines/test_drivers": "several searches on one study",
    "machines/test_death": "clusters of several machines", "machines/test_growth": "clusters of several machines",
    "machines/test_installed": "the installed package",
    "machines/test_local_ray": "sessions of Ray with all their parts",
    "machines/test_nodes": "clusters of several machines", "machines/test_security": "what others see of a search",
    "machines/test_signals": "clusters of several machines", "machines/test_slurm": "jobs/slurm.sh",
    "machines/test_submitted": "jobs/submit.sh",
    "storage/test_faulty_s3": "a store that fails", "tuning/execution/test_faulty_storage": "a store that fails",
    "tuning/execution/test_ray_contract": "private interfaces of Ray",
    "tuning/execution/test_remote_study": "studies at a URI",
    "tuning/report/test_page_in_browser": "the page in a real browser",
    "tuning/study/test_optuna_contract": "private interfaces of Optuna",
    "tuning/study/test_optuna_dashboard": "optuna-dashboard on a study",
}  # fmt: skip


def floor_of(parts: tuple[str, ...]) -> tuple[int, int]:
    """Where a module stands: its layer, and within `tuning` its wing."""
    if not parts or parts[0] in VOCABULARY:
        return 0, 0
    if parts[0] == "__main__":
        return LAYERS.index("entry"), 0
    if parts[0] not in LAYERS:
        return LAYERS.index("commands"), 0
    return LAYERS.index(parts[0]), WINGS.index(parts[1]) if parts[0] == "tuning" and parts[1] in WINGS else 0


def name_of(module: Path) -> str:
    parts = module.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def named_imports(tree: ast.AST) -> list[ast.expr]:
    """Return what is given to `import_module`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call.args[0] for call in calls if ast.unparse(call.func).endswith("import_module")]


def imported(tree: ast.AST) -> set[str]:
    names = {node.value for node in named_imports(tree) if isinstance(node, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(module: Path) -> set[str]:
    """Return what a module imports, but for the exceptions."""
    excepted = tuple(name for importer, name in EXCEPTIONS if importer == name_of(module))
    return {name for name in imported(ast.parse(module.read_text())) if not name.startswith(excepted)}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_nothing_from_above(module):
    floor = floor_of(module.relative_to(ROOT).with_suffix("").parts)
    for name in imports_of(module):
        package, *inner = name.split(".")
        if package == "raytune_emotion":
            assert floor_of(tuple(inner)) <= floor, f"{module} imports {name}"
        if floor < (LAYERS.index("tuning"), 0):
            assert package not in ("ray", "optuna"), f"{module} imports {name}"


def test_what_a_variable_names_is_imported_by_few():
    trees = {name_of(module): ast.parse(module.read_text()) for module in MODULES}
    by_name = {name for name, tree in trees.items() if {type(node) for node in named_imports(tree)} - {ast.Constant}}
    assert by_name == IMPORT_BY_NAME.keys()


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
    names = {name_of(module) for module in MODULES}
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        found = {name if name in names else name.rpartition(".")[0] for name in imports_of(module)}
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


def names_below(folder: Path, pattern: str) -> set[str]:
    return {
        str(file.relative_to(folder).with_suffix("")) for file in folder.rglob(pattern) if file.name != "__init__.py"
    }


def test_every_module_has_its_test_module_or_is_listed_with_the_one_that_tests_it():
    tests = names_below(TESTS, "test_*.py")
    own = {str(Path(name).with_name(f"test_{Path(name).name}")): name for name in names_below(ROOT, "*.py")}
    assert {module for test, module in own.items() if test not in tests} == TESTED_ELSEWHERE.keys()
    assert {test for test, _ in TESTED_ELSEWHERE.values()} <= tests
    of_the_package = {test for test in tests if not test.startswith("benchmarks/")}
    assert of_the_package - own.keys() == ACROSS_MODULES.keys()
