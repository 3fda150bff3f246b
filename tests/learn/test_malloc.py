import subprocess
import sys

_SCRIPT = r"""
import re
from pathlib import Path

import torch

from raytune_emotion.learn.malloc import keep_freed_memory, return_freed_memory


def own_memory():
    return int(re.search(r"^Anonymous: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) / 1024


keep_freed_memory()
before = own_memory()
torch.ones(64, 2**20)  # 256 MiB, freed at once: memory in use above them would keep them, too
assert own_memory() - before > 200
return_freed_memory()
assert own_memory() - before < 50
"""


def test_memory_is_kept_until_it_is_given_back():
    """In a process of its own, because other tests free memory, too."""
    subprocess.run([sys.executable, "-c", _SCRIPT], check=True)
