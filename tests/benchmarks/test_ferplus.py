"""The sums of the FER+ benchmark, without its runs."""

from pathlib import Path

import pytest

from benchmarks import ferplus
from benchmarks.ferplus import SPACE, Plan

SEARCHED = """trial_id,status,epochs,best_val_js,val_kl,val_accuracy,seconds,model.pretrained
0001,complete,2,0.12,0.37,0.81,30,True
0002,pruned,1,0.29,0.78,0.62,15,False
0003,running,,,,,,True
"""
CONFIRMED = """trial_id,status,val_js,val_kl,val_accuracy
0000,complete,0.12,0.40,0.80
0001,complete,0.14,0.42,0.78
0002,failed,0.90,3.00,0.10
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that are run; each leaves the tables that it would leave."""
    run: list[list[str]] = []

    def timed(command):
        run.append(command)
        folder = tmp_path / "ferplus" / ("confirmed" if "raytune_emotion.confirm" in command else "")
        folder.mkdir(exist_ok=True)
        (folder / "trials.csv").write_text(CONFIRMED if folder.name == "confirmed" else SEARCHED)
        return 0, 60.0

    monkeypatch.setattr(ferplus, "run_timed", timed)
    return run


def test_js_kl_and_accuracy_are_means_over_fresh_seeds(commands, tmp_path):
    table = ferplus.study(Plan("faces", "weights", SPACE, 64, 8, 600, 3), tmp_path)
    rows = dict(table.rows)
    assert rows["JS, bits on PublicTest, 2 fresh seeds"] == "0.1300 ± 0.0100"
    assert rows["KL, nats on PublicTest, 2 fresh seeds"] == "0.4100 ± 0.0100"
    assert rows["accuracy on PublicTest, 2 fresh seeds"] == "0.7900 ± 0.0100"
    assert rows["best JS from ImageNet weights, bits"] == 0.12
    assert rows["best JS from scratch, bits"] == 0.29
    search, confirm = commands
    assert search[search.index("--weights-dir") + 1] == "weights"
    assert search[search.index("--time-budget") + 1] == "600s"
    assert confirm[-5:] == [str(Path(tmp_path) / "ferplus"), "--top", "1", "--seeds", "3"]


def test_a_space_without_both_starts_is_summed_up_too(commands, tmp_path, monkeypatch):
    table = "trial_id,status,epochs,best_val_js,val_kl,val_accuracy,seconds\n0000,complete,1,0.3,0.8,0.6,9\n"
    monkeypatch.setattr(f"{__name__}.SEARCHED", table)
    rows = dict(ferplus.study(Plan("faces", None, SPACE, 1, 1, 60, 2), tmp_path).rows)
    assert rows["best JS from the start of the space, bits"] == 0.3
    assert "--weights-dir" not in commands[0]


def test_a_search_that_has_not_begun_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ferplus, "run_timed", lambda command: (1, 5.0))
    table = ferplus.study(Plan("faces", None, SPACE, 1, 1, 60, 2), tmp_path)
    assert dict(table.rows)["exit code"] == 1
    assert table.notes == ["No trial has begun."]
