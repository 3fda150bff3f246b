"""How a running study is followed by its events, and drawn."""

import io
import re
import threading

import pytest
from rich.console import Console

from raytune_emotion.terminal import plain_console
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.report import live_state
from raytune_emotion.tuning.report.live_state import StudyProgress
from raytune_emotion.tuning.report.live_view import LiveView
from raytune_emotion.tuning.report.summary import summarize
from raytune_emotion.tuning.study.open_study import load, make_study
from tests.support.events import Clock, event
from tests.support.studies import spec_of, write_study


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(tmp_path, store, clock):
    make_study(tmp_path / "study", spec_of(store, trials=8, epochs=4, baseline={"js": 0.4, "kl": 1.2}))
    return StudyProgress(load(tmp_path / "study"), clock=clock)


def drawn(progress, width=80, height=40):
    """The lines of the view, as a terminal of this size shows them."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(LiveView(progress))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def feed(progress, clock, *events):
    for each in events:
        clock.now += 10
        progress.watch(each)


def test_trials_are_counted_by_their_state(progress, clock):
    feed(progress, clock, *(event(f"000{n}", "running") for n in range(5)))
    feed(progress, clock, event("0000", "complete", 0.3, 4), event("0001", "pruned", 0.4), event("0002", "failed"))
    feed(progress, clock, event("0003", "paused", 0.35))
    now = progress.snapshot()
    assert now.summary.trials == {"complete": 1, "pruned": 1, "failed": 1, "running": 1, "paused": 1}
    assert [trial.proposal.trial_id for trial in now.at_work] == ["0004"]
    counts = drawn(progress)[2]
    assert counts.split("●")[1:] == [f" 1 {state}   " for state in ("complete", "pruned", "failed", "paused")] + [
        " 1 running"
    ]
    feed(progress, clock, event("0003", "running"))  # taken up again
    assert progress.snapshot().summary.trials["paused"] == 0


def test_the_best_trial_is_shown_with_its_settings(progress, clock):
    """The baseline is no trial's, however good."""
    assert "no evaluation yet" in "".join(drawn(progress))
    feed(progress, clock, event("0000", "running", 0.47), event("0001", "running", 0.2, 3.0))
    lines = drawn(progress)
    (best,) = (line for line in lines if line.startswith("best JS"))
    assert best.split()[2:] == [
        "0.2000",
        "bits",
        "trial",
        "0001,",
        "epoch",
        "3",
        "the",
        "training",
        "mean",
        "has",
        "0.4000",
    ]
    text = "\n".join(lines)
    assert "model.backbone test_resnet" in text
    assert "0.006123" in text
    assert "loss.ce" not in text, "a loss without weight is left out"


def test_the_expected_gain_is_shown_where_it_is_known(progress, clock):
    feed(progress, clock, event("0000", "running", 0.4), event("0000", "complete", 0.3))
    assert not any(line.startswith("gain") for line in drawn(progress))
    feed(progress, clock, event("0001", "pruned", 0.4, gain=Gain(0.00123, 0.5)), event("0002", "running", 0.4))
    assert progress.snapshot().summary.expected_gain_per_hour == pytest.approx(3600 * 0.00123 / 0.5)
    assert "gain        0.0012 bits expected of 0.5 s more training (8.9 an hour)" in drawn(progress)


def test_a_failed_trial_is_never_the_best(progress, clock):
    feed(progress, clock, event("0001", "running", 0.3), event("0000", "running", 0.1))
    feed(progress, clock, event("0000", "failed", reason="diverged"))
    now = progress.snapshot().summary
    assert (now.best.trial_id, now.best.val_js) == ("0001", 0.3)
    assert now.best_js_by_time[-1][1] == 0.3
    assert min(js for _, js in now.best_js_by_time) == 0.3


def test_a_trial_of_an_earlier_session_that_fails_leaves_the_line(tmp_path, store, clock):
    write_study(tmp_path / "study", store)
    study = load(tmp_path / "study")
    progress = StudyProgress(study, clock=clock)
    best = progress.snapshot().summary.best.trial_id
    feed(progress, clock, event(best, "running"), event(best, "failed", reason="diverged"))
    now = progress.snapshot().summary
    assert now.best.trial_id != best
    assert min(js for _, js in now.best_js_by_time) == now.best.val_js
    assert f"{now.best.val_js:.4f} bits" in "\n".join(drawn(progress))


