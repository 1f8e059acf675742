"""The window attention of one (iteration, layer): norm, rotate, write and attend over the last W keys, in one launch.

Shapes: N rows of a step, H query and K KV heads (G = H / K to a KV head), d head size, B blocks of S slots, W window.
No program waits for another: keys of the same step are computed again from their projections, and only those of earlier
steps are read from the cache. So a step may mix rows of decodes with chunks of prompts.
"""

import torch
import triton
import triton.language as tl

from vllm_yocou.kernels.arguments import Batch, Rotation, check_cache, check_queries, check_rows
from vllm_yocou.kernels.requests import request_of_tile
from vllm_yocou.kernels.vectors import load_vectors

TILE = 32  # keys at a time, of heads of up to 256 bytes; of wider ones half as many fit into a GPU's shared memory
# Queries of a program, its rows times their heads: as few as a matrix product takes, or more that share their keys.
DECODE_QUERIES, CHUNK_QUERIES = 16, 64


def window_step(
    q_NHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    k_cache_BSKd: torch.Tensor,
    v_cache_BSKd: torch.Tensor,
    slots_N: torch.Tensor,
    batch: Batch,
    longest: int,
    window: int,
    scale: float,
    rotation: Rotation,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_NHd: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write this step's keys and values and attend over the last `window`, the row itself included: (N, H, d).

    The result of padding rows is left as it was.

    Args:
        q_NHd, k_NKd, v_NKd: projections of one dtype, float32, float16 or bfloat16, before norm and rotation; the last
            dimension contiguous.
        k_cache_BSKd, v_cache_BSKd: (B, S, K, d) in the rows' dtype; blocks, slots and heads may lie anywhere, as in a
            packed block.
        slots_N: int64, block · S + slot, where each row that is not padding is written; negative for nowhere.
        batch: whose rows they are, and where the keys of earlier steps lie.
        longest: the largest number of rows of any one request.
        window: keys that a row sees, itself included.
        scale: factor of the scores.
        rotation: RoPE of queries and keys.
        q_norm_d, k_norm_d: (d,) weights of RMSNorms with `eps`, both or neither.
        out_NHd: contiguous; the result is written there instead of to a new tensor.
    """
    N, K, d = check_rows("k_NKd", k_NKd, "v_NKd", v_NKd)
    S = check_cache(k_cache_BSKd, v_cache_BSKd, K, d)
    R = batch.check()
    _, H, _ = check_queries(q_NHd, K)
    assert q_NHd.shape == (N, H, d) and q_NHd.dtype == k_NKd.dtype, "q_NHd has the keys' rows, head size and dtype"
    assert k_cache_BSKd.dtype == k_NKd.dtype, "the caches are of the rows' dtype: keys of this step are not rounded"
    assert slots_N.dim() == 1 and slots_N.dtype == torch.int64, "slots_N is one int64 a row"
    assert (q_norm_d is None) == (k_norm_d is None), "queries and keys are normed together"
    assert window >= 1, "a row sees itself at least"
    if out_NHd is None:
        out_NHd = torch.empty((N, H, d), dtype=q_NHd.dtype, device=q_NHd.device)
    assert out_NHd.shape == q_NHd.shape and out_NHd.is_contiguous(), "out_NHd is contiguous, of the queries' shape"
    if N == 0:
        return out_NHd
    BLOCK_G = triton.next_power_of_2(H // K)
    decodes = longest * BLOCK_G <= DECODE_QUERIES
    rows = max(1, (DECODE_QUERIES if decodes else CHUNK_QUERIES) // BLOCK_G)
    _window_step[(N // rows + R, K)](
        q_NHd,
        k_NKd,
        v_NKd,
        k_cache_BSKd,
        v_cache_BSKd,
        slots_N,
        batch.block_table_RX,
        batch.starts_R1,
        batch.lengths_R,
        R,
        out_NHd,
        scale,
        rotation.cos_sin_PD,
        q_norm_d,
        k_norm_d,
        eps,
        *q_NHd.stride()[:2],
        *k_NKd.stride()[:2],
        *v_NKd.stride()[:2],
        *k_cache_BSKd.stride()[:3],
        *v_cache_BSKd.stride()[:3],
        batch.block_table_RX.stride(0),
        W=window,
        S=S,
        G=H // K,
        D=d,
        ROWS=rows,
        BLOCK_G=BLOCK_G,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        TILE=TILE if d * k_NKd.itemsize <= 256 else TILE // 2,
        NORM=q_norm_d is not None,
        ROPE=rotation.kind,
        PRECISION="ieee" if q_NHd.dtype == torch.float32 else "tf32",
        # Two stages, which hold a tile that waits for its turn, do not fit into the 99 KiB of many GPUs.
        num_stages=2 if decodes and d * k_NKd.itemsize <= 512 else 1,
    )
    return out_NHd


@triton.jit(do_not_specialize=["requests"])
def _window_step(
    q,
    k,
    v,
    k_cache,
    v_cache,
    slots,
    block_table,
    starts,
    lengths,
    requests,
    out,
    scale,
    cos_sin,
    q_norm,
    k_norm,
    eps,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    k_block,
    k_slot,
    k_cache_head,
    v_block,
    v_slot,
    v_cache_head,
    table_row,
    W: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) * G
    request, nth = request_of_tile(tile, starts, requests, ROWS)
    start = tl.load(starts + request)
    fresh_rows = tl.load(starts + request + 1) - start
    first_row = nth * ROWS  # of the request's
    if first_row < fresh_rows:
        before = tl.load(lengths + request) - fresh_rows  # tokens of earlier steps: these keys are in the cache
        table = block_table + request.to(tl.int64) * table_row
        # A query's row of the matrix product: G heads of one row of the step lie together.
        m, i, t = tl.arange(0, ROWS * BLOCK_G), tl.arange(0, BLOCK_D)[None, :], tl.arange(0, TILE)
        row, g = first_row + m // BLOCK_G, m % BLOCK_G
        is_query = ((row < fresh_rows) & (g < G))[:, None]
        position = before + row
        n, head = (start + row).to(tl.int64), kv_head * G + g
        query = load_vectors(
            q + (n * q_row + head * q_head)[:, None],
            is_query,
            position[:, None],
            q_norm,
            eps,
            cos_sin,
            D,
            BLOCK_D,
            NORM,
            ROPE,
        ).to(q.dtype.element_ty)
        highest = tl.full((ROWS * BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS * BLOCK_G,), tl.float32)
        sum_MD = tl.zeros((ROWS * BLOCK_G, BLOCK_D), tl.float32)
        last = before + tl.minimum(first_row + ROWS, fresh_rows) - 1
        for at in range(tl.maximum(before + first_row - W + 1, 0), last + 1, TILE):
            seen = at + t
            cached = seen < before
            fresh = (seen >= before) & (seen <= last)
            # Blocks are counted in 64 bits: a cache may hold more than 2^31 bytes.
            block = tl.load(table + seen // S, mask=cached, other=0).to(tl.int64)
            n_key = (start + seen - before).to(tl.int64)
            there = k_cache + block * k_block + (seen % S) * k_slot + kv_head * k_cache_head
            old = tl.load(there[:, None] + i, mask=cached[:, None] & (i < D), other=0.0)
            new = load_vectors(
                (k + n_key * k_row + kv_head * k_head)[:, None],
                fresh[:, None],
                seen[:, None],
                k_norm,
                eps,
                cos_sin,
                D,
                BLOCK_D,
                NORM,
                ROPE,
            ).to(q.dtype.element_ty)
            key = tl.where(cached[:, None], old, new)
            there = v_cache + block * v_block + (seen % S) * v_slot + kv_head * v_cache_head
            old = tl.load(there[:, None] + i, mask=cached[:, None] & (i < D), other=0.0)
            there = v + n_key * v_row + kv_head * v_head
            new = tl.load(there[:, None] + i, mask=fresh[:, None] & (i < D), other=0.0)
            value = tl.where(cached[:, None], old, new)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            visible = (seen[None, :] <= position[:, None]) & (seen[None, :] > position[:, None] - W)
            score = tl.where(visible, score, float("-inf"))
            # A row may see none of these keys; its maximum is -inf, which cannot be subtracted, until it has seen one.
            now = tl.maximum(highest, tl.max(score, 1))
            origin = tl.where(now == float("-inf"), 0.0, now)
            weight = tl.exp(score - origin[:, None])
            kept = tl.exp(highest - origin)
            total = total * kept + tl.sum(weight, 1)
            sum_MD = sum_MD * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
            highest = now
        outs = out + (n * heads + head)[:, None] * D + i
        # Every row that is a query sees itself.
        mixed = sum_MD / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(outs, mixed.to(out.dtype.element_ty), mask=is_query & (i < D))

        row = first_row + tl.arange(0, ROWS)
        n = (start + row).to(tl.int64)
        slot = tl.load(slots + n, mask=row < fresh_rows, other=-1)
        written = (slot >= 0)[:, None]
        key = load_vectors(
            (k + n * k_row + kv_head * k_head)[:, None],
            written,
            (before + row)[:, None],
            k_norm,
            eps,
            cos_sin,
            D,
            BLOCK_D,
            NORM,
            ROPE,
        )
        there = k_cache + (slot // S) * k_block + (slot % S) * k_slot + kv_head * k_cache_head
        tl.store(there[:, None] + i, key.to(k_cache.dtype.element_ty), mask=written & (i < D))
        there = v + n * v_row + kv_head * v_head
        value = tl.load(there[:, None] + i, mask=written & (i < D), other=0.0)
        there = v_cache + (slot // S) * v_block + (slot % S) * v_slot + kv_head * v_cache_head
        tl.store(there[:, None] + i, value, mask=written & (i < D))
