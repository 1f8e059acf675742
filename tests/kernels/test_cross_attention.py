"""Rows of several requests against paged keys, at odd lengths and the edges of blocks, tiles and splits."""

import paged
import pytest
import torch

from vllm_yocou.kernels.cross_attention import SPLIT, TILE, cross_attention, naive

SLOTS = 16
CONTEXTS = [1, 2, 15, 16, 17, TILE - 1, TILE, TILE + 1, SPLIT - 1, SPLIT + 1, 1999]


def compare(heads, kv_heads, d, contexts, dtype=torch.float32, cache_dtype=None, slots=SLOTS, **scales):
    torch.manual_seed(d)
    blocks_each = 2048 // slots
    cache = paged.caches(3 * blocks_each, slots, kv_heads, d, cache_dtype or dtype)
    table_RX = paged.block_table(3, blocks_each)
    context_M = torch.tensor(contexts, dtype=torch.int32)
    request_M = torch.arange(len(contexts), dtype=torch.int32) % 3
    q_MHd = torch.randn(len(contexts), heads, d).to(dtype)
    rows = (table_RX, request_M, context_M, d**-0.5)
    got = cross_attention(q_MHd, *cache, *rows, **scales)
    paged.close(got, naive(q_MHd.double(), *cache.double(), *rows, **scales))
    return got


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (6, 2), (8, 1)])
def test_head_sizes_and_groups(heads, kv_heads, d):
    compare(heads, kv_heads, d, CONTEXTS[::3])


@pytest.mark.parametrize("slots", [16, 48, 512])
def test_lengths_at_every_edge(slots):
    compare(4, 2, 64, CONTEXTS, slots=slots)


@pytest.mark.parametrize("dtype", paged.HALF_PRECISION, ids=str)
def test_half_precision(dtype):
    compare(4, 2, 80, CONTEXTS[::2], dtype)


def test_eight_bit_caches():
    compare(4, 2, 64, CONTEXTS[::3], torch.float32, torch.float8_e4m3fn, k_scale=0.5, v_scale=4.0)


def test_rows_without_keys_are_zero():
    got = compare(4, 2, 64, [0, 17, 0])
    assert not got[[0, 2]].any() and got[1].all()


def test_a_rows_bits_do_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    cache, table_RX = paged.caches(400, SLOTS, 2, 64, torch.float32), paged.block_table(2, 128)
    q_MHd, request_M = torch.randn(5, 4, 64), torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32)
    context_M = torch.tensor([1999, 3, 700, 1500, 64], dtype=torch.int32)
    together = cross_attention(q_MHd, *cache, table_RX, request_M, context_M, 0.125)
    for m in range(5):
        alone = cross_attention(q_MHd[m:][:1], *cache, table_RX, request_M[m:][:1], context_M[m:][:1], 0.125)
        assert torch.equal(alone[0], together[m])


def test_a_cache_of_more_than_2_31_numbers():
    """Only the pages that are touched take memory."""
    d, blocks = 64, (1 << 31) // (2 * SLOTS * 64) + 50
    cache_BSKd = torch.empty(2, blocks, SLOTS, 2, d, dtype=torch.float16)
    assert cache_BSKd[0].numel() > 1 << 31
    table_RX = torch.arange(blocks - 40, blocks, dtype=torch.int32)[None]
    small = torch.randn(2, 40, SLOTS, 2, d).half()
    cache_BSKd[:, -40:] = small
    q_MHd, zero = torch.randn(1, 4, d).half(), torch.zeros(1, dtype=torch.int32)
    got = cross_attention(q_MHd, *cache_BSKd, table_RX, zero, zero + 601, 0.125)
    expected = cross_attention(q_MHd, *small, table_RX - (blocks - 40), zero, zero + 601, 0.125)
    assert torch.equal(got, expected)


def test_arguments_are_explained():
    k_cache, v_cache = paged.caches(4, SLOTS, 2, 64, torch.float32)
    one = torch.zeros(1, dtype=torch.int32)
    rows = dict(block_table_RX=one[None], request_M=one, context_M=one, scale=1.0)
    for changed, complaint in (
        (dict(q_MHd=torch.zeros(1, 3, 64)), "3 query heads are not shared by 2 KV heads"),
        (dict(q_MHd=torch.zeros(1, 4, 32)), "the caches have 2 heads of 32"),
        (dict(context_M=one.long()), "context_M is one int32"),
        (dict(block_table_RX=one[None].long()), "block_table_RX is int32"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            cross_attention(
                **dict(q_MHd=torch.zeros(1, 4, 64), k_cache_BSKd=k_cache, v_cache_BSKd=v_cache) | rows | changed
            )
