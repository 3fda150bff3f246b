import subprocess
import sys

import pytest

from raytune_emotion.tuning.execution.worker_group import run_in_background


def test_an_action_in_the_background_gives_its_result_or_raises_its_error():
    assert run_in_background(lambda: 3).result(timeout=10) == 3
    with pytest.raises(ZeroDivisionError):
        run_in_background(lambda: 1 / 0).result(timeout=10)


def test_a_process_ends_though_an_action_in_the_background_does_not():
    code = (
        "import time; from raytune_emotion.tuning.execution.worker_group import run_in_background; "
        "run_in_background(lambda: time.sleep(600)); print('end')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "end\n")
