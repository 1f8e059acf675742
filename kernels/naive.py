"""What each kernel computes, in plain torch: row by row, in the dtype of its arguments, on any device.

These functions are the oracles of the tests and the contestants of the benchmark; nothing that serves a model calls
them. Shapes and arguments are those of the kernels of the same names.
"""

import torch

from vllm_yocou.kernels.arguments import Batch, Rotation


def rows(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, request, position) of every row that is not padding."""
    bounds = batch.starts_R1.tolist()
    return [
        (row, r, length - bounds[r + 1] + row)
        for r, length in enumerate(batch.lengths_R.tolist())
        for row in range(bounds[r], bounds[r + 1])
    ]


def turned(rotation: Rotation, x_NKd: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """`x_NKd` after RoPE at its rows' positions, (N, K, d) of its dtype."""
    cos, sin = (part.to(x_NKd.dtype)[:, None] for part in rotation.cos_sin_PD[positions_N].chunk(2, dim=-1))
    first, second = (x_NKd[..., ::2], x_NKd[..., 1::2]) if rotation.interleaved else x_NKd.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(pairs, -1).flatten(-2) if rotation.interleaved else torch.cat(pairs, -1)


def normed(x_NKd: torch.Tensor, weight_d: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the numbers of a head, (N, K, d) of the dtype of `x_NKd`."""
    return torch.nn.functional.rms_norm(x_NKd, list(weight_d.shape), weight_d.to(x_NKd.dtype), eps)


def attended(
    q_Hd: torch.Tensor, k_cache_BSKd: torch.Tensor, v_cache_BSKd: torch.Tensor, block_X: torch.Tensor, seen_P: range
) -> torch.Tensor:
    """(H, d): one row's scaled queries over the cached keys at the positions `seen_P` of the request with these blocks.

    Args:
        q_Hd: of the dtype to compute in.
        block_X: the request's blocks of S slots each.
    """
    S, K = k_cache_BSKd.shape[1:3]
    position = torch.arange(seen_P.start, seen_P.stop)
    block = block_X[position // S].long()
    k_PKd, v_PKd = (cache[block, position % S].to(q_Hd.dtype) for cache in (k_cache_BSKd, v_cache_BSKd))
    weights_KGP = torch.einsum("kgd,pkd->kgp", q_Hd.unflatten(0, (K, -1)), k_PKd).softmax(-1)
    return torch.einsum("kgp,pkd->kgd", weights_KGP, v_PKd).flatten(0, 1)


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
    """Norm, turn and write the keys, and write the values."""
    if norm_d is not None:
        k_NKd = normed(k_NKd, norm_d, eps)
    if rotation is not None:
        assert positions_N is not None, "a rotation needs positions_N"
        k_NKd = turned(rotation, k_NKd, positions_N)
    S = k_cache_BSKd.shape[1]
    kept_N = slots_N >= 0
    block, slot = slots_N[kept_N] // S, slots_N[kept_N] % S
    k_cache_BSKd[block, slot] = (k_NKd[kept_N] / k_scale).to(k_cache_BSKd.dtype)
    v_cache_BSKd[block, slot] = (v_NKd[kept_N] / v_scale).to(v_cache_BSKd.dtype)


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
) -> torch.Tensor:
    """Write all keys and values, then attend row by row; zeros for padding. `longest` is only for the kernel."""
    positions_N = torch.zeros(len(q_NHd), dtype=torch.int64)
    for n, _, position in rows(batch):
        positions_N[n] = position
    global_write(k_NKd, v_NKd, k_cache_BSKd, v_cache_BSKd, slots_N, k_norm_d, eps, rotation, positions_N)
    if q_norm_d is not None:
        q_NHd = normed(q_NHd, q_norm_d, eps)
    q_NHd = turned(rotation, q_NHd, positions_N)
    out_NHd = torch.zeros_like(q_NHd)
    for n, request, position in rows(batch):
        seen_P = range(max(0, position - window + 1), position + 1)
        out_NHd[n] = attended(q_NHd[n] * scale, k_cache_BSKd, v_cache_BSKd, batch.block_table_RX[request], seen_P)
    return out_NHd


def cross_attention(
    q_MHd: torch.Tensor,
    k_cache_BSKd: torch.Tensor,
    v_cache_BSKd: torch.Tensor,
    batch: Batch,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Attend row by row over all keys of the row's request up to its position; zeros for padding."""
    out_MHd = torch.zeros_like(q_MHd)
    for m, request, position in rows(batch):
        q_Hd = q_MHd[m] * scale * k_scale
        seen_P = range(position + 1)
        out_MHd[m] = attended(q_Hd, k_cache_BSKd, v_cache_BSKd, batch.block_table_RX[request], seen_P) * v_scale
    return out_MHd
