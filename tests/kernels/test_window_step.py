"""A step of decodes and chunks together: attention over cached and fresh keys, and what the cache holds afterwards."""

import paged
import pytest
import torch

from vllm_yocou.kernels.window_step import TILE, naive, window_step

SLOTS = 16


def compare(heads, kv_heads, d, window, chunks, dtype=torch.float32, interleaved=False, norm=True, padding=0):
    """`chunks`: for each request the tokens before this step, and in it."""
    torch.manual_seed(window + d)
    blocks_each = 512 // SLOTS
    cache = paged.caches(len(chunks) * blocks_each, SLOTS, kv_heads, d, dtype)
    table_RX = paged.block_table(len(chunks), blocks_each)
    positions = [position for before, fresh in chunks for position in range(before, before + fresh)] + [-1] * padding
    requests = [r for r, (_, fresh) in enumerate(chunks) for _ in range(fresh)] + [0] * padding
    first_row_R = torch.tensor([0, *(fresh for _, fresh in chunks)]).cumsum(0)[:-1].int()
    qkv_NXd = torch.randn(len(positions), heads + 2 * kv_heads, d).to(dtype)
    q_NHd, k_NKd, v_NKd = qkv_NXd.split([heads, kv_heads, kv_heads], 1)
    rows = (table_RX, torch.tensor(requests).int(), torch.tensor(positions), first_row_R, window, d**-0.5)
    turned = paged.rotation(d, interleaved)
    norms = [torch.rand(d) + 0.5 for _ in range(2)] if norm else [None, None]
    expected_cache = cache.double()
    expected = naive(
        q_NHd.double(), k_NKd.double(), v_NKd.double(), *expected_cache, *rows, paged.doubled(turned), *norms
    )
    got = window_step(q_NHd, k_NKd, v_NKd, *cache, *rows, turned, *norms)
    paged.close(got, expected)
    paged.close(cache, expected_cache)


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (8, 1)])
def test_head_sizes_and_groups(heads, kv_heads, d):
    compare(heads, kv_heads, d, 33, [(40, 1), (0, 3), (100, 2)], norm=d != 80, interleaved=d == 128)


@pytest.mark.parametrize("window", [1, 2, 7, SLOTS, TILE - 1, TILE, TILE + 1, 100])
def test_windows_and_their_edges(window):
    """Decodes at, before and behind the first full window; a chunk longer than the window; the first token of all."""
    edges = [(max(0, window + offset), 1) for offset in (-2, -1, 0, 1, 15)]
    compare(4, 2, 64, window, [*edges, (0, 1), (0, window + 3), (window, 40)])


@pytest.mark.parametrize("dtype", paged.HALF_PRECISION, ids=str)
def test_half_precision(dtype):
    compare(4, 2, 64, 33, [(40, 1), (0, 20), (31, 5)], dtype)


def test_padding_writes_nothing_and_gives_zeros():
    compare(4, 2, 64, 16, [(40, 1), (7, 2)], padding=3)
