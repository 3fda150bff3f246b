"""The contest of real studies, here with studies that say at once what they found."""

import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.curves import contest


def test_what_is_kept_of_a_contest_is_of_its_data_alone_and_counts_with_its_time(tmp_path, monkeypatch):
    clock, ran, written = [0.0], [], []

    def study(name, asked):
        ran.append((name, asked.seed))
        clock[0] += 150.0
        return [(1.0, 0.25)]

    def prepare(data, image_size):
        return SimpleNamespace(path=data, fingerprint=data.name * 20)

    monkeypatch.setattr(contest, "_study", study)
    monkeypatch.setattr(contest, "prepare", prepare)
    monkeypatch.setattr(contest, "write_result", lambda name, table, began, took, command: written.append(took))
    monkeypatch.setattr(contest, "_draw", lambda *_: None)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def compete(data):
        argv = ["contest", "--data", data, "--seeds", "1", "--keep", str(tmp_path / "kept")]
        monkeypatch.setattr(sys, "argv", argv)
        ran.clear()
        assert contest.main() == 0
        return len(ran)

    assert (compete("a"), compete("a"), compete("b")) == (5, 0, 5)
    assert written == [pytest.approx(5 * 150.0)] * 3
