"""Few query rows against a long paged cache: split over the sequence, reduced in a fixed order.

Shapes: M rows of R requests, H query and K KV heads (G = H / K to a KV head), d head size, B blocks of S slots, X
splits.
The keys of a block of the sequence are read once for all G query heads of a KV head. How a row's keys are split depends
on its context and on X alone, so the same row has the same bits in every batch, and the host reads nothing.
"""

import torch
import triton
import triton.language as tl

from vllm_yocou.kernels.arguments import Batch, check_cache, check_queries
from vllm_yocou.kernels.requests import request_of_row

TILE = 64  # keys at a time, of heads of up to 512 bytes; of wider ones half as many fit into a GPU's shared memory
SPLIT, MOST_SPLITS = 512, 64  # keys to a split, at least, of the longest context
# Of what splits hand over. More rows take turns, since a row with fewer splits would have other bits in other batches.
SCRATCH_BYTES = 64 << 20


def scratch(M: int, H: int, d: int, longest: int, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What splits hand to the reduction: results (m, H, X, d) and the logarithms of their masses (m, H, X), float32.

    m is M, or as many rows as SCRATCH_BYTES hold.

    Args:
        longest: tokens of the longest context that there may be, which decides the number of splits.
    """
    splits = max(1, min(MOST_SPLITS, longest // SPLIT))
    rows = min(M, max(1, SCRATCH_BYTES // (4 * H * splits * d)))
    partial_MHXd = torch.empty((rows, H, splits, d), dtype=torch.float32, device=device)
    return partial_MHXd, torch.empty((rows, H, splits), dtype=torch.float32, device=device)


def cross_attention(
    q_MHd: torch.Tensor,
    k_cache_BSKd: torch.Tensor,
    v_cache_BSKd: torch.Tensor,
    batch: Batch,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out_MHd: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every row over its request's keys, (M, H, d) of the queries' dtype; zeros for padding.

    Args:
        q_MHd: (M, H, d), float32, float16 or bfloat16; the last dimension contiguous.
        k_cache_BSKd, v_cache_BSKd: (B, S, K, d), of a floating dtype of their own, which may be float8_e4m3fn.
        batch: whose rows they are; its table has room for the longest context.
        scale: factor of the scores.
        k_scale, v_scale: factors of the stored keys and values.
        out_MHd: contiguous; the result is written there instead of to a new tensor.
    """
    K = k_cache_BSKd.shape[2]
    M, H, d = check_queries(q_MHd, K)
    S = check_cache(k_cache_BSKd, v_cache_BSKd, K, d)
    R = batch.check()
    if out_MHd is None:
        out_MHd = torch.empty((M, H, d), dtype=q_MHd.dtype, device=q_MHd.device)
    assert out_MHd.shape == q_MHd.shape and out_MHd.is_contiguous(), "out_MHd is contiguous, of the queries' shape"
    if M == 0:
        return out_MHd
    partial_MHXd, logsumexp_MHX = scratch(M, H, d, batch.block_table_RX.shape[1] * S, q_MHd.device)
    at_a_time, _, splits, _ = partial_MHXd.shape
    G, BLOCK_D = H // K, max(16, triton.next_power_of_2(d))
    for first in range(0, M, at_a_time):
        rows = min(at_a_time, M - first)
        _attend_to_a_split[(rows, K, splits)](
            q_MHd,
            k_cache_BSKd,
            v_cache_BSKd,
            batch.block_table_RX,
            batch.starts_R1,
            batch.lengths_R,
            R,
            first,
            partial_MHXd,
            logsumexp_MHX,
            scale * k_scale,
            v_scale,
            *q_MHd.stride()[:2],
            *k_cache_BSKd.stride()[:3],
            *v_cache_BSKd.stride()[:3],
            batch.block_table_RX.stride(0),
            S=S,
            G=G,
            D=d,
            BLOCK_G=max(16, triton.next_power_of_2(G)),
            BLOCK_D=BLOCK_D,
            TILE=TILE if d * q_MHd.itemsize <= 512 else TILE // 2,
            PRECISION="ieee" if q_MHd.dtype == torch.float32 else "tf32",
        )
        _reduce[(rows, H)](
            partial_MHXd,
            logsumexp_MHX,
            out_MHd[first:],
            H,
            splits,
            D=d,
            BLOCK_D=BLOCK_D,
            BLOCK_X=triton.next_power_of_2(splits),
        )
    return out_MHd


@triton.jit(do_not_specialize=["requests", "first_row"])
def _attend_to_a_split(
    q,
    k_cache,
    v_cache,
    block_table,
    starts,
    lengths,
    requests,
    first_row,
    partial,
    logsumexp,
    scale,
    v_scale,
    q_row,
    q_head,
    k_block,
    k_slot,
    k_head,
    v_block,
    v_slot,
    v_head,
    table_row,
    S: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head, split = tl.program_id(1), tl.program_id(2)
    m = first_row + tl.program_id(0).to(tl.int64)
    splits, heads = tl.num_programs(2), tl.num_programs(1) * G
    request = request_of_row(m, starts, requests)
    end = tl.load(starts + request + 1)
    # Padding sees no keys.
    context = tl.maximum(tl.where(m < end, tl.load(lengths + request) - end + m + 1, 0), 0).to(tl.int32)
    table = block_table + request.to(tl.int64) * table_row
    tiles = (context + TILE - 1) // TILE
    first = (tiles * split) // splits * TILE
    last = tl.minimum((tiles * (split + 1)) // splits * TILE, context)

    g, i, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    head = kv_head * G + g
    query = tl.load(
        q + m * q_row + head[:, None] * q_head + i[None, :], mask=(g[:, None] < G) & (i[None, :] < D), other=0.0
    )
    highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sum_GD = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, last, TILE):
        position = start + t
        valid = position < last
        # Blocks are counted in 64 bits: a cache may hold more than 2^31 bytes.
        block = tl.load(table + position // S, mask=valid, other=0).to(tl.int64)
        inside = valid[:, None] & (i[None, :] < D)
        there = k_cache + block * k_block + (position % S) * k_slot + kv_head * k_head
        key = tl.load(there[:, None] + i[None, :], mask=inside, other=0.0).to(query.dtype)
        there = v_cache + block * v_block + (position % S) * v_slot + kv_head * v_head
        value = tl.load(there[:, None] + i[None, :], mask=inside, other=0.0).to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        score = tl.where(valid[None, :], score, float("-inf"))
        now = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - now[:, None])
        before = tl.exp(highest - now)
        total = total * before + tl.sum(weight, 1)
        sum_GD = sum_GD * before[:, None] + tl.dot(weight.to(query.dtype), value, input_precision=PRECISION)
        highest = now
    some = total > 0
    sum_GD = tl.where(some[:, None], sum_GD / tl.where(some, total, 1.0)[:, None], 0.0) * v_scale
    at = (tl.program_id(0).to(tl.int64) * heads + head) * splits + split
    # A split without keys, of a short context where a long one would have room, moves its mass alone.
    tl.store(partial + at[:, None] * D + i[None, :], sum_GD, mask=(g[:, None] < G) & (i[None, :] < D) & (first < last))
    tl.store(logsumexp + at, tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=g < G)


@triton.jit
def _reduce(partial, logsumexp, out, heads, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    x, i = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_D)
    mass = tl.load(logsumexp + at * splits + x, mask=x < splits, other=float("-inf"))
    highest = tl.max(mass, 0)
    share = tl.where(mass > float("-inf"), tl.exp(mass - tl.where(highest > float("-inf"), highest, 0.0)), 0.0)
    all_shares = tl.sum(share, 0)
    parts = tl.load(
        partial + (at * splits + x[:, None]) * D + i[None, :],
        mask=(mass > float("-inf"))[:, None] & (i[None, :] < D),
        other=0.0,
    )
    mixed = tl.sum(parts * share[:, None], 0) / tl.where(all_shares > 0, all_shares, 1.0)
    tl.store(out + at * D + i, mixed.to(out.dtype.element_ty), mask=i < D)
