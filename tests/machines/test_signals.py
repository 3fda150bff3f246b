"""How signals end the commands that take long: in order, whenever they come.

Each case starts Ray or imports much, and takes up to a minute. Not part of `make test`: run them by
`make machines`.
"""

import signal
import time

import pytest

from tests.machines.running import ENDLESS, assert_whole

pytestmark = pytest.mark.timeout(300)

SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_the_process_group_ends_a_search_in_order(folder, search, name):
    running = search()
    running.signal_group(getattr(signal, name))
    code, out = running.ended()
    assert code == 130
    assert out.rstrip().endswith("interrupted")
    assert_whole(folder / "r" / "s", out)


@pytest.mark.parametrize(
    "names", [["SIGINT", "SIGTERM", "SIGTERM", "SIGINT"], ["SIGINT", "SIGINT"]], ids=["four", "ctrl-c twice"]
)
def test_further_signals_do_not_break_off_the_ending_of_a_search(folder, search, names):
    running = search()
    for name in names:
        running.signal_group(getattr(signal, name))
        time.sleep(1.5)
    code, out = running.ended()
    assert code == 130
    assert_whole(folder / "r" / "s", out)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_train_in_order(folder, train, name, workers):
    running = train("--workers", workers)
    running.signal_group(getattr(signal, name))
    code, out = running.ended()
    assert code == 130
    assert (folder / "r" / "t" / "best" / "model.safetensors").exists()
    resume = "python -m raytune_emotion.train --resume --results r --name t"
    assert f"to continue: {resume}" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("names", [["SIGINT"], ["SIGTERM"], ["SIGHUP"], ["SIGINT", "SIGINT"]], ids=" ".join)
def test_a_signal_ends_confirm_in_order(folder, confirm, names):
    running = confirm()
    for name in names:
        running.signal_group(getattr(signal, name))
        time.sleep(1.5)
    code, out = running.ended()
    assert code == 130
    for name in ("trials.csv", "curves.parquet", "confirmed.csv", "report.html"):
        assert (folder / "r" / "s" / "confirmed" / name).exists()
    assert "the same command continues: python -m raytune_emotion.confirm r/s --top 1 --seeds 2" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("verb", ["search", "train", "confirm"])
def test_a_signal_while_a_command_concludes_leaves_everything_written(folder, verb, request):
    """The last report has come: what follows is the end of the session, tables, page and export."""
    running = request.getfixturevalue(verb)(epochs=3)
    study = {"search": folder / "r/s", "train": folder / "r/t", "confirm": folder / "r/s/confirmed"}[verb]
    running.wait_for_reports(study, number=3)
    for _ in range(12):
        if running.process.poll() is None:
            running.signal_group(signal.SIGTERM)
        time.sleep(0.5)
    code, out = running.ended()
    assert code in (0, 130)
    assert "Traceback" not in out
    if verb == "confirm":
        assert (study / "confirmed.csv").exists()
    else:
        assert (study / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 4.0, 8.0])
@pytest.mark.parametrize("verb", ["search", "train", "confirm"])
def test_an_interruption_in_the_first_seconds_is_no_traceback(folder, start, verb, seconds):
    options = {
        "search": ["--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s"],
        "train": ["--data", "tiny", "--results", "r", "--name", "t", "--epochs", ENDLESS],
        "confirm": ["nowhere"],
    }
    running = start(verb, *options[verb])
    time.sleep(seconds)
    if running.process.poll() is None:
        running.signal_group(signal.SIGINT)
    code, out = running.ended()
    assert code in (130, 2 if verb == "confirm" else 130), out
    assert "Traceback" not in out


def test_a_signal_while_ray_starts_ends_a_search_in_order(folder, start):
    """Ray handles SIGTERM by itself then, if it may: it would end the search with a code of its own."""
    running = start("search", "--data", "tiny", "--space", "tiny.yaml", "--results", "r", "--name", "s")
    for line in running.process.stdout:
        if line == "starting Ray\n":
            break
    time.sleep(1)
    running.signal_group(signal.SIGTERM)
    code, out = running.ended()
    assert code == 130, out
    assert out.rstrip().endswith("interrupted")
    assert "Traceback" not in out
