import io

import pytest
from rich.console import Console

from raytune_emotion.tuning.execution.recorder import Event
from raytune_emotion.tuning.report.console import _line, _progress
from raytune_emotion.tuning.study.open_study import load, make_study
from raytune_emotion.tuning.study.optuna_study import Proposal
from tests.support.reports import make_report
from tests.support.studies import spec_of


@pytest.fixture
def shown(tmp_path, store):
    """What the bar shows after some events."""
    make_study(tmp_path / "study", spec_of(store, baseline={"js": 0.4, "kl": 1.2}))

    def show(*events):
        console = Console(file=io.StringIO(), force_terminal=True, width=200)
        with _progress(console, load(tmp_path / "study")) as watch:
            for event in events:
                watch(event)
        return [line for line in console.file.getvalue().splitlines() if "0/4" in line or "1/4" in line][-1]

    return show


def event(trial_id, status, js=None, reason="", **settings):
    return Event(Proposal(trial_id, settings, None), status, make_report(1, js) if js else None, reason)


def test_the_bar_shows_no_best_before_a_trial_has_one(shown):
    """The baseline is no trial's."""
    assert "no evaluation yet" in shown(event("0000", "running"))
    assert "best 0.4700" in shown(event("0000", "running", 0.47)), "though the baseline is better"


def test_a_failed_trial_is_not_the_best_in_the_bar(shown):
    failed = [event("0000", "running", 0.1), event("0000", "failed", reason="diverged")]
    assert "no evaluation yet" in shown(*failed)
    assert "best 0.3000" in shown(event("0001", "running", 0.3), *failed)


def test_a_line_leaves_out_losses_without_weight():
    line = _line(event("0000", "complete", 0.3, **{"loss.kl": 0.996, "loss.ce": 0.004, "optim.lr": 0.001}))
    assert "kl 1.00" in line
    assert "ce" not in line.replace("complete", "")
