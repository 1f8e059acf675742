"""The window attention of one (iteration, layer): norm, rotate, write and attend over the last W keys, in one launch.

Shapes: N rows of a step, R requests, H query and K KV heads (G = H / K to a KV head), d head size, B blocks of S slots,
W window, P positions.
No program waits for another: keys of the same step are computed again from their projections, and only those of earlier
steps are read from the cache. So a step may mix rows of decodes with chunks of prompts.
"""

import torch
import triton
import triton.language as tl

from vllm_yocou.kernels.arguments import Rotation, check_cache, check_rows
from vllm_yocou.kernels.global_write import naive as naive_write
from vllm_yocou.kernels.vectors import load_vectors

TILE = 32  # keys at a time


def naive(
    q_NHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    k_cache_BSKd: torch.Tensor,
    v_cache_BSKd: torch.Tensor,
    block_table_RX: torch.Tensor,
    request_N: torch.Tensor,
    positions_N: torch.Tensor,
    first_row_R: torch.Tensor,
    window: int,
    scale: float,
    rotation: Rotation,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The oracle: as `window_step`, first writing all keys and values, then row by row."""
    S, K = k_cache_BSKd.shape[1:3]
    block_N = block_table_RX[request_N.long(), positions_N // S].long()
    slots_N = torch.where(positions_N < 0, -1, block_N * S + positions_N % S)
    naive_write(
        k_NKd, v_NKd, k_cache_BSKd, v_cache_BSKd, slots_N, k_norm_d, eps, rotation=rotation, positions_N=positions_N
    )
    if q_norm_d is not None:
        q_NHd = torch.nn.functional.rms_norm(q_NHd, q_norm_d.shape, q_norm_d.to(q_NHd.dtype), eps)
    q_NHd = rotation.turned(q_NHd, positions_N)
    out_NHd = torch.zeros_like(q_NHd)
    for n, (request, position) in enumerate(zip(request_N.tolist(), positions_N.tolist(), strict=True)):
        seen = torch.arange(max(0, position - window + 1), position + 1)
        block = block_table_RX[request, seen // S].long()
        keys, values = (cache[block, seen % S].to(q_NHd.dtype) for cache in (k_cache_BSKd, v_cache_BSKd))
        weights_KGW = torch.einsum("kgd,wkd->kgw", q_NHd[n].unflatten(0, (K, -1)) * scale, keys).softmax(-1)
        out_NHd[n] = torch.einsum("kgw,wkd->kgd", weights_KGW, values).flatten(0, 1)
    return out_NHd


def window_step(
    q_NHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    k_cache_BSKd: torch.Tensor,
    v_cache_BSKd: torch.Tensor,
    block_table_RX: torch.Tensor,
    request_N: torch.Tensor,
    positions_N: torch.Tensor,
    first_row_R: torch.Tensor,
    window: int,
    scale: float,
    rotation: Rotation,
    q_norm_d: torch.Tensor | None = None,
    k_norm_d: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Write this step's keys and values and attend over the last `window`, the row itself included: (N, H, d).

    Args:
        q_NHd, k_NKd, v_NKd: projections of one dtype, float32, float16 or bfloat16, as they come, without norm or
            rotation; the last dimension contiguous. A request's rows follow one another, in order.
        k_cache_BSKd, v_cache_BSKd: (B, S, K, d) in the rows' dtype; blocks, slots and heads may lie anywhere, as in a
            packed block.
        block_table_RX: (R, blocks) int32, the block of each S positions of a request.
        request_N, positions_N: (N,) int32 and int64, whose row it is, and its position; a negative position is
            padding, which writes nothing and gives zeros.
        first_row_R: (R,) int32, where each request's rows begin.
        window: keys that a row sees, itself included; scale: of the scores.
        rotation: RoPE of queries and keys.
        q_norm_d, k_norm_d: (d,) weights of RMSNorms with `eps`, both or neither.
    """
    N, K, d = check_rows("k_NKd", k_NKd, "v_NKd", v_NKd)
    S = check_cache(k_cache_BSKd, v_cache_BSKd, K, d)
    assert q_NHd.dim() == 3 and q_NHd.shape[::2] == (N, d) and q_NHd.dtype == k_NKd.dtype, "q_NHd has the keys' rows"
    assert q_NHd.stride(2) == 1, "the numbers of a head lie side by side in q_NHd"
    assert q_NHd.shape[1] % K == 0, f"{q_NHd.shape[1]} query heads are not shared by {K} KV heads evenly"
    assert k_cache_BSKd.dtype == k_NKd.dtype, "the caches are of the rows' dtype: keys of this step are not rounded"
    assert block_table_RX.dtype == torch.int32 and block_table_RX.stride(1) == 1, "block_table_RX is int32, row by row"
    assert request_N.shape == positions_N.shape == (N,), "request_N and positions_N are one number a row"
    assert request_N.dtype == torch.int32 and positions_N.dtype == torch.int64, "request_N is int32, positions_N int64"
    assert first_row_R.dtype == torch.int32 and len(first_row_R) == len(block_table_RX), "first_row_R is int32, (R,)"
    assert (q_norm_d is None) == (k_norm_d is None), "queries and keys are normed together"
    assert window >= 1, "a row sees itself at least"
    out_NHd = torch.empty((N, q_NHd.shape[1], d), dtype=q_NHd.dtype, device=q_NHd.device)
    if N == 0:
        return out_NHd
    G = q_NHd.shape[1] // K
    _window_step[(N, K)](
        q_NHd,
        k_NKd,
        v_NKd,
        k_cache_BSKd,
        v_cache_BSKd,
        block_table_RX,
        request_N,
        positions_N,
        first_row_R,
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
        block_table_RX.stride(0),
        W=window,
        S=S,
        G=G,
        D=d,
        BLOCK_G=max(16, triton.next_power_of_2(G)),
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        TILE=TILE,
        NORM=q_norm_d is not None,
        ROPE=rotation.kind,
        PRECISION="ieee" if q_NHd.dtype == torch.float32 else "tf32",
    )
    return out_NHd


@triton.jit
def _window_step(
    q,
    k,
    v,
    k_cache,
    v_cache,
    block_table,
    requests,
    positions,
    first_rows,
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
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1) * G
    g, i, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)[None, :], tl.arange(0, TILE)
    head = kv_head * G + g
    outs = out + (n * heads + head[:, None]) * D + i
    is_output = (g[:, None] < G) & (i < D)
    position = tl.load(positions + n)
    if position < 0:
        tl.store(outs, tl.zeros((BLOCK_G, BLOCK_D), out.dtype.element_ty), mask=is_output)
    else:
        request = tl.load(requests + n)
        first_row = tl.load(first_rows + request).to(tl.int64)
        first_position = tl.load(positions + first_row)  # what lies before it is in the cache
        table = block_table + request.to(tl.int64) * table_row

        query = load_vectors(
            q + n * q_row + head[:, None] * q_head,
            g[:, None] < G,
            tl.zeros((BLOCK_G, 1), tl.int64) + position,
            q_norm,
            eps,
            cos_sin,
            D,
            BLOCK_D,
            NORM,
            ROPE,
        ).to(q.dtype.element_ty)
        highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_G,), tl.float32)
        sum_GD = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        start = tl.maximum(position - W + 1, 0)
        for at in range(start, position + 1, TILE):
            seen = at + t
            valid = seen <= position
            cached = valid & (seen < first_position)
            fresh = valid & (seen >= first_position)
            # Blocks are counted in 64 bits: a cache may hold more than 2^31 bytes.
            block = tl.load(table + seen // S, mask=cached, other=0).to(tl.int64)
            row = first_row + seen - first_position
            there = k_cache + block * k_block + (seen % S) * k_slot + kv_head * k_cache_head
            old = tl.load(there[:, None] + i, mask=cached[:, None] & (i < D), other=0.0)
            new = load_vectors(
                (k + row * k_row + kv_head * k_head)[:, None],
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
            there = v + row * v_row + kv_head * v_head
            new = tl.load(there[:, None] + i, mask=fresh[:, None] & (i < D), other=0.0)
            value = tl.where(cached[:, None], old, new)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            score = tl.where(valid[None, :], score, float("-inf"))
            now = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp(score - now[:, None])
            before = tl.exp(highest - now)
            total = total * before + tl.sum(weight, 1)
            sum_GD = sum_GD * before[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
            highest = now
        tl.store(outs, (sum_GD / total[:, None]).to(out.dtype.element_ty), mask=is_output)

        block, slot = tl.load(table + position // S).to(tl.int64), position % S
        one = tl.zeros((1, 1), tl.int64)
        key = load_vectors(
            k + n * k_row + kv_head * k_head + one,
            one == 0,
            one + position,
            k_norm,
            eps,
            cos_sin,
            D,
            BLOCK_D,
            NORM,
            ROPE,
        )
        there = k_cache + block * k_block + slot * k_slot + kv_head * k_cache_head
        tl.store(there + i, key.to(k_cache.dtype.element_ty), mask=i < D)
        value = tl.load(v + n * v_row + kv_head * v_head + i, mask=i < D, other=0.0)
        there = v_cache + block * v_block + slot * v_slot + kv_head * v_cache_head
        tl.store(there + i, value, mask=i < D)
