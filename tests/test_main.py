import errno
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_emotion.__main__ import main
from raytune_emotion.cli import COMMANDS, run_guarded
from raytune_emotion.config import SETTINGS
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.errors import UserError
from raytune_emotion.tuning.policy.decisions import SCHEDULERS
from tests.support.commands import exit_code, started_as


def test_wrong_input_is_a_sentence_each_and_exit_code_2(capsys):
    def action():
        raise UserError(["a.txt: empty; delete it", "b.txt: holds text"])

    assert run_guarded(action) == 2
    assert capsys.readouterr().err == "error: a.txt: empty; delete it\nerror: b.txt: holds text\n"


def test_an_error_is_one_line_whatever_is_named(capsys):
    def action():
        raise UserError(["a\nb.txt: empty; delete it", "c.txt: holds text"])

    assert run_guarded(action) == 2
    assert capsys.readouterr().err == "error: a\\nb.txt: empty; delete it\nerror: c.txt: holds text\n"


def test_interruption_is_exit_code_130():
    def action():
        raise KeyboardInterrupt

    assert run_guarded(action) == 130


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_guarded(lambda: 1 // 0)

    def refused():
        raise PermissionError(errno.EPERM, "it says not of which file")

    with pytest.raises(PermissionError):
        run_guarded(refused)


def test_a_full_disk_is_said_without_a_traceback(capsys):
    def action():
        raise OSError(errno.ENOSPC, "No space left on device", "trials.csv")

    assert run_guarded(action) == 1
    assert capsys.readouterr().err.startswith("error: no space left on the disk: ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_place_that_the_system_refuses_is_a_sentence(number, capsys):
    def action():
        raise OSError(number, "No, it says", "faces/train_set")

    assert run_guarded(action) == 2
    assert capsys.readouterr().err == (
        "error: faces/train_set: No, it says; name another path, or change its permissions\n"
    )


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself_in_the_words_that_it_was_started_by(verb, capsys):
    for program, words in (
        ("bin/raytune-emotion", "raytune-emotion "),
        ("search.py", "python -m raytune_emotion."),
    ):
        with started_as(program):
            assert exit_code([verb, "--help"]) == 0
        assert f"usage: {words}{verb} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "sentences"),
    [
        (["serach"], ["VERB: unknown value 'serach'; did you mean search?"]),
        (
            ["search", "--spaec", "demo", "--trils=3"],
            [
                "--spaec: unknown option; did you mean --space?",
                "--trils: unknown option; did you mean --trials?",
            ],
        ),
        (["confirm", "study", "--seed=7"], ["--seed: unknown option; did you mean --seeds?"]),
        (["search", "--sampler", "tpee"], ["--sampler: unknown value 'tpee'; did you mean tpe?"]),
        (["search", "--scheduler", "x"], ["--scheduler: unknown value 'x'; choose one of {SCHEDULERS}"]),
        (["search", "--trials", "0"], ["--trials: expected an integer from 1 to 1000000, got '0'"]),
        (["search", "--space", "dmeo"], ["--space: dmeo: no such search space; did you mean demo?"]),
        (["predict", "x", "y", "--format", "json"], ["--format: unknown value 'json'; did you mean jsonl?"]),
        (["predict"], ["the following arguments are required: EXPORT, IMAGE"]),
        (["status", "a", "b"], ["b: unexpected argument; leave it out"]),
        (["status", "a", "b\nc"], ["b\\nc: unexpected argument; leave it out"]),
    ],
)
def test_a_mistyped_command_is_a_sentence_each_and_where_help_is(argv, sentences, capsys):
    with started_as("raytune-emotion"):
        assert exit_code(argv) == 2
    *errors, help_line = capsys.readouterr().err.splitlines()
    assert errors == [f"error: {said.format(SCHEDULERS=', '.join(SCHEDULERS))}" for said in sentences]
    verb = argv[0] if argv[0] in COMMANDS else ""
    assert help_line == f"see {' '.join(['raytune-emotion', verb]).strip()} --help"


def test_a_mistyped_format_of_an_export_has_a_suggestion(capsys, tmp_path):
    assert exit_code(["export", tmp_path, tmp_path / "x", "--format", "onx", "--trial", "1"]) == 2
    assert "error: --format onx: unknown format; did you mean onnx?\n" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "words"), [("train", SETTINGS), ("pack", EMOTIONS)])
