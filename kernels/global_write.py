"""Writes keys and values into the global KV cache: norm, rotation, cast and write in one launch.

Shapes: N tokens of a step, K KV heads, d head size, B blocks of S slots, P positions.
"""

import torch
import triton
import triton.language as tl

from vllm_yocou.kernels.arguments import Rotation, check_cache, check_rows
from vllm_yocou.kernels.vectors import NO_ROPE, load_vectors


def global_write(
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    k_cache_BSKd: torch.Tensor,
    v_cache_BSKd: torch.Tensor,
    slots_N: torch.Tensor,
    norm_d: torch.Tensor | None = None,
    eps: float = 1e-6,
    rotation: Rotation | None = None,
    positions_N: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write keys, normed and rotated, and values into the slots `slots_N` of the paged cache.

    Args:
        k_NKd, v_NKd: (N, K, d), float32, float16 or bfloat16; the last dimension contiguous.
        k_cache_BSKd, v_cache_BSKd: (B, S, K, d), of a floating dtype of their own, which may be float8_e4m3fn; blocks,
            slots and heads may lie anywhere, as in a packed block.
        slots_N: (N,) int64, block · S + slot; negative for rows that are not written.
        norm_d: (d,) weight of the keys' RMSNorm with `eps`; None: they are not normed.
        rotation: the keys' RoPE at the (N,) int64 `positions_N`; None: they are not turned.
        k_scale, v_scale: numbers are divided by these before they are stored; float8_e4m3fn holds up to 448.
    """
    N, K, d = check_rows("k_NKd", k_NKd, "v_NKd", v_NKd)
    S = check_cache(k_cache_BSKd, v_cache_BSKd, K, d)
    assert slots_N.shape == (N,) and slots_N.dtype == torch.int64, "slots_N is one int64 for each of the N rows"
    assert norm_d is None or norm_d.shape == (d,), "norm_d has a weight for each of the d numbers of a head"
    assert rotation is None or positions_N is not None, "a rotation needs positions_N"
    if N == 0:
        return
    _global_write[(N, K)](
        k_NKd,
        v_NKd,
        k_cache_BSKd,
        v_cache_BSKd,
        slots_N,
        norm_d,
        eps,
        None if rotation is None else rotation.cos_sin_PD,
        positions_N,
        1 / k_scale,
        1 / v_scale,
        *k_NKd.stride()[:2],
        *v_NKd.stride()[:2],
        *k_cache_BSKd.stride()[:3],
        *v_cache_BSKd.stride()[:3],
        S=S,
        D=d,
        BLOCK_D=triton.next_power_of_2(d),
        NORM=norm_d is not None,
        ROPE=NO_ROPE if rotation is None else rotation.kind,
    )


@triton.jit
def _global_write(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    norm,
    eps,
    cos_sin,
    positions,
    k_factor,
    v_factor,
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
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        i = tl.arange(0, BLOCK_D)[None, :]
        one = tl.zeros((1, 1), tl.int64)
        position = one
        if ROPE != 0:
            position = one + tl.load(positions + row)
        # Blocks are counted in 64 bits: a cache may hold more than 2^31 bytes.
        block, inside = slot // S, slot % S
        key = load_vectors(
            k + row * k_row + head * k_head + one, one == 0, position, norm, eps, cos_sin, D, BLOCK_D, NORM, ROPE
        )
        there = k_cache + block * k_block + inside * k_slot + head * k_cache_head
        tl.store(there + i, (key * k_factor).to(k_cache.dtype.element_ty), mask=i < D)
        value = tl.load(v + row * v_row + head * v_head + i, mask=i < D, other=0.0).to(tl.float32)
        there = v_cache + block * v_block + inside * v_slot + head * v_cache_head
        tl.store(there + i, (value * v_factor).to(v_cache.dtype.element_ty), mask=i < D)
