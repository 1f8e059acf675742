"""Rows of several requests against paged keys, at odd lengths and the edges of blocks, tiles and splits."""

import importlib
from dataclasses import replace

import pytest
import torch
from harness import paged

from vllm_yocou.kernels import naive
from vllm_yocou.kernels.arguments import Batch
from vllm_yocou.kernels.cross_attention import MOST_SPLITS, SPLIT, TILE, cross_attention, scratch

SLOTS = 16
CONTEXTS = [1, 2, 15, 16, 17, TILE - 1, TILE, TILE + 1, SPLIT - 1, SPLIT + 1, 1999]


def compare(
    heads, kv_heads, d, contexts, dtype=torch.float32, cache_dtype=None, slots=SLOTS, padding=0, longest=2048, **scales
):
    """`contexts`: of the requests' only rows, or for each request the tokens before this step, and in it."""
    torch.manual_seed(d)
    chunks = [context if isinstance(context, tuple) else (context - 1, 1) for context in contexts]
    batch, slots_M = paged.batch(chunks, 2048 // slots, slots)
    # What decides the splits is how long a context may be, not how long one is.
    table_RX = torch.nn.functional.pad(batch.block_table_RX, (0, longest // slots))[:, : longest // slots].contiguous()
    batch = replace(batch, block_table_RX=table_RX)
    cache = paged.caches(len(chunks) * (2048 // slots), slots, kv_heads, d, cache_dtype or dtype)
    q_MHd = torch.randn(len(slots_M) + padding, heads, d).to(dtype)
    got = cross_attention(q_MHd, *cache, batch, d**-0.5, **scales)
    paged.close(got, naive.cross_attention(q_MHd.double(), *cache.double(), batch, d**-0.5, **scales))
    return got


@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (6, 2), (8, 1)])
def test_head_sizes_and_groups(heads, kv_heads, d):
    compare(heads, kv_heads, d, CONTEXTS[::3])


@pytest.mark.parametrize("slots", [16, 48, 512])
def test_lengths_at_every_edge(slots):
    compare(4, 2, 64, CONTEXTS, slots=slots)


@pytest.mark.parametrize("longest", [256, SPLIT, MOST_SPLITS * SPLIT, 2 * MOST_SPLITS * SPLIT])
def test_one_split_and_as_many_as_there_are(longest):
    """Most of many splits have no keys."""
    assert scratch(1, 1, 1, longest, None)[0].shape[2] == min(MOST_SPLITS, max(1, longest // SPLIT))
    compare(4, 2, 64, [1, 255, 130], longest=longest)


def test_rows_take_turns_where_their_scratch_would_be_large(monkeypatch):
    """The same bits as at once, in turns of two rows of five."""
    module = importlib.import_module("vllm_yocou.kernels.cross_attention")
    contexts = [1, 700, (30, 3)]
    at_once = compare(4, 2, 64, contexts)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 2 * 4 * 4 * 4 * 64)
    assert len(scratch(5, 4, 64, 2048, None)[0]) == 2
    assert torch.equal(compare(4, 2, 64, contexts), at_once)


def test_what_no_program_wrote_is_seen():
    """Most splits leave their result as it was allocated, which the reduction must not read."""
    partial_MHXd, logsumexp_MHX = scratch(1, 2, 16, MOST_SPLITS * SPLIT, None)
    assert partial_MHXd.isnan().all()
    assert logsumexp_MHX.isnan().all()


@pytest.mark.parametrize("dtype", paged.HALF_PRECISION, ids=str)
def test_half_precision(dtype):
    compare(4, 2, 80, CONTEXTS[::2], dtype)


def test_eight_bit_caches():
    compare(4, 2, 64, CONTEXTS[::3], torch.float32, torch.float8_e4m3fn, k_scale=0.5, v_scale=4.0)


def test_several_rows_of_a_request_and_none():
    got = compare(4, 2, 64, [(40, 3), (9, 0), (0, 17), (64, 1), (5, 0)], padding=2)
    assert got[:-2].any(-1).all() and not got[-2:].any()


def test_a_rows_bits_do_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    batch, slots_M = paged.batch([(1998, 1), (2, 1), (699, 2), (1499, 1)], 128, SLOTS)
    cache = paged.caches(512, SLOTS, 2, 64, torch.float32)
    q_MHd = torch.randn(len(slots_M), 4, 64)
    together = cross_attention(q_MHd, *cache, batch, 0.125)
    for m, request, position in naive.rows(batch):
        one = torch.tensor([0, 1, position + 1], dtype=torch.int32)
        alone = Batch(batch.block_table_RX[request][None], one[:2], one[2:])
        assert torch.equal(cross_attention(q_MHd[m][None], *cache, alone, 0.125)[0], together[m])


def test_a_cache_of_more_than_2_31_numbers():
    """Only the pages that are touched take memory."""
    d, blocks = 64, (1 << 31) // (2 * SLOTS * 64) + 50
    cache_BSKd = torch.empty(2, blocks, SLOTS, 2, d, dtype=torch.float16)
    assert cache_BSKd[0].numel() > 1 << 31
    table_RX = torch.arange(blocks - 40, blocks, dtype=torch.int32)[None]
    small = torch.randn(2, 40, SLOTS, 2, d).half()
    cache_BSKd[:, -40:] = small
    q_MHd, one = torch.randn(1, 4, d).half(), torch.tensor([0, 1, 601], dtype=torch.int32)
    got = cross_attention(q_MHd, *cache_BSKd, Batch(table_RX, one[:2], one[2:]), 0.125)
    expected = cross_attention(q_MHd, *small, Batch(table_RX - (blocks - 40), one[:2], one[2:]), 0.125)
    assert torch.equal(got, expected)


def test_arguments_are_explained():
    k_cache, v_cache = paged.caches(4, SLOTS, 2, 64, torch.float32)
    batch, _ = paged.batch([(3, 1)], 4, SLOTS)
    right = dict(q_MHd=torch.zeros(1, 4, 64), k_cache_BSKd=k_cache, v_cache_BSKd=v_cache, batch=batch, scale=1.0)
    for changed, complaint in (
        (dict(q_MHd=torch.zeros(1, 3, 64)), "3 query heads are not shared by 2 KV heads"),
        (dict(q_MHd=torch.zeros(1, 4, 32)), "the caches have 2 heads of 32"),
        (dict(batch=replace(batch, lengths_R=batch.lengths_R.long())), "lengths are int32"),
        (dict(batch=replace(batch, starts_R1=batch.starts_R1[:1])), "starts and lengths of 1 requests"),
        (dict(out_MHd=torch.zeros(2, 4, 64)), "of the queries' shape"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            cross_attention(**right | changed)