def test_help_names_settings_and_classes_without_breaking_a_word(verb, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ([sys.executable, "-m", "raytune_emotion.predict"], "python -m raytune_emotion.predict"),
        ([sys.executable, "-m", "raytune_emotion", "predict"], "python -m raytune_emotion.predict"),
        ([Path(sys.executable).with_name("raytune-emotion"), "predict"], "raytune-emotion predict"),
    ],
)
def test_a_command_is_a_module_and_a_verb_of_the_script(started, words):
    result = subprocess.run(started, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: the following arguments are required: EXPORT, IMAGE\nsee {words} --help\n"


def test_a_share_of_a_gpu_is_one_at_most(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["search", "--gpus-per-worker", "2"])
    assert ended.value.code == 2
    assert "a worker trains on one GPU; ask for more --workers-per-trial" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--weights-dir", "{uri}"],
        ["train", "--config", "{uri}"],
        ["search", "--space", "{uri}"],
        ["search", "--weights-dir", "{uri}"],
    ],
)
@pytest.mark.parametrize("uri", ["s3://bucket/prefix", "file:///nowhere/at/all"])
def test_uri_where_a_path_is_needed_is_refused_and_makes_no_folder(argv, uri, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code([part.format(uri=uri) for part in argv]) == 2
    said = capsys.readouterr().err
    assert f"{uri}: is a URI, but a path of this machine is needed; " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["search", "--results", "{uri}"],
        ["search", "--data", "{uri}"],
        ["search", "--warm-start", "{uri}"],
        ["train", "--data", "{uri}"],
        ["train", "--study", "{uri}"],
        ["train", "--results", "{uri}"],
        ["confirm", "{uri}"],
        ["pack", "{uri}", "dest"],
        ["pack", "source", "{uri}"],
        ["report", "{uri}"],
        ["export", "{uri}", "dest"],
        ["export", "study", "{uri}"],
        ["predict", "{uri}", "face.jpg"],
        ["predict", "export", "{uri}"],
        ["demo", "{uri}"],
    ],
)
def test_credentials_in_a_uri_are_refused_by_every_command(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code([part.format(uri="s3://key:wJalrXUtnFEMI@bucket/a") for part in argv]) == 2
    said = capsys.readouterr().err
    assert "s3://***@bucket/a: contains credentials, which would be written into studies" in said
    assert "wJalrXUtnFEMI" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_had_enough_is_no_error():
    code = "import sys; from raytune_emotion.cli import run_guarded\n"
    code += "def action():\n    for _ in range(100000): print('a line')\n    sys.stdout.flush()\n"
    code += "sys.exit(run_guarded(action))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "1</dev/null 2</dev/null"])
def test_missing_standard_streams_are_no_error_and_no_file_takes_their_numbers(closed, tmp_path):
    program = "import sys; from raytune_emotion.cli import command_main\n"
    program += "ended = command_main('status', ['nowhere'])\n"
    program += "file = open('seen', 'w')\n"
    program += "streams = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]\n"
    program += "print('discarded', flush=True)\n"
    program += "file.write(f'{ended} {file.fileno() > 2} {streams}')"
    shell = f'exec "$0" -c "$1" {closed}'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (tmp_path / "seen").read_text() == "2 True [0, 1, 2]"
    assert "Traceback" not in done.stderr


def test_windows_is_told_in_words():
    code = "import sys; sys.modules['fcntl'] = None; import raytune_emotion.predict"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        done.stderr.splitlines()[-1] == "ImportError: raytune_emotion needs Linux or macOS; on Windows, run it in WSL"
    )