def test_rate_and_time_left_follow_from_the_time_in_which_trials_were_at_work(progress, clock):
    assert progress.snapshot().end_in is None
    feed(progress, clock, event("0000", "running"), event("0000", "complete", 0.3), event("0001", "running"))
    feed(progress, clock, event("0001", "pruned", 0.4))
    now = progress.snapshot()  # two of eight ended in 30 s: the session's first 10 s were without a trial
    assert now.summary.trials_per_hour == pytest.approx(2 / 30 * 3600)
    assert now.end_in == pytest.approx(6 * 15)
    assert "240 trials an hour  ·  about 1 min 30 s left" in "".join(drawn(progress))
    feed(progress, clock, event("0002", "paused", 0.3, 2.0), event("0003", "running", 0.3, 1.0))
    now = progress.snapshot()  # and half of one and a quarter of another, of four epochs, in 50 s
    assert now.summary.trials_per_hour == pytest.approx(2 / 50 * 3600)
    assert now.end_in == pytest.approx((8 - 2.75) * 50 / 2.75)


def test_the_rate_of_a_study_that_went_on_is_that_of_status(tmp_path, store, clock):
    write_study(tmp_path / "study", store)
    study = load(tmp_path / "study")
    progress = StudyProgress(study, clock=clock)
    feed(progress, clock, event("0003", "running"), event("0003", "complete", 0.3, 2.0))
    now = progress.snapshot().summary
    before = summarize(study, study.records(), now=0.0)
    assert now.trials_per_hour == pytest.approx(4 / (before.active_seconds + 10) * 3600)


def test_the_view_does_not_wait_for_a_look_at_the_disk(progress, clock, monkeypatch):
    goes_on, looks = threading.Event(), []

    def look(folder):
        looks.append(folder)
        goes_on.wait(60)
        return live_state.Disk(7, 8)

    monkeypatch.setattr(live_state, "disk_of", look)
    assert progress.disk().used is progress.disk().used is None
    assert progress.disk().free > 0
    assert re.search(r"disk +[0-9.]+ [A-Z]+ free", "".join(drawn(progress)))
    goes_on.set()
    assert progress._has_looked.wait(60)
    clock.now += live_state._DISK_S - 1
    assert progress.disk() == live_state.Disk(7, 8)
    assert len(looks) == 1
    clock.now += 2
    progress.disk()
    assert progress._has_looked.wait(60)
    assert len(looks) == 2


def test_a_study_that_goes_on_counts_what_it_has_and_leaves_the_pause_out(tmp_path, store, clock):
    write_study(tmp_path / "study", store)
    study = load(tmp_path / "study")
    progress = StudyProgress(study, clock=clock)
    before = progress.snapshot()
    assert before.summary.trials["complete"] == before.ended == 3
    assert before.session_seconds == 0.0
    reached, best = before.summary.best_js_by_time[-1]
    assert before.summary.best.val_js == best
    feed(progress, clock, event("0003", "running", best / 2))
    assert progress.snapshot().summary.best_js_by_time[-1] == (pytest.approx(reached + 10), best / 2)


def test_each_worker_is_shown_with_what_it_does(progress, clock):
    feed(progress, clock, event("0000", "running", 0.3, 2.5), event("0001", "running"))
    first, second = drawn(progress, width=120)[-2:]
    assert first.split()[2:] == [
        "0000", "━" * 10 + "─" * 6, "2.5", "of", "4", "0.3000", "1,234", "img/s", "test_resnet", "process", "4711"
    ]  # fmt: skip
    assert second.split()[0] == "0001"
    assert "no evaluation yet, 0 s" in second
    feed(progress, clock, event("0001", "running", 0.3, worker=("node-b", 7)))
    assert [line[line.index("node") :] for line in drawn(progress, width=120)[-2:]] == [
        "node-a, process 4711",
        "node-b, process 7",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("height", [20, 50])
def test_the_view_fits_any_screen(progress, clock, width, height):
    many = {f"augment.setting_{n}": "a rather long value" * 3 for n in range(30)}
    feed(progress, clock, *(event(f"{n:04d}", "running", 0.4 - n / 1000, settings=many) for n in range(64)))
    lines = drawn(progress, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    rows = [line for line in lines if re.match(r"(at work)? +\d{4} [━─]", line)]
    assert lines[-1].split() == ["and", str(64 - len(rows)), "more"]


def test_text_from_outside_is_no_markup_and_no_control_code(progress, clock):
    bad = {"model.backbone": "[red]a[/b]\x1b[2J", "optim.name": "[/]:smile:"}
    feed(progress, clock, event("[b]1", "running", 0.3, worker=("[link=x]h\x07", 1), settings=bad))
    feed(progress, clock, event("0001", "running", 0.4, worker=("other", 1)))
    text = "\n".join(drawn(progress, width=160))
    for shown in ("[red]a[/b]", "[/]:smile:", "[b]1", "[link=x]h\\x07"):
        assert shown in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text


def test_a_plain_console_draws_the_same(progress, clock, monkeypatch, capsys):
    """It lets the terminal break lines elsewhere."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "40")
    feed(progress, clock, event("0000", "running", 0.3))
    progress.disk()
    assert progress._has_looked.wait(60)
    plain_console().print(LiveView(progress))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == drawn(progress)
