"""How soon a command answers: nothing heavy is imported before its arguments are looked at."""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_emotion.cli import COMMANDS
from raytune_emotion.tuning.execution import gpu_presence
from raytune_emotion.tuning.study.spec import write_spec
from tests.support.studies import spec_of

#: Each takes a second or more to import.
_HEAVY = {"torch", "timm", "ray", "pandas", "scipy", "matplotlib", "tensorboard"}


@dataclass(frozen=True)
class Answer:
    """What came of a command."""

    code: int
    said: str  # on standard error
    imported: tuple[str, ...]  # of the heavy libraries, by this command or one before it


def answers(commands: Sequence[Sequence[str]], cwd: Path) -> list[Answer]:
    """Run commands one after the other in a process that has imported nothing."""
    code = (
        "import contextlib, io, json, sys\n"
        "from raytune_emotion.__main__ import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):\n"
        "        try: code = main(argv)\n"
        "        except SystemExit as ended: code = ended.code\n"
        f"    print(json.dumps([code, said.getvalue(), sorted({_HEAVY!r} & {{*sys.modules}})]))"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Answer(code, said, tuple(names)) for code, said, names in map(json.loads, done.stdout.splitlines())]


_NO_STUDY = "none: no such folder; name a folder that a search has made"
_NO_EXPORT = "none: no such folder; name a folder that export, search or train wrote"
WRONG = [
    (("search", "--space", "none.yaml"), "none.yaml: the search space cannot be read"),
    (("search", "--space", "nobody"), "nobody: no such search space; choose one of "),
    (("search", "--space", "bad.yaml"), "bad.yaml:1: model.backbone: resnet81: no such timm model"),
    (("search", "--data", "none"), "none: no such folder"),
    (("search", "--gpus-per-worker", "2"), "a worker trains on one GPU; ask for more --workers-per-trial"),
    (("search", "--resume"), "ray_results: contains no study to resume"),
    (("search", "--resume", "--dry-run"), "--resume: --dry-run shows what a new study would do"),
    (("train", "--data", "none"), "none: no such folder"),
    (("train", "--set", "lr=1"), "lr: unknown setting; did you mean optim.lr?"),
    (("train", "--set", "optim.wd=1"), "optim.wd: unknown setting; did you mean optim.weight_decay?"),
    (("train", "--data", "none", "--set", "model.backbone=resnet81"), "resnet81: no such timm model"),
    (("pack", "none", "store"), "none: no such folder"),
    (("confirm", "none"), _NO_STUDY),
    (("report", "none"), _NO_STUDY),
    (("export", "none", "dest"), _NO_STUDY),
    (("export", "none", "dest", "--format", "timm,tflite"), "--format tflite: unknown format; choose one of "),
    (("status", "none"), _NO_STUDY),
    (("predict", "none", "face.jpg"), _NO_EXPORT),
    (("demo", "none"), _NO_EXPORT),
    (("demo", "none", "--port", "0"), "expected a port from 1 to 65535, got '0'"),
]
_RESUME = ("search", "--resume", "--results", "r", "--name")
WRONG_FOR_STUDIES = [
    ((*_RESUME, "study", "--seed", "4"), "--seed: a study keeps the seed that it began with, 3; leave the option out"),
    (
        (*_RESUME, "study", "--space", "demo"),
        "--space: a study keeps the space that it began with; leave the option out",
    ),
    ((*_RESUME, "study", "--epochs", "1"), "--epochs: a resumed study cannot have fewer epochs than before (2); raise"),
    ((*_RESUME, "confirmation"), "is a confirmation; continue it with `python -m raytune_emotion.confirm "),
    ((*_RESUME, "damaged"), "damaged (epochs: Input should be a valid integer, got 'many'); restore it from a copy"),
    (("train", "--study", "r/study", "--trial", "7"), "r/study: no trial 7; no trial has begun"),
    (("export", "r/study", "dest", "--trial", "7"), "r/study: no trial 7; no trial has begun"),
]
HELP = {(verb, option): code for verb in COMMANDS for option, code in (("--help", 0), ("--mistyped", 2))}
ABSENT_GPU = [
    ("search", "--gpus-per-worker", "1"),
    ("search", "--gpus-per-worker", "auto"),
    (*_RESUME, "study", "--gpus-per-worker", "0.5"),
    ("train", "--data", "none", "--gpus-per-worker", "1"),
    ("confirm", "r/study", "--gpus-per-worker", "1"),
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> dict[tuple[str, ...], Answer]:
    """What came of all these commands, which run one after the other in one process."""
    cwd = tmp_path_factory.mktemp("doors")
    (cwd / "bad.yaml").write_text("model.backbone: {choice: [resnet81]}\n")
    for name, changes in (("study", {}), ("confirmation", {"confirms": {"0000": 0.1}}), ("damaged", {})):
        folder = cwd / "r" / name  # of which there is the spec alone
        folder.mkdir(parents=True)
        write_spec(folder, spec_of(SimpleNamespace(image_size=32, path="store", fingerprint="0"), **changes))
    file = cwd / "r" / "damaged" / "study.yaml"
    file.write_text(file.read_text().replace("epochs: 2", "epochs: many"))
    # The last may import PyTorch, where there is a GPU.
    commands = [*HELP, *(argv for argv, _ in (*WRONG, *WRONG_FOR_STUDIES)), *ABSENT_GPU]
    return dict(zip(commands, answers(commands, cwd), strict=True))


def test_help_and_a_mistyped_option_answer_at_once(answered):
    assert [(answered[argv].code, answered[argv].imported) for argv in HELP] == [(code, ()) for code in HELP.values()]


@pytest.mark.skipif(gpu_presence.may_have_gpu(), reason="there may be a GPU")
@pytest.mark.parametrize("argv", ABSENT_GPU)
def test_a_gpu_is_refused_without_pytorch_where_there_is_none(answered, argv):
    answer = answered[argv]
    assert (answer.code, answer.imported) == (2, ())
    assert "this machine has no GPU that PyTorch can use; use --gpus-per-worker 0 to" in answer.said


def test_a_gpu_is_left_to_pytorch_where_a_driver_is_installed(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    gpu_presence.refuse_absent_gpu(1.0, address=None)


def test_a_cluster_decides_about_its_gpus():
    gpu_presence.refuse_absent_gpu(1.0, address="auto")


@pytest.mark.parametrize(("argv", "said"), [*WRONG, *WRONG_FOR_STUDIES])
def test_wrong_input_is_refused_before_anything_heavy_is_imported(answered, argv, said):
    answer = answered[argv]
    assert (answer.code, answer.imported) == (2, ())
    assert said in answer.said
    assert "Traceback" not in answer.said


def test_a_search_that_is_to_be_finished_starts_before_anything_heavy_is_imported(tmp_path):
    """Ray starts meanwhile, where nothing else has imported PyTorch before."""
    study = tmp_path / "r" / "study"  # of which there is the spec alone
    study.mkdir(parents=True)
    write_spec(study, spec_of(SimpleNamespace(image_size=32, path="store", fingerprint="0")))
    code = (
        "import sys\n"
        "from raytune_emotion.tuning.session import run_search\n"
        "from raytune_emotion.__main__ import main\n"
        f"run_search._search = lambda *_: print(sorted({_HEAVY!r} & {{*sys.modules}}))\n"
        "run_search._finish = lambda *_: None\n"
        "main(['search', '--resume', '--finish', '--results', 'r', '--name', 'study'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_search_says_what_it_does_before_anything_heavy_is_imported(tmp_path):
    code = (
        "import sys\n"
        "class FirstWord:\n"
        "    said = ''\n"
        "    def write(self, text):\n"
        f"        self.said = self.said or text.strip() + str(sorted({_HEAVY!r} & {{*sys.modules}}))\n"
        "    def flush(self): pass\n"
        "    def isatty(self): return False\n"
        "sys.stderr = FirstWord()\n"
        "from raytune_emotion.__main__ import main\n"
        "main(['search', '--data', 'none'])\n"
        "print(sys.stderr.said)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "reading the search space and the data[]\n"
