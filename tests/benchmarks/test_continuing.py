"""The times between stretches of training."""

import pandas as pd
import pytest

from benchmarks.continuing import NEW, PAUSED, SAME, waits_of


def test_times_between_stretches_are_told_apart_by_what_is_trained_next():
    rows = [
        ("0000", 1, 105.0, 5.0),
        ("0000", 2, 109.5, 9.0),  # it goes on after 0.5 s and pauses
        ("0001", 1, 106.0, 6.0),
        ("0001", 2, 120.5, 20.0),  # the other place; it ends there
        ("0002", 1, 114.5, 3.0),  # begins after 2 s, and is ended
        ("0000", 3, 121.0, 14.0),  # continues after 1.5 s
        ("0003", 1, 125.0, 3.5),  # begins after 1 s
    ]
    columns = ["trial_id", "report", "time", "seconds"]
    curves = pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)
    waits = waits_of(curves, {"0000": 1})
    assert waits == {
        SAME: [pytest.approx(0.5)] * 2,
        NEW: [pytest.approx(2.0), pytest.approx(1.0)],
        PAUSED: [pytest.approx(1.5)],
    }
