"""What a search says at its end."""

from raytune_emotion.tuning.report.conclusion import gain_over_start
from raytune_emotion.tuning.study.records import TrialRecord
from tests.support.reports import make_report


def trials(*reached, status="complete"):
    return [TrialRecord(f"{i:04d}", status, {}, "", (make_report(1, js),)) for i, js in enumerate(reached)]


def test_it_tells_what_was_gained_over_the_first_trials():
    assert (
        gain_over_start(trials(0.4, 0.35, 0.5, 0.6, 0.3), 0.3)
        == "0.0500 bits over the best of the first 4 trials (0.3500)"
    )
    assert gain_over_start(trials(0.4, 0.35, 0.5, 0.6, 0.4), 0.35).startswith("0.0000 bits over")


def test_it_does_not_boast_of_trials_that_nothing_was_learned_for():
    assert gain_over_start(trials(0.4, 0.35), 0.35).startswith("nothing yet")
    assert gain_over_start(
        trials(0.4, 0.3, 0.3, 0.3, status="failed") + trials(0.4, 0.3, 0.2, 0.1, 0.1)[4:], 0.1
    ).startswith("nothing yet")
