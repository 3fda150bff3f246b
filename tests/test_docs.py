"""README, docs and notebook: their commands parse, their Python runs, their links and numbers are right."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pytest
import ray.scripts.scripts
import torch
from PIL import Image

import benchmarks.__main__
import raytune_emotion
from raytune_emotion.cli import COMMANDS
from raytune_emotion.config import SETTINGS, RunConfig
from raytune_emotion.data import synthetic
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.export_folder import write_package
from raytune_emotion.learn.metrics import distances_of, per_sample
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.library import studies
from raytune_emotion.storage import remote
from tests.support.studies import write_study
from tests.support.surface import COLUMNS, FILES

ROOT = Path(raytune_emotion.__file__).parents[1]
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])

#: What a shell does by itself, and programs that come with no parser of ours.
SHELL_WORDS = {"export", ".", "pip", "tensorboard", "optuna-dashboard", "pytest", "ssh", "tail"}
SHELL_WORDS |= {"kubectl", "podman", "prometheus", "scancel", "sky"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    why_not: str  # why it cannot be run in a test
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document: Path) -> Iterator[Block]:
    fence = re.compile(r"^```(\w*) *(?:no-test: *(.*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = document.read_text(encoding="utf-8")
    for found in fence.finditer(text):
        yield Block(document, text[: found.start()].count("\n") + 1, found[1], found[2] or "", found[3])


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
WITH_PYTHON = sorted({block.document for block in BLOCKS if block.language == "python"})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check_command(line: str) -> None:
    """Parse a command with the parser of its program, without running it."""
    line = re.sub(r"^\(umask 077; (.*)\)", r"\1", line)
    words = shlex.split(line.partition("|")[0], comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *rest = words
    if ">" in rest:
        rest = rest[: rest.index(">")]
    if program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], line, "exec")
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} is missing"
    elif program == "raytune-emotion":
        parse(rest[0], rest[1:])
    elif program == "jobs/submit.sh":
        assert (ROOT / program).is_file()
        parse("search", rest)
    elif program == "sbatch":
        script = next(number for number, word in enumerate(rest) if not word.startswith("-"))
        assert (ROOT / rest[script]).is_file(), f"{rest[script]} is missing"
        parse("search", rest[script + 1 :])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= {*targets}, f"make has no target {rest}"
    elif program == "ray":
        command = ray.scripts.scripts.cli
        while getattr(command, "commands", None):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(program, [*rest])
    else:
        assert program in SHELL_WORDS, f"{program} is not known here"


def check_module(module: str, argv: list[str]) -> None:
    package, _, verb = module.partition(".")
    if package == "raytune_emotion" and verb in COMMANDS:
        parse(verb, argv)
        return
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module == "benchmarks" and not (argv and argv[0] in benchmarks.__main__.WITH_DATA):
        assert {*argv} <= {*benchmarks.__main__.NAMES}, f"there is no benchmark of {argv}"


def parse(verb: str, argv: list[str]) -> None:
    assert verb in COMMANDS, f"there is no command {verb}"
    parser = argparse.ArgumentParser(prog=verb, exit_on_error=False)
    importlib.import_module(f"raytune_emotion.{verb}").add_arguments(parser)
    parser.parse_args(argv)


def lines_of(block: Block) -> list[str]:
    return block.text.replace("\\\n", " ").splitlines()


def test_there_is_something_to_check():
    """A test of each of none would be left out without a word."""
    assert min(len(some) for some in (DOCUMENTS, NOTEBOOKS, SHELL, WITH_PYTHON)) > 0


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_commands_parse(block):
    for line in lines_of(block):
        try:
            check_command(line)
        except SystemExit:
            pytest.fail(f"{block}: {line}")


@pytest.mark.parametrize("line", ["python -m raytune_emotion.search --trails 3", "raytune-emotion serch", "make serch"])
def test_mistyped_command_is_noticed(line):
    with pytest.raises((SystemExit, AssertionError, argparse.ArgumentError)):
        check_command(line)


@pytest.mark.parametrize("file", [*DOCUMENTS, *(ROOT / "jobs").glob("*.*")], ids=name_of)
def test_token_is_made_for_its_owner_alone(file):
    """Ray itself lets everybody read it."""
    text = file.read_text(encoding="utf-8")
    assert text.count("get-auth-token --generate") == text.count("(umask 077; ray get-auth-token --generate")


def test_every_block_names_its_language():
    assert [str(block) for block in BLOCKS if block.language not in ("sh", "python", "yaml", "text")] == []


@pytest.fixture(scope="module")
def finished_study(store, tmp_path_factory):
    """A study with an export, made without Ray."""
    folder = tmp_path_factory.mktemp("docs") / "study"
    write_study(folder, store)
    write_package(folder / "best", read_best(folder / "trials" / "0000" / BEST))
    return folder


@pytest.fixture
def project(finished_study, tmp_path, monkeypatch, no_plots):
    """A folder with the files that examples name, and the built-in sample cut to its first faces."""
    monkeypatch.setattr(synthetic, "TRAIN", 96)
    monkeypatch.setattr(synthetic, "VAL", 33)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_study, "ray_results/first")
    Image.new("RGB", (40, 40), "grey").save("face.jpg")

    def search(*args: object, **options: object) -> studies.Study:
        """Stand in for a search: to start Ray takes as long as all other examples."""
        given = whole_search.bind(*args, **options).arguments
        folder = Path(given.get("results", "ray_results")) / given["name"]
        shutil.copytree(finished_study, folder)
        return studies.load_study(folder)

    whole_search = inspect.signature(studies.search)
    monkeypatch.setattr(studies, "search", search)
    with mpl.rc_context({"backend": "agg"}):
        yield tmp_path


@pytest.mark.parametrize("document", WITH_PYTHON, ids=name_of)
def test_python_examples_run(document, project):
    scope: dict[str, object] = {"__name__": "example"}
    for block in blocks_of(document):
        if block.language == "python":
            source = "\n" * block.line + block.text
            ast.parse(source)
            if not block.why_not:
                exec(compile(source, document, "exec"), scope)


def test_training_example_says_that_nothing_is_left_the_second_time(project, capsys):
    (example,) = (block.text for block in BLOCKS if "learn.loop import fit" in block.text)
    for _ in range(2):
        exec(compile(example, "example", "exec"), {"__name__": "example"})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1: JS ")
    assert second.startswith("all epochs are trained already")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_runs(notebook, project):
    scope: dict[str, object] = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(notebook), "exec"), scope)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_is_kept_without_outputs(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def prose_of(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(document: Path) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{target} is missing"
        assert not anchor or anchor in anchors_of(file), f"{target}: there is no such heading"


#: Where a path in backticks may begin.
FOLDERS = (ROOT, ROOT / "raytune_emotion")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_source_files_that_are_named_exist(document):
    modules = {
        file.name for folder in ("raytune_emotion", "benchmarks", "docs") for file in (ROOT / folder).rglob("*.py")
    }
    for name in re.findall(r"`([\w/.]+\.py)`", prose_of(document)):
        if "/" in name:
            assert any((folder / name).is_file() for folder in (*FOLDERS, document.parent)), f"{name} is missing"
        else:
            assert name in modules, f"{name} is missing"


def first_sentence(module: Path) -> str:
    return re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(ast.parse(module.read_text())))[0].replace("\n", " ")


def test_the_architecture_page_lists_every_module_with_its_first_sentence():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Every module")[2]
    listed = {
        f"{folder}{line}"
        for folder, text in re.findall(r"^### `(raytune_emotion/.*?)`$(.*?)(?=^###|\Z)", page, re.MULTILINE | re.DOTALL)
        for line in re.findall(r"^\* `(.*)$", text, re.MULTILINE)
    }
    modules = [file for file in (ROOT / "raytune_emotion").rglob("*.py") if file.name != "__init__.py"]
    wanted = {f"{file.parent.relative_to(ROOT)}/{file.name}`: {first_sentence(file)}" for file in modules}
    assert listed == wanted, "write these lines anew in docs/architecture.md"


def test_readme_is_short():
    assert len(README.read_bytes()) <= 8000


def test_readme_lists_all_commands():
    section = README.read_text(encoding="utf-8").partition("## Commands")[2].partition("\n## ")[0]
    assert {*re.findall(r"^\| `([a-z]+)", section, re.MULTILINE)} == {*COMMANDS}


def test_numbers_of_the_readme_are_those_of_the_benchmarks():
    section = README.read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    numbers = re.findall(r"\b0\.\d{3,}\b", section)
    assert numbers
    assert [n for n in numbers if n not in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")] == []


def test_readme_names_the_python_of_the_package():
    (least,) = re.findall(r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"Python {least}" in README.read_text(encoding="utf-8")


def table_rows(document: str) -> list[list[str]]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [line.strip("|").replace("\\|", "/").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_all_settings_are_listed_with_their_defaults():
    rows = [(re.findall(r"`([a-z]+\.\w+)`", cells[0]), cells) for cells in table_rows("docs/search-space.md")]
    assert [name for names, _ in rows for name in names] == [*SETTINGS]
    defaults = RunConfig.from_flat({}).to_flat()
    for names, cells in rows:
        if len(names) == 1 and (number := re.fullmatch(r"`?([\w.]+)`?", cells[1].strip())):
            assert number[1] in (str(defaults[names[0]]).removesuffix(".0"), "none"), cells


def test_all_options_of_search_are_listed():
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module("raytune_emotion.search").add_arguments(parser)
    options = {action.option_strings[0] for action in parser._actions}
    listed = {cells[0].strip(" `").split()[0] for cells in table_rows("docs/searching.md")}
    assert options == {word for word in listed if re.match(r"--\w", word) and word != "--objective`"}


def test_files_columns_and_metrics_are_listed():
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name in (*FILES["study"], "params.json", "history.jsonl", *FILES["confirmation"], *FILES["export"]):
        assert f"`{name}" in text, f"{name} is not described"
    for column in COLUMNS:
        assert f"`{column}`" in text or column.startswith("val_"), f"{column} is not described"
    probs = torch.full((1, len(EMOTIONS)), 1 / len(EMOTIONS))
    for metric in per_sample(probs.log(), probs, distances_of(EMOTIONS)):
        assert f"`{metric}`" in text, f"{metric} is not defined"


def test_uris_that_show_where_credentials_are_can_be_used():
    """Only opened, without a request. That of S3 would ask for the bucket's region."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("### Credentials")[2]
    opened = {}
    for uri in re.findall(r"^\| `((?:gs|abfs)://[^`]+)`", text, re.MULTILINE):
        remote.refuse_credentials(uri)
        filesystem, opened[uri] = remote._open(uri)
        assert filesystem.type_name in remote._COPY
    assert [*opened.values()] == ["bucket/faces", "container/faces"]


def test_all_included_spaces_are_listed():
    listed = {*re.findall(r"^\| \[`(\w+)`\]", (ROOT / "search_spaces/README.md").read_text(), re.MULTILINE)}
    assert listed == {file.stem for file in (ROOT / "search_spaces").glob("*.yaml")}


def test_library_is_listed():
    text = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    assert [name for name in raytune_emotion.__all__ if name[0] != "_" and f"`{name}" not in text] == []
