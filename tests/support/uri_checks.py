"""The check of a URI in this process: the child that does it takes half a core-second."""

import contextlib
import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from raytune_emotion.storage import remote


def _run(command, **options):
    """Do what the child of `remote.check` does."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(options["input"]))
        remote._check()
    return subprocess.CompletedProcess(command, 0, said.getvalue(), "")


#: In place of the module `subprocess` in `remote`.
IN_THIS_PROCESS = SimpleNamespace(run=_run, TimeoutExpired=subprocess.TimeoutExpired)
