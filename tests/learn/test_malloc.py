import psutil
import torch

from raytune_emotion.learn.malloc import keep_freed_memory, return_freed_memory


def resident():
    return psutil.Process().memory_info().rss


def test_memory_is_kept_until_it_is_given_back():
    keep_freed_memory()
    return_freed_memory()  # what other tests have left
    before = resident()
    tensor = torch.ones(64, 2**20)  # 256 MiB
    assert resident() - before > 200 * 2**20
    del tensor
    assert resident() - before > 200 * 2**20
    return_freed_memory()
    assert resident() - before < 50 * 2**20
