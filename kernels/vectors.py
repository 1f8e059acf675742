"""Loads, norms and rotates queries and keys in float32 registers, as every kernel here does first.

A vector's norm and rotation depend on the vector and its position alone, so a kernel that needs a key that another
program writes computes it again instead of waiting.
"""

import triton
import triton.language as tl

NO_ROPE, HALVES, INTERLEAVED = 0, 1, 2


@triton.jit
def load_vectors(
    base_R1,
    valid_R1,
    position_R1,
    norm_d,
    eps,
    cos_sin_PD,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """(R, BLOCK_D) float32: the vectors of D numbers that the pointers `base_R1` begin; zeros where not valid.

    norm_d: weight of an RMSNorm, if NORM. cos_sin_PD: a row for each position, D/2 cosines, then D/2 sines, if ROPE;
    1 turns the two halves of a vector against each other (NeoX), 2 its even against its odd numbers.
    """
    i = tl.arange(0, BLOCK_D)[None, :]
    inside = valid_R1 & (i < D)
    x = tl.load(base_R1 + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.zeros_like(tl.sum(x, 1))[:, None] + 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * scale * tl.load(norm_d + i, mask=i < D, other=0.0).to(tl.float32)
    if ROPE != 0:
        if ROPE == 1:
            partner, pair, first = tl.where(i < D // 2, i + D // 2, i - D // 2), i % (D // 2), i < D // 2
        else:
            partner, pair, first = i ^ 1, i // 2, i % 2 == 0
        y = tl.load(base_R1 + partner, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            y = y * scale * tl.load(norm_d + partner, mask=i < D, other=0.0).to(tl.float32)
        # Where vLLM captures a graph a request may have more rows than tokens, so that the first lie before position 0.
        turn = cos_sin_PD + tl.maximum(position_R1, 0).to(tl.int64) * D + pair
        cos = tl.load(turn, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(turn + D // 2, mask=inside, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first, -y, y) * sin
    return x
