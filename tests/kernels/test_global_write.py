"""What the kernel writes is what torch writes in float64; every other slot stays as it was."""

import pytest
import torch
from harness import paged

from vllm_yocou.kernels import naive
from vllm_yocou.kernels.global_write import global_write

SLOTS = 16


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope", [None, False, True], ids=["nope", "halves", "interleaved"])
@pytest.mark.parametrize("d, heads", [(64, 3), (80, 1), (128, 2), (256, 1)])
def test_keys_and_values(d, heads, rope, cache_dtype):
    torch.manual_seed(d)
    # A slice of a wider projection; slots out of order, at the edges of blocks, and rows that are not written.
    kv_NKd = torch.randn(7, 2 * heads, d)
    k_NKd, v_NKd = kv_NKd.split(heads, 1)
    slots_N, positions_N = torch.tensor([31, 0, 16, -1, 15, 47, -7]), torch.tensor([0, 1, 9, 5, 4095, 1000, 2])
    cache = paged.caches(3, SLOTS, heads, d, cache_dtype)
    expected = cache.double()
    turned = None if rope is None else paged.rotation(d, rope)
    norm_d = torch.rand(d) + 0.5 if heads != 1 else None
    settings = dict(norm_d=norm_d, positions_N=positions_N, k_scale=0.5, v_scale=4.0)
    naive.global_write(
        k_NKd.double(),
        v_NKd.double(),
        *expected,
        slots_N,
        **settings | dict(rotation=turned and paged.doubled(turned)),
    )
    before = cache.clone()
    global_write(k_NKd, v_NKd, *cache, slots_N, **settings | dict(rotation=turned))
    paged.close(cache, expected)
    untouched = torch.ones(3 * SLOTS, dtype=torch.bool)
    untouched[slots_N[slots_N >= 0]] = False
    for now, then in zip(cache, before, strict=True):
        assert torch.equal(
            now.flatten(0, 1)[untouched].view(torch.uint8), then.flatten(0, 1)[untouched].view(torch.uint8)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_in_half_precision(dtype):
    k_NKd, v_NKd = torch.randn(2, 5, 2, 64).to(dtype)
    cache, slots_N = paged.caches(2, SLOTS, 2, 64, dtype), torch.arange(5)
    expected = cache.double()
    turned, positions_N, norm_d = paged.rotation(64, False), torch.arange(5) * 700, torch.rand(64)
    settings = dict(positions_N=positions_N, norm_d=norm_d)
    naive.global_write(k_NKd.double(), v_NKd.double(), *expected, slots_N, rotation=paged.doubled(turned), **settings)
    global_write(k_NKd, v_NKd, *cache, slots_N, rotation=turned, **settings)
    paged.close(cache, expected)


def test_a_cache_of_more_than_2_31_numbers():
    """Only the pages that are touched take memory."""
    blocks = (1 << 31) // (SLOTS * 64) + 2
    cache_BSKd = torch.empty(2, blocks, SLOTS, 1, 64, dtype=torch.float16)
    assert cache_BSKd[0].numel() > 1 << 31
    k_NKd, v_NKd = torch.randn(2, 3, 1, 64).half()
    slots_N = torch.arange(3) + (blocks - 1) * SLOTS
    global_write(k_NKd, v_NKd, *cache_BSKd, slots_N)
    assert torch.equal(cache_BSKd[0, -1, :3], k_NKd) and torch.equal(cache_BSKd[1, -1, :3], v_NKd)


def test_eight_bits():
    """Numbers that float8 has: Triton's interpreter loses a carry where one is rounded (1.99 becomes 1.0)."""
    k_NKd, v_NKd = torch.randn(2, 5, 2, 64).to(torch.float8_e4m3fn).float()
    cache, slots_N = paged.caches(2, SLOTS, 2, 64, torch.float8_e4m3fn), torch.arange(5)
    expected = cache.double()
    naive.global_write(k_NKd.double(), v_NKd.double(), *expected, slots_N, k_scale=0.5, v_scale=4.0)
    global_write(k_NKd, v_NKd, *cache, slots_N, k_scale=0.5, v_scale=4.0)
    paged.close(cache, expected)


def test_no_rows():
    cache = paged.caches(1, SLOTS, 2, 64, torch.float32)
    before = cache.clone()
    global_write(torch.empty(0, 2, 64), torch.empty(0, 2, 64), *cache, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (dict(slots_N=torch.zeros(3, dtype=torch.int32)), "slots_N is one int64"),
        (dict(v_NKd=torch.zeros(3, 1, 64)), "are both"),
        (dict(k_NKd=torch.zeros(3, 2, 128)[..., ::2], v_NKd=torch.zeros(3, 2, 64)), "lie side by side"),
        (dict(norm_d=torch.ones(32)), "norm_d has a weight"),
        (dict(rotation=paged.rotation(64, False)), "needs positions_N"),
    ],
    ids=["slots", "heads", "strides", "norm", "positions"],
)
def test_arguments_are_explained(changed, complaint):
    k_cache, v_cache = paged.caches(1, SLOTS, 2, 64, torch.float32)
    rows = dict(k_NKd=torch.zeros(3, 2, 64), v_NKd=torch.zeros(3, 2, 64), slots_N=torch.arange(3))
    with pytest.raises(AssertionError, match=complaint):
        global_write(k_cache_BSKd=k_cache, v_cache_BSKd=v_cache, **rows | changed)
