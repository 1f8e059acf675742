"""The packing rule: fewest groups, no empty slot, a global block of bounded length."""

import pytest

from vllm_yocou.kv_cache import MAX_GLOBAL_BLOCK, Packing, choose_packing


def packing(windows: int, block: int, window_bytes: int = 1024, global_bytes: int = 1024, **limits) -> Packing:
    return choose_packing(windows, block, window_bytes, global_bytes, **limits)


@pytest.mark.parametrize("block, layers, groups", [(32, 15, 3), (16, 30, 2)], ids=["cpu", "cuda"])
def test_the_papers_shape_needs_few_groups(block, layers, groups):
    """T = 3, S = 10, where one group a layer and iteration would make 31."""
    chosen = packing(30, block)
    assert chosen == Packing(layers, block, layers * block)
    assert 30 // chosen.layers_per_block + 1 == groups


@pytest.mark.parametrize("windows", [1, 2, 5, 7, 12, 30, 36, 77])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("window_bytes, global_bytes", [(8, 8), (8, 4), (4, 8), (6, 8), (8, 5)])
def test_every_window_page_finds_room_and_no_group_is_ragged(windows, block, window_bytes, global_bytes):
    chosen = packing(windows, block, window_bytes, global_bytes)
    F = chosen.layers_per_block
    assert windows % F == 0
    assert chosen.global_block % block == 0
    assert F * block * window_bytes <= chosen.global_block * global_bytes
    assert (chosen.global_block - block) * global_bytes < F * block * window_bytes
    assert chosen.global_block <= MAX_GLOBAL_BLOCK or F == 1
    wider = [G for G in range(F + 1, windows + 1) if windows % G == 0]
    assert all(-(-G * window_bytes // global_bytes) * block > MAX_GLOBAL_BLOCK for G in wider)


def test_the_limit_is_a_choice():
    assert packing(30, 32, max_global_block=100).layers_per_block == 3
    assert packing(30, 32, max_global_block=960).layers_per_block == 30
    assert packing(30, 32, max_global_block=1).layers_per_block == 1
