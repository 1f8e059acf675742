"""A step of decodes and chunks together: attention over cached and fresh keys, and what the cache holds afterwards."""

from dataclasses import replace

import pytest
import torch
from harness import paged

from vllm_yocou.kernels import naive
from vllm_yocou.kernels.arguments import Rotation
from vllm_yocou.kernels.window_step import TILE, window_step

SLOTS = 16


def compare(heads, kv_heads, d, window, chunks, dtype=torch.float32, interleaved=False, norm=True, padding=0):
    """`chunks`: for each request the tokens before this step, and in it."""
    torch.manual_seed(window + d)
    batch, slots_N = paged.batch(chunks, 512 // SLOTS, SLOTS)
    cache = paged.caches(batch.block_table_RX.numel(), SLOTS, kv_heads, d, dtype)
    rows = len(slots_N) + padding
    qkv_NXd = torch.randn(rows, heads + 2 * kv_heads, d).to(dtype)
    q_NHd, k_NKd, v_NKd = qkv_NXd.split([heads, kv_heads, kv_heads], 1)
    step = (slots_N, batch, max(fresh for _, fresh in chunks), window, d**-0.5)
    turned = paged.rotation(d, interleaved)
    norms = [torch.rand(d) + 0.5 for _ in range(2)] if norm else [None, None]
    expected_cache, N = cache.double(), len(slots_N)
    expected = naive.window_step(
        *(x_NXd[:N].double() for x_NXd in (q_NHd, k_NKd, v_NKd)), *expected_cache, *step, paged.doubled(turned), *norms
    )
    out_NHd = torch.full((rows, heads, d), 7.0, dtype=dtype)
    got = window_step(q_NHd, k_NKd, v_NKd, *cache, *step, turned, *norms, out_NHd=out_NHd)
    assert got is out_NHd and bool((got[N:] == 7).all())
    paged.close(got[:N], expected)
    paged.close(cache, expected_cache)


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (8, 1)])
def test_head_sizes_and_groups(heads, kv_heads, d):
    compare(heads, kv_heads, d, 33, [(40, 1), (0, 3), (100, 2)], norm=d != 80, interleaved=d == 128)


@pytest.mark.parametrize("window", [1, 2, 7, SLOTS, TILE - 1, TILE, TILE + 1, 100])
def test_windows_and_their_edges(window):
    """Decodes at, before and after the first full window; chunks longer than the window; the first token of all."""
    edges = [(max(0, window + offset), 1) for offset in (-2, -1, 0, 1, 15)]
    compare(4, 2, 64, window, [*edges, (0, 1), (0, window + 3), (window, 40), (3, 129)])


def test_decodes_alone():
    """A program has room for more rows than a request has."""
    compare(10, 2, 64, 33, [(40, 1), (0, 1), (33, 1), (32, 1), (100, 1)])


def test_requests_without_rows():
    compare(4, 2, 64, 16, [(40, 1), (9, 0), (7, 20), (3, 0), (1, 0)], padding=3)


@pytest.mark.parametrize("dtype", paged.HALF_PRECISION, ids=str)
def test_half_precision(dtype):
    compare(4, 2, 64, 33, [(40, 1), (0, 20), (31, 5)], dtype)


def test_rows_with_a_negative_slot_are_not_written():
    """As in a step that vLLM runs for nobody: the block table may name blocks that are others' by now."""
    cache = paged.caches(8, SLOTS, 2, 64, torch.float32)
    before = cache.clone()
    batch, slots_N = paged.batch([(3, 2)], 8, SLOTS)
    q_NHd, k_NKd, v_NKd = torch.randn(2, 8, 64).split([4, 2, 2], 1)
    window_step(q_NHd, k_NKd, v_NKd, *cache, slots_N * 0 - 1, batch, 2, 7, 0.1, paged.rotation(64, False))
    assert torch.equal(cache, before)


def test_more_rows_than_tokens():
    """As vLLM captures graphs: rows before position 0 read no table of angles there, and give numbers."""
    cache = paged.caches(8, SLOTS, 2, 64, torch.float32)
    batch = replace(paged.batch([(0, 3)], 8, SLOTS)[0], lengths_R=torch.tensor([1], dtype=torch.int32))
    q_NHd, k_NKd, v_NKd = torch.randn(3, 8, 64).split([4, 2, 2], 1)
    angles_Pd = paged.rotation(64, False).cos_sin_PD
    before_it_nan = Rotation(torch.cat([torch.full((8, 64), float("nan")), angles_Pd])[8:])
    nowhere = torch.full((3,), -1)
    out_NHd = window_step(q_NHd, k_NKd, v_NKd, *cache, nowhere, batch, 3, 7, 0.1, before_it_nan)
    assert out_NHd.isfinite().all()


def test_a_cache_of_more_than_2_31_numbers():
    """Only the pages that are touched take memory."""
    blocks = (1 << 31) // (2 * SLOTS * 64) + 50
    cache_BSKd = torch.empty(2, blocks, SLOTS, 2, 64, dtype=torch.float16)
    assert cache_BSKd[0].numel() > 1 << 31
    batch, slots_N = paged.batch([(40, 2)], 8, SLOTS)
    small = torch.randn(2, 8, SLOTS, 2, 64).half()
    cache_BSKd[:, -8:] = small
    beyond = replace(batch, block_table_RX=batch.block_table_RX + blocks - 8)
    q_NHd, k_NKd, v_NKd = torch.randn(2, 8, 64).half().split([4, 2, 2], 1)
    step = (2, 33, 0.125, paged.rotation(64, False))
    expected = window_step(q_NHd, k_NKd, v_NKd, *small, slots_N, batch, *step)
    got = window_step(q_NHd, k_NKd, v_NKd, *cache_BSKd, slots_N + (blocks - 8) * SLOTS, beyond, *step)
    assert torch.equal(got, expected) and torch.equal(cache_BSKd[:, -8:], small)


def test_arguments_are_explained():
    k_cache, v_cache = paged.caches(8, SLOTS, 2, 64, torch.float32)
    batch, slots_N = paged.batch([(3, 2)], 8, SLOTS)
    q_NHd, k_NKd, v_NKd = torch.randn(2, 8, 64).split([4, 2, 2], 1)
    right = dict(q_NHd=q_NHd, k_NKd=k_NKd, v_NKd=v_NKd, k_cache_BSKd=k_cache, v_cache_BSKd=v_cache, slots_N=slots_N)
    right |= dict(batch=batch, longest=2, window=7, scale=0.1, rotation=paged.rotation(64, False))
    for changed, complaint in (
        (dict(q_NHd=torch.zeros(2, 3, 64)), "3 query heads are not shared by 2 KV heads"),
        (dict(q_NHd=torch.zeros(3, 4, 64)), "q_NHd has the keys' rows"),
        (dict(k_cache_BSKd=k_cache.half(), v_cache_BSKd=v_cache.half()), "the caches are of the rows' dtype"),
        (dict(slots_N=slots_N.int()), "slots_N is one int64 a row"),
        (dict(k_norm_d=torch.ones(64)), "normed together"),
        (dict(window=0), "a row sees itself"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            window_step(**right | changed)
