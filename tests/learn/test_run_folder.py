import json
import subprocess
import sys

import pytest

from raytune_emotion.errors import UserError
from raytune_emotion.learn.report import DRIVER_KEYS
from raytune_emotion.learn.run_folder import HISTORY, read_history

REPORTS = [
    {**dict.fromkeys(DRIVER_KEYS, 0.5), "report": n, "finished": n == 2, "val_js": 0.5, "time": 1.5} for n in (1, 2)
]
LINES = [json.dumps(report) + "\n" for report in REPORTS]


def test_reports_are_read_in_order(tmp_path):
    (tmp_path / HISTORY).write_text("".join(LINES))
    assert read_history(tmp_path) == REPORTS


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / HISTORY).write_text("".join(LINES)[:-10])
    assert read_history(tmp_path) == REPORTS[:-1]


@pytest.mark.parametrize(
    "history",
    [
        b'{"report": 1, \n{"report": 2}\n',
        b'{"report": \xff1}\n',
        b"[]\n",
        LINES[0].replace("0.5", '"0.5"').encode(),
        LINES[0].replace('"report": 1', '"report": 0').encode(),
        LINES[0].replace("false", "0").encode(),
        LINES[0].replace("1.5", "1e300").encode(),
        LINES[0].replace('"val_js": 0.5', f'"val_js": {2**60}').encode(),
    ],
)
def test_a_line_torn_elsewhere_is_a_fault(tmp_path, history):
    (tmp_path / HISTORY).write_bytes(history)
    with pytest.raises(UserError, match=HISTORY):
        read_history(tmp_path)


def test_a_loss_of_a_diverged_run_may_be_huge(tmp_path):
    report = {**REPORTS[1], "val_kl": 1e30, "train_loss": 2.0**60}
    (tmp_path / HISTORY).write_text(json.dumps(report) + "\n")
    assert read_history(tmp_path) == [report]


def test_there_is_no_history_before_the_first_report(tmp_path):
    assert read_history(tmp_path) == []


def test_a_study_is_summed_up_without_pytorch():
    """It takes seconds to be imported, and `status` is looked at often."""
    line = "import sys, raytune_emotion.tuning.report.summary; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], check=True)
